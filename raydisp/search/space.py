"""The search space: which fields it may name, what may stand there, and what Optuna and Arrow make of it.

A dimension with a condition (`when`) is searched only where another searched field has one of the values that
it names; elsewhere the field has the study file's value, and its column in the results is null.
"""

from __future__ import annotations

import decimal
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel

from raydisp.arms import dimensions
from raydisp.config import StudyConfig, TrialConfig, field_of
from raydisp.config.search import Range, choices_of, condition, label

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KeyPath = tuple[str | int, ...]
Values = dict[str, Any]
"""Searched values of one trial: dotted field name -> value as in the study file."""

NOT_SEARCHED = (
    "seed",
    "evaluate",
    "checkpoint",
    "train.budget_tokens",
    "dispersion.allow_negative_weight",
    "distillation.teacher",
)
"""What cannot vary within a search: comparisons would no longer be fair."""


MAX_GRID = 100_000
"""Combinations of a grid, which is held in memory as a whole."""


def section_class(section: Any, key: str | int, node: Any) -> Any:
    """The class or type that describes what stands under a key.

    Args:
        section: class of the section, or the type of a list or mapping, that the key is in.
        node: what stands there; its discriminator, or its keys, choose among the members of a union.
    """
    # Else an entry of a list, or of a mapping whose keys are the user's.
    inner = section.model_fields[key].annotation if _is_section(section) else get_args(section)[-1]
    kinds = _members(inner)
    if isinstance(node, list):
        return next((kind for kind in kinds if get_origin(kind) is list), list[Any])
    classes = [kind for kind in kinds if _is_section(kind)]
    for kind in classes:
        sources = get_args(kind.model_fields["source"].annotation) if "source" in kind.model_fields else ()
        if isinstance(node, dict) and node.get("source") in sources:
            return kind
    if not classes:
        return next((kind for kind in kinds if get_origin(kind) is dict), dict[str, Any])
    known = [
        sum(name in kind.model_fields for name in node) if isinstance(node, dict) else 0 for kind in classes
    ]
    return classes[known.index(max(known))]


def _members(annotation: Any) -> list[Any]:
    """The types that an annotation admits, lists and mappings with what they hold."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _members(member)]
    return [annotation]


def searchable_fields(study: StudyConfig) -> dict[str, Any]:
    """Dotted name -> annotation of every field that a search may vary in this study."""
    return {
        f"{part}.{name}": field.annotation
        for part in TrialConfig.model_fields
        if part not in NOT_SEARCHED
        for name, field in type(getattr(study, part)).model_fields.items()
        if may_be_searched(part, name)
    }


def may_be_searched(part: str, name: str) -> bool:
    """Whether a search may vary a field of a section of a trial."""
    return part not in NOT_SEARCHED and name != "source" and f"{part}.{name}" not in NOT_SEARCHED


def values_of(dimension: Any) -> list[Any]:
    """The values of a dimension that is a list of them."""
    choices = choices_of(dimension)
    assert choices is not None, "a list of values"
    return choices


def is_one_of(value: Any, values: list[Any]) -> bool:
    """Whether a value is among others, types apart: 1, True and "1" differ."""
    return label(value) in {label(other) for other in values}


# --- points of the space ---------------------------------------------------------------------------------


def is_searched(study: StudyConfig, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a dimension's condition holds.

    Args:
        values: of the dimensions before it that are searched; what is not among them is not searched.
    """
    for parent, wanted in condition(study.search.space[name]).items():
        if parent not in values or not is_one_of(values[parent], wanted):
            return False
    return True


def searched_values(study: StudyConfig, config: Mapping[str, Any]) -> Values:
    """The point of the space that a trial's whole configuration stands for: fields whose condition holds."""
    values: Values = {}
    for name in study.search.space:
        if is_searched(study, name, values):
            values[name] = field_of(config, name)
    return values


def contains(study: StudyConfig, name: str, value: Any) -> bool:
    """Whether a dimension can have this value."""
    dimension = study.search.space[name]
    if not isinstance(dimension, Range):
        return is_one_of(value, values_of(dimension))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    distribution = distributions(study)[name]
    return dimension.low <= value <= dimension.high and distribution._contains(value)


def describe(dimension: Any) -> str:
    """For people: `0.01 to 2, logarithmic`."""
    if isinstance(dimension, Range):
        text = f"{dimension.low:g} to {dimension.high:g}"
        if dimension.log:
            text += ", logarithmic"
        text += f", in steps of {dimension.step:g}" if dimension.step is not None else ""
    else:
        text = f"one of {', '.join(map(str, values_of(dimension)))}"
    for parent, values in condition(dimension).items():
        text += f", where {parent} is {' or '.join(map(str, values))}"
    return text


