"""What runs of the confirm phase add to the search's figures, and what each arm costs."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydisp import paired
from raydisp.analysis.rows import Row, compared_tokens, value_of
from raydisp.analysis.search import dose_of
from raydisp.config.search import Objective

CONFIRMED_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("weight", pa.float64()),
        ("temperature", pa.float64()),
        ("weight_per_temperature", pa.float64()),
        ("layers", pa.string()),
        ("mean", pa.float64()),
        ("low_95", pa.float64()),  # t interval of the mean; null with fewer than 2 seeds
        ("high_95", pa.float64()),
        ("lowest", pa.float64()),
        ("highest", pa.float64()),
        ("num_seeds", pa.int32()),
    ]
)

COST_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("phase", pa.string()),
        ("trial", pa.int32()),
        ("train_s", pa.float64()),
        ("peak_memory_bytes", pa.float64()),
    ]
)


def confirmed_doses(trials: pa.Table, objective: Objective) -> pa.Table:
    """The arms of the confirm phase, the baseline among them, over their seeds (CONFIRMED_SCHEMA).

    Completed runs of as many tokens as the search's values were compared at.
    """
    tokens = compared_tokens(trials, objective)
    groups: dict[str, list[tuple[Row, float]]] = {}
    for row in trials.filter(pc.equal(trials["phase"], "confirm")).to_pylist():
        value = value_of(row, objective.metric)
        if value is not None and row["num_tokens"] == tokens:
            groups.setdefault(row["arm"], []).append((row, value))
    rows = []
    for arm, pairs in groups.items():
        values = np.array([value for _, value in pairs])
        found = paired.summarise(values[None, :])
        low, high = (float(end[0]) for end in (found.low_95, found.high_95))
        rows.append(
            {
                "arm": arm,
                **dose_of(pairs[0][0]),
                "mean": float(values.mean()),
                "low_95": low if math.isfinite(low) else None,
                "high_95": high if math.isfinite(high) else None,
                "lowest": float(values.min()),
                "highest": float(values.max()),
                "num_seeds": len(values),
            }
        )
    return pa.Table.from_pylist(rows, schema=CONFIRMED_SCHEMA)


def costs(trials: pa.Table) -> pa.Table:
    """Training time and peak memory of each completed run (COST_SCHEMA), the baseline's first.

    Of the confirm phase where it has completed runs of the baseline and of another arm, else of the search;
    of the runs of the most tokens only, since fewer would cost less.
    """
    rows = [
        row
        for row in trials.to_pylist()
        if row["status"] == "completed" and row["num_tokens"] is not None and row["train_s"] is not None
    ]
    confirmed = [row for row in rows if row["phase"] == "confirm"]
    arms = {row["arm"] for row in confirmed}
    rows = (
        confirmed
        if "baseline" in arms and len(arms) > 1
        else [row for row in rows if row["phase"] == "search"]
    )
    most = max((row["num_tokens"] for row in rows), default=0)
    rows = [row for row in rows if row["num_tokens"] == most]
    rows.sort(key=lambda row: (row["arm"] != "baseline", row["trial"]))
    return pa.Table.from_pylist(
        [{name: row[name] for name in COST_SCHEMA.names} for row in rows], schema=COST_SCHEMA
    )
