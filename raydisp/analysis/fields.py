"""The searched fields of the comparable trials side by side, each on an axis from 0 to 1."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raydisp.analysis.measures import format_value
from raydisp.analysis.rows import Row, number, scored, searched_fields
from raydisp.config.search import Objective

PARALLEL_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("name", pa.string()),  # of a searched field, or of the metric
        ("place", pa.float64()),  # on its axis: 0 to 1; null where the trial does not have it
        ("text", pa.string()),
    ]
)

AXIS_SCHEMA = pa.schema([("name", pa.string()), ("place", pa.float64()), ("text", pa.string())])

MAX_PARALLEL_FIELDS = 10
MAX_CHOICES = 12
"""Labels that an axis of choices has room for."""


def parallel_coordinates(trials: pa.Table, objective: Objective) -> tuple[pa.Table, pa.Table]:
    """Every comparable trial as a line over the searched fields and the objective.

    Numbers are placed linearly, or by their logarithm where all are positive and the largest is more than 20
    times the smallest; anything else at even distances.

    Returns:
        The places of the trials (PARALLEL_SCHEMA) and the labels of the axes (AXIS_SCHEMA).
    """
    pairs = scored(trials, objective)
    places: list[Row] = []
    labels: list[Row] = []
    fields = [name for name in searched_fields(trials) if len({row[name] for row, _ in pairs} - {None}) > 1]
    columns: list[tuple[str, list[object]]] = [
        (name, [row[name] for row, _ in pairs]) for name in fields[:MAX_PARALLEL_FIELDS]
    ]
    if not columns:
        return PARALLEL_SCHEMA.empty_table(), AXIS_SCHEMA.empty_table()
    columns.append((objective.metric, [value for _, value in pairs]))
    for name, values in columns:
        spots, ticks = _axis_places(values)
        labels += [{"name": name, "place": place, "text": text} for place, text in ticks]
        for (row, _), value, place in zip(pairs, values, spots, strict=True):
            shown = format_value(value)  # type: ignore[arg-type]
            places.append({"trial": row["trial"], "name": name, "place": place, "text": shown})
    return (
        pa.Table.from_pylist(places, schema=PARALLEL_SCHEMA),
        pa.Table.from_pylist(labels, schema=AXIS_SCHEMA),
    )


def _axis_places(values: list[object]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Places from 0 to 1 of values on an axis, and (place, text) of its labels."""
    numbers = [number(value) for value in values]
    known = [value for value in numbers if value is not None]
    if known and len(known) == sum(value is not None for value in values):
        low, high = min(known), max(known)
        log = low > 0 and high > 20 * low

        def scale(value: float) -> float:
            if high == low:
                return 0.5
            if log:
                return float(np.log(value / low) / np.log(high / low))
            return (value - low) / (high - low)

        middle = float(np.sqrt(low * high)) if log else (low + high) / 2
        # Three digits, unless all would be the same.
        digits = 3 if high - low >= 0.02 * abs(high) else 4
        ticks = [(scale(value), f"{value:.{digits}g}") for value in dict.fromkeys([low, middle, high])]
        return [None if value is None else scale(value) for value in numbers], ticks
    choices = sorted({str(value) for value in values if value is not None})
    spots = {choice: i / max(len(choices) - 1, 1) for i, choice in enumerate(choices)}
    every = -(-len(choices) // MAX_CHOICES)
    return (
        [None if value is None else spots[str(value)] for value in values],
        [(spots[choice], choice) for choice in choices[::every]],
    )
