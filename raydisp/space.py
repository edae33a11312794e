"""The search space: which fields it may name, what may stand there, and what Optuna and Arrow make of it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from raydisp.config import Range, StudyConfig, TrialConfig, with_fields
from raydisp.errors import suggest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KeyPath = tuple[str | int, ...]
Values = dict[str, Any]
"""Searched values of one trial: dotted field name -> value as in the study file."""

NOT_SEARCHED = ("seed", "evaluate", "checkpoint", "train.budget_tokens")
"""What cannot vary within a search: comparisons would no longer be fair."""


def section_class(section: type[BaseModel], key: str, node: Any) -> type[BaseModel]:
    """The class that describes what stands under a key.

    Args:
        node: the mapping that stands there; its discriminator chooses among the members of a union.
    """
    classes = [kind for kind in _flat_types(section.model_fields[key].annotation) if _is_section(kind)]
    for kind in classes:
        sources = get_args(kind.model_fields["source"].annotation) if "source" in kind.model_fields else ()
        if isinstance(node, dict) and node.get("source") in sources:
            return kind
    return classes[0]


def searchable_fields(study: StudyConfig) -> dict[str, Any]:
    """Dotted name -> annotation of every field that a search may vary in this study."""
    fields: dict[str, Any] = {}
    for part in TrialConfig.model_fields:
        if part in NOT_SEARCHED:
            continue
        for name, field in type(getattr(study, part)).model_fields.items():
            if name != "source" and f"{part}.{name}" not in NOT_SEARCHED:
                fields[f"{part}.{name}"] = field.annotation
    return fields


Explain = Callable[[ValidationError, Any], str]


def find_problem(study: StudyConfig, explain: Explain) -> tuple[KeyPath, str] | None:
    """The first mistake in the search space, as the place in the file and a sentence; None if there is none.

    Args:
        explain: makes a sentence of a validation error and the tree of values that it is about.
    """
    fields = searchable_fields(study)
    for name, dimension in study.search.space.items():
        place: KeyPath = ("search", "space", name)
        shown = f'search.space["{name}"]'
        if name not in fields:
            fixed = next((part for part in NOT_SEARCHED if f"{name}.".startswith(f"{part}.")), None)
            if fixed:
                reason = f"{fixed} is the same in all trials of a study, so that they compare"
            else:
                reason = f"it names no field of a trial.{suggest(name, fields)}"
            return place, f"{shown} cannot be searched: {reason}"
        if isinstance(dimension, Range):
            kind = _number_type(fields[name])
            if kind is None:
                return place, f"{shown} is a range, but {name} is not a number; give a list of its values"
            for part in ("low", "high", "step"):
                end = getattr(dimension, part)
                if kind is int and isinstance(end, float) and not end.is_integer():
                    return (
                        (*place, part),
                        f"{shown}.{part} = {end} is not a whole number, and {name} is one",
                    )
        elif len({_label(value) for value in dimension}) < len(dimension):
            return place, f"{shown} names a value twice; keep one of each"
        for key, value in _corners(dimension):
            problem = _problem_with(study, name, value, explain)
            if problem:
                at = f"{shown}[{key}]" if isinstance(key, int) else f"{shown}.{key}"
                return (*place, key), f"{at} = {json.dumps(value)} is not allowed: {problem}"
    return None


def _corners(dimension: Any) -> Iterator[tuple[str | int, Any]]:
    """The values that are tried out against the rules: both ends of a range, every entry of a list."""
    if isinstance(dimension, Range):
        yield from (("low", dimension.low), ("high", dimension.high))
    else:
        yield from enumerate(dimension)


def _problem_with(study: StudyConfig, name: str, value: Any, explain: Explain) -> str | None:
    tree = with_fields(study.trial, {name: value})
    try:
        trial = TrialConfig.model_validate(tree)
    except ValidationError as error:
        return explain(error, tree)
    if trial.sequences_per_step % study.resources.num_workers:
        return f"resources.num_workers = {study.resources.num_workers} cannot share its batch evenly"
    return None


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
            made[name] = CategoricalDistribution([_scalar(value) for value in dimension])
        elif _number_type(fields[name]) is int:
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
            value = next(choice for choice in dimension if _label(_scalar(choice)) == _label(value))
        values[name] = value
    return values


def to_optuna(values: Mapping[str, Any]) -> Values:
    """Values of the study file as Optuna's parameters."""
    return {name: _scalar(value) for name, value in values.items()}


def column_types(study: StudyConfig) -> dict[str, pa.DataType]:
    """Arrow type of the column of each searched field: float64, int64, bool or string (lists as JSON)."""
    fields = searchable_fields(study)
    return {name: _column_type(fields[name]) for name in study.search.space}


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


def _number_type(annotation: Any) -> type | None:
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


def _label(value: Any) -> str:
    # 1, 1.0, True and "1" are equal or alike in Python; as text with their type they are not.
    return f"{type(value).__name__}:{json.dumps(value)}"
