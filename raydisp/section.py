"""What all parts of the study file are made of: strict, frozen sections, and number types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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


class Section(BaseModel):
    """A part of the study file: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
