"""How trials went: their learning curves, and when each ran where."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydisp.analysis.rows import Row, baseline_row, best_trial, of_arm, search_arms
from raydisp.config.search import Objective
from raydisp.results import Tables

CURVE_MEASURES = ("lm_loss", "dispersion_loss", "distillation_loss", "grad_norm", "val_loss")
"""Of `steps`, and the validation loss of `evals`."""

MAX_CURVES = 40
MAX_CURVE_POINTS = 100

CURVE_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("arm", pa.string()),
        ("kind", pa.string()),  # baseline | best | pruned | other
        ("measure", pa.string()),  # one of CURVE_MEASURES
        ("num_tokens", pa.int64()),
        ("value", pa.float64()),
    ]
)

TIME_LINE_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("arm", pa.string()),
        ("status", pa.string()),
        ("hostname", pa.string()),
        ("lane", pa.int32()),  # of the host, from 0: attempts of one lane do not overlap
        ("start_s", pa.float64()),  # since the first start of the study
        ("end_s", pa.float64()),
    ]
)


def learning_curves(tables: Tables, objective: Objective) -> pa.Table:
    """Learning curves of the search (CURVE_SCHEMA): at most MAX_CURVES trials, MAX_CURVE_POINTS points.

    The baseline and each arm's best are among them, the others evenly chosen by their numbers. A curve of the
    steps has the means over equal numbers of steps, at the tokens of the last of them; one of the evaluations
    has those on the validation split, after training began.
    """
    kinds = _chosen(tables.trials, objective)
    arms = dict(zip(tables.trials["trial"].to_pylist(), tables.trials["arm"].to_pylist(), strict=True))
    parts: list[pa.Table] = []
    steps = _of_trials(tables.steps, list(kinds))
    evals = _of_trials(tables.evals, list(kinds))
    for trial, kind in kinds.items():
        for measure in CURVE_MEASURES:
            if measure == "val_loss":
                tokens, values = _evaluations(evals, trial)
            else:
                tokens, values = _of_steps(steps, trial, measure)
            if len(values):
                columns = {
                    "trial": pa.array([trial] * len(values), pa.int32()),
                    "arm": pa.array([arms[trial]] * len(values), pa.string()),
                    "kind": pa.array([kind] * len(values), pa.string()),
                    "measure": pa.array([measure] * len(values), pa.string()),
                    "num_tokens": pa.array(tokens, pa.int64()),
                    "value": pa.array(values, pa.float64()),
                }
                parts.append(pa.table(columns, schema=CURVE_SCHEMA))
    return pa.concat_tables(parts) if parts else CURVE_SCHEMA.empty_table()


def _chosen(trials: pa.Table, objective: Objective) -> dict[int, str]:
    """Trial -> kind, of the search trials whose curves are drawn."""
    rows = trials.filter(pc.equal(trials["phase"], "search")).select(["trial", "arm", "status"]).to_pylist()
    best = [best_trial(of_arm(trials, arm), objective) for arm in search_arms(trials)]
    bests = {row["trial"] for row in best if row is not None}
    baseline = baseline_row(trials, objective)

    def kind(row: Row) -> str:
        if row["trial"] in bests:
            return "best"
        if baseline is not None and row["trial"] == baseline["trial"]:
            return "baseline"
        return "pruned" if row["status"] == "pruned" else "other"

    kinds = {row["trial"]: kind(row) for row in rows}
    first = [trial for trial, of in kinds.items() if of in ("baseline", "best")][:MAX_CURVES]
    rest = [trial for trial, of in kinds.items() if of in ("pruned", "other")]
    room = MAX_CURVES - len(first)
    if len(rest) > room:
        rest = [rest[len(rest) * i // room] for i in range(room)]
    return {trial: kinds[trial] for trial in sorted([*first, *rest])}


def _of_trials(table: pa.Table, trials: Sequence[int]) -> pa.Table:
    if table.num_rows == 0:
        return table
    return table.filter(pc.is_in(table["trial"], pa.array(trials, pa.int32())))


def _of_steps(steps: pa.Table, trial: int, measure: str) -> tuple[Sequence[int], Sequence[float]]:
    if steps.num_rows == 0:
        return [], []
    rows = steps.filter(pc.equal(steps["trial"], trial)).sort_by("step")
    values = rows[measure].to_numpy(zero_copy_only=False).astype(np.float64)
    tokens = rows["num_tokens"].to_numpy()
    there = np.isfinite(values)
    return thin(tokens[there], values[there])


def thin(tokens: np.ndarray, values: np.ndarray) -> tuple[Sequence[int], Sequence[float]]:
    """Means over equal numbers of steps, so that at most MAX_CURVE_POINTS are left.

    Args:
        tokens, values: [steps], in the order of the steps.
    """
    if len(values) == 0:
        return [], []
    size = -(-len(values) // MAX_CURVE_POINTS)
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    means = np.add.reduceat(values, starts) / counts
    return tokens[starts + counts - 1].tolist(), means.tolist()


def _evaluations(evals: pa.Table, trial: int) -> tuple[Sequence[int], Sequence[float]]:
    if evals.num_rows == 0:
        return [], []
    rows = evals.filter(
        (pc.field("trial") == trial)
        & (pc.field("split") == "validation")
        & (pc.field("name") == "loss")
        & (pc.field("num_tokens") > 0)
        & pc.is_finite(pc.field("value"))
    ).sort_by("num_tokens")
    tokens, values = rows["num_tokens"].to_pylist(), rows["value"].to_pylist()
    if len(values) > MAX_CURVE_POINTS:
        kept = [
            len(values) - 1 - len(values) * i // MAX_CURVE_POINTS for i in reversed(range(MAX_CURVE_POINTS))
        ]
        tokens, values = [tokens[i] for i in kept], [values[i] for i in kept]
    return tokens, values


def time_line(attempts: pa.Table) -> pa.Table:
    """When each attempt that has ended ran, on which host, in which of its lanes (TIME_LINE_SCHEMA)."""
    names = ["trial", "attempt", "arm", "status", "hostname", "started_at", "ended_at"]
    rows = [row for row in attempts.select(names).to_pylist() if row["started_at"] and row["ended_at"]]
    rows.sort(key=lambda row: (row["started_at"], row["trial"]))
    lanes: dict[str, list[datetime.datetime]] = {}
    told = []
    for row in rows:
        host = row["hostname"] or "host not known"
        ends = lanes.setdefault(host, [])
        lane = next((i for i, end in enumerate(ends) if end <= row["started_at"]), len(ends))
        ends[lane : lane + 1] = [row["ended_at"]]
        start, end = (
            (row[name] - rows[0]["started_at"]).total_seconds() for name in ("started_at", "ended_at")
        )
        kept = {name: row[name] for name in ("trial", "attempt", "arm", "status")}
        told.append({**kept, "hostname": host, "lane": lane, "start_s": start, "end_s": end})
    return pa.Table.from_pylist(told, schema=TIME_LINE_SCHEMA)
