"""What all parts of the study file are made of: strict, frozen sections, and number types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MAX_SEED = 2**32 - 1


def _integral_float_to_int(value: Any) -> Any:
    # 2e8 is how people write token counts, and YAML makes a float of it.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_integral_float_to_int)]
PositiveInt = Annotated[Int, Field(ge=1)]
Tokens = Annotated[Int, Field(ge=1, le=10**15)]
Seed = Annotated[Int, Field(ge=0, le=MAX_SEED)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_known_bounds(schema: Any) -> Any:
    """A JSON schema whose bounds have the names that editors know."""
    if isinstance(schema, list):
        return [_with_known_bounds(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        # A field may be called like a bound: its schema is a mapping, a bound a number.
        key if isinstance(inner, dict) else _BOUNDS.get(key, key): _with_known_bounds(inner)
        for key, inner in schema.items()
    }


class Section(BaseModel):
    """A part of the study file: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # Where a number has a validator of its own, as `Int` has, pydantic says its bounds in its own words.
        made: JsonSchemaValue = _with_known_bounds(handler(core_schema))
        return made