def grid(study: StudyConfig) -> list[Values]:
    """Every combination of the values of the space, in the order of the file; conditions are kept."""
    points: list[Values] = [{}]
    fields = searchable_fields(study)
    for name, dimension in study.search.space.items():
        steps = _steps(dimension, number_type(fields[name]) is int)
        points = [
            {**point, name: value} if searched else point
            for point in points
            for searched in [is_searched(study, name, point)]
            for value in (steps if searched else [None])
        ]
    return points


def grid_size(study: StudyConfig) -> int:
    """Number of combinations; where they are more than MAX_GRID, an upper bound."""
    fields = searchable_fields(study)
    most = math.prod(
        len(_steps(dimension, number_type(fields[name]) is int))
        for name, dimension in study.search.space.items()
    )
    conditions = any(condition(dimension) for dimension in study.search.space.values())
    return len(grid(study)) if conditions and most <= MAX_GRID else most


def _steps(dimension: Any, whole: bool) -> Sequence[Any]:
    if not isinstance(dimension, Range):
        return values_of(dimension)
    step = dimension.step if dimension.step is not None else 1
    if whole:
        return range(int(dimension.low), int(dimension.high) + 1, int(step))
    # In decimals, as they are written: 0.1 + 2 * 0.1 is beyond 0.3 in floats, and so outside the space.
    low, high, width = (decimal.Decimal(str(number)) for number in (dimension.low, dimension.high, step))
    return [float(low + index * width) for index in range(int((high - low) / width) + 1)]


# --- as Optuna and Arrow have it ---------------------------------------------------------------------------


def distributions(study: StudyConfig) -> dict[str, BaseDistribution]:
    """The space as Optuna distributions, in the order of the study file.

    A range over a whole-number field is an integer distribution; a list of values is categorical, where a
    list of layers stands as its JSON text (Optuna keeps scalars only).
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    fields = searchable_fields(study)
    made: dict[str, BaseDistribution] = {}
    for name, dimension in study.search.space.items():
        if not isinstance(dimension, Range):
            made[name] = CategoricalDistribution([_scalar(value) for value in values_of(dimension)])
        elif number_type(fields[name]) is int:
            step = 1 if dimension.step is None else int(dimension.step)
            made[name] = IntDistribution(
                int(dimension.low), int(dimension.high), log=dimension.log, step=step
            )
        else:
            made[name] = FloatDistribution(
                float(dimension.low), float(dimension.high), log=dimension.log, step=dimension.step
            )
    return made


def from_optuna(study: StudyConfig, params: Mapping[str, Any]) -> Values:
    """Optuna's parameters as values of the study file (lists of layers read back)."""
    values = {}
    for name, value in params.items():
        dimension = study.search.space[name]
        if not isinstance(dimension, Range):
            name_of = label(value)
            value = next(choice for choice in values_of(dimension) if label(_scalar(choice)) == name_of)
        values[name] = value
    return values


def to_optuna(values: Mapping[str, Any]) -> Values:
    """Values of the study file as Optuna's parameters."""
    return {name: _scalar(value) for name, value in values.items()}


def column_types(study: StudyConfig) -> dict[str, pa.DataType]:
    """Arrow type of the column of each searched field: float64, int64, bool or string (lists as JSON)."""
    fields = searchable_fields(study)
    return {name: _column_type(fields[name]) for name in dimensions(study)}


def column_value(value: Any, column: pa.DataType) -> Any:
    """A field's value as it stands in its column; null stays null."""
    if value is None:
        return None
    if pa.types.is_string(column):
        return value if isinstance(value, str) else json.dumps(value)
    return float(value) if pa.types.is_floating(column) else value


def _column_type(annotation: Any) -> pa.DataType:
    kinds = {kind for kind in _flat_types(annotation) if kind is not type(None)}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def number_type(annotation: Any) -> type | None:
    """int or float where a field admits such a number, float before int; else None."""
    kinds = set(_flat_types(annotation))
    if float in kinds:
        return float
    return int if int in kinds else None


def _flat_types(annotation: Any) -> list[Any]:
    """The plain types that an annotation admits: unions opened, Literals by the type of their values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _flat_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _flat_types(member)]
    if origin is Literal:
        return [type(value) for value in get_args(annotation)]
    return [origin or annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
