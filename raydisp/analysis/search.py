"""What a search found: its history, the dose-response, the front of several objectives."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydisp.analysis.rows import (
    Row,
    number,
    scored,
    search_trials,
    trial_field,
    value_of,
)
from raydisp.config.search import Objective
from raydisp.results import TRIAL_COLUMNS

DOSE_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("arm", pa.string()),
        ("weight", pa.float64()),
        ("temperature", pa.float64()),
        ("weight_per_temperature", pa.float64()),
        ("layers", pa.string()),
        ("value", pa.float64()),
    ]
)

HISTORY_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("arm", pa.string()),
        ("value", pa.float64()),
        ("best", pa.float64()),  # of the arm so far
    ]
)

SURFACE_SCHEMA = pa.schema([("weight", pa.float64()), ("temperature", pa.float64()), ("value", pa.float64())])

MIN_SURFACE_POINTS = 10
"""Distinct doses without which a surface over weight and temperature would be invention."""
SURFACE_STEPS = 60


def search_history(trials: pa.Table, objective: Objective) -> pa.Table:
    """Objective of the completed search trials by trial number, and their arm's best so far (HISTORY_SCHEMA).

    The baseline is an arm here where it was searched too. All are of the same number of tokens.
    """
    better = min if objective.mode == "min" else max
    pairs = scored(trials, objective)
    if pairs:
        tokens = pairs[0][0]["num_tokens"]
        tuned = trials.filter(
            pc.and_(pc.equal(trials["phase"], "search"), pc.equal(trials["arm"], "baseline"))
        )
        own = [(row, value_of(row, objective.metric)) for row in tuned.to_pylist() if tuned.num_rows > 1]
        pairs += [(row, value) for row, value in own if value is not None and row["num_tokens"] == tokens]
    best: dict[str, float] = {}
    rows: list[Row] = []
    for row, value in sorted(pairs, key=lambda pair: pair[0]["trial"]):
        arm = row["arm"]
        best[arm] = better(best.get(arm, value), value)
        rows.append({"trial": row["trial"], "arm": arm, "value": value, "best": best[arm]})
    return pa.Table.from_pylist(rows, schema=HISTORY_SCHEMA)


def dose_response(trials: pa.Table, objective: Objective) -> pa.Table:
    """Objective of the completed search trials beside the dose that each got (DOSE_SCHEMA).

    For temperatures of 1 or more the loss is nearly linear in the distances, and only weight / temperature
    can be told apart: hence that column. Fields that are not searched come from the trial's own
    configuration. A list of layers is written as JSON.
    """
    rows = [
        {"trial": row["trial"], "arm": row["arm"], **dose_of(row), "value": value}
        for row, value in scored(trials, objective)
    ]
    return pa.Table.from_pylist(rows, schema=DOSE_SCHEMA)


def dose_of(row: Row) -> Row:
    """Weight, temperature, their ratio and the layers of a trial, each None where the row does not tell."""
    weight = number(trial_field(row, "dispersion.weight"))
    temperature = number(trial_field(row, "dispersion.temperature"))
    layers = trial_field(row, "dispersion.layers")
    return {
        "weight": weight,
        "temperature": temperature,
        "weight_per_temperature": weight / temperature if weight is not None and temperature else None,
        "layers": layers if layers is None or isinstance(layers, str) else json.dumps(layers),
    }


def dose_surface(trials: pa.Table, objective: Objective) -> pa.Table:
    """The objective between the doses, on a grid even in the logarithms (SURFACE_SCHEMA).

    Linear between the nearest trials, and null outside all of them. Empty with fewer than MIN_SURFACE_POINTS
    distinct positive doses, or where they lie on a line.
    """
    doses = dose_response(trials, objective).to_pylist()
    found: dict[tuple[float, float], list[float]] = {}
    for dose in doses:
        if (dose["weight"] or 0) > 0 and (dose["temperature"] or 0) > 0:
            found.setdefault((dose["weight"], dose["temperature"]), []).append(dose["value"])
    empty = SURFACE_SCHEMA.empty_table()
    if len(found) < MIN_SURFACE_POINTS:
        return empty
    from scipy import interpolate, spatial

    points = np.log(np.array([*found]))
    low, high = points.min(axis=0), points.max(axis=0)
    if (high - low < 1e-9).any():
        return empty
    axes = [np.linspace(low[i], high[i], SURFACE_STEPS) for i in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    means = np.array([np.mean(values) for values in found.values()])
    try:
        surface = interpolate.LinearNDInterpolator((points - low) / (high - low), means)
    except spatial.QhullError:
        return empty
    values = surface((grid - low) / (high - low))
    missing = pa.array(values, mask=~np.isfinite(values))
    return pa.table([*np.exp(grid).T, missing], schema=SURFACE_SCHEMA)


def pareto_front(trials: pa.Table, *objectives: Objective) -> pa.Table:
    """The completed search trials of which no other is at least as good in all objectives and better in one.

    Only trials of the same number of tokens compare: those of the most tokens, where they differ.

    Returns:
        One row per trial of the front, best first by the first objective: study, phase, trial, attempt,
        num_tokens, and a column per objective.
    """
    needed = dict.fromkeys(["study", "phase", "trial", "attempt", "num_tokens", "status"])
    table = search_trials(trials).select([*needed | dict.fromkeys(one.metric for one in objectives)])
    rows = [row for row in table.sort_by("trial").to_pylist() if row["num_tokens"] is not None]
    rows = [row for row in rows if all(value_of(row, one.metric) is not None for one in objectives)]
    most = max((row["num_tokens"] for row in rows), default=0)
    rows = [row for row in rows if row["num_tokens"] == most]
    signs = [1.0 if one.mode == "min" else -1.0 for one in objectives]
    points = [
        tuple(row[one.metric] * sign for one, sign in zip(objectives, signs, strict=True)) for row in rows
    ]
    # In this order no point betters one before it, and the first objective of those before is as good: only
    # the others must be compared, with the distinct points of the front so far.
    front = np.empty((len(rows), len(objectives) - 1))
    kept: list[Row] = []
    last, number = None, 0
    for index in sorted(range(len(rows)), key=points.__getitem__):
        point = points[index]
        if point != last:
            if (front[:number] <= np.array(point[1:])).all(axis=1).any():
                continue
            front[number] = point[1:]
            last, number = point, number + 1
        kept.append(rows[index])
    columns = ("study", "phase", "trial", "attempt", "num_tokens")
    schema = pa.schema(
        [
            *[(name, TRIAL_COLUMNS[name]) for name in columns],
            *[(one.metric, pa.float64()) for one in objectives],
        ]
    )
    picked = [{name: row[name] for name in schema.names} for row in kept]
    return pa.Table.from_pylist(picked, schema=schema)
