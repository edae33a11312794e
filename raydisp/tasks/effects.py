"""What arms do to benchmarks: rows of the confirm phase in, a table and sentences out.

Everything here describes and nothing is tested: one outcome was chosen beforehand to decide. Two errors are
told apart. Over seeds: how the difference varies from training to training, on these items (paired t
interval). Over items: how it would vary with other items of the same kind, for these trainings; paired item
by item, since what is hard for both models says nothing of their difference (`scores`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydisp import paired, results, storage
from raydisp.confirm.frozen_plan import read_plan
from raydisp.results.columns import Column, Columns, make_schema
from raydisp.tasks import scores as task_scores
from raydisp.verdict.pairs import Pair, pair_up

Row = dict[str, Any]
Key = tuple[str, str]
"""Benchmark and metric."""

SPLIT = "tasks"
"""Of their values in `evals`."""

BENCHMARK_COLUMNS: Columns = {
    "arm": Column(pa.string(), "name of the arm"),
    "benchmark": Column(pa.string(), "a task of the harness, or a group"),
    "metric": Column(pa.string(), "of the harness"),
    "higher_is_better": Column(pa.bool_(), "of the metric; null where the harness does not say"),
    "arm_mean": Column(pa.float64(), "over the pairs that have the benchmark on both sides", "the metric's"),
    "baseline_mean": Column(pa.float64(), "of the baseline in the same pairs", "the metric's"),
    "difference": Column(pa.float64(), "arm minus baseline, mean over the pairs", "the metric's"),
    "low_95": Column(
        pa.float64(),
        "paired t interval over seeds, not adjusted; null with fewer than 2 pairs",
        "the metric's",
    ),
    "high_95": Column(pa.float64(), "upper end of the same", "the metric's"),
    "items_stderr": Column(
        pa.float64(),
        "standard error of the difference over items, paired item by item and averaged over the pairs; null "
        "where two runs of a pair had other items, or the metric is no mean of its items' scores",
        "the metric's",
    ),
    "num_items": Column(pa.int64(), "that all runs had"),
    "num_pairs": Column(pa.int32(), "that have the benchmark on both sides"),
}

BENCHMARK_SCHEMA = make_schema(BENCHMARK_COLUMNS)


def benchmarks(trials: pa.Table, evals: pa.Table, items: pa.Table) -> pa.Table:
    """One row per arm of the frozen plan and benchmark (BENCHMARK_SCHEMA); no row without benchmarks.

    Args:
        trials, evals: tables of a study.
        items: those of its confirm phase, of each run's end, as `results.read_final_items` has them.
    Raises:
        VerdictError: there is no confirm phase, or its rows do not belong together.
    """
    plan = read_plan(trials)
    if items.num_rows == 0:
        return BENCHMARK_SCHEMA.empty_table()
    named = _named(items)
    ends = {row["trial"]: row["num_steps"] for row in trials.select(["trial", "num_steps"]).to_pylist()}
    values = _values(evals, ends)
    pairs = [pair for pair in pair_up(trials, plan) if not pair.problem]
    influences = {
        (trial, key): _influences(items, trial, key, values.get((trial, key)))
        for trial in {row["trial"] for pair in pairs for row in (pair.ours, pair.baseline) if row is not None}
        for key in named
    }
    rows = [
        _row(arm, key, direction, [pair for pair in pairs if pair.arm == arm], values, influences)
        for arm in plan.compared
        for key, direction in named.items()
    ]
    return pa.Table.from_pylist([row for row in rows if row["num_pairs"]], schema=BENCHMARK_SCHEMA)


def _named(items: pa.Table) -> dict[Key, bool | None]:
    """Benchmark and metric -> whether higher is better, in the order of the rows."""
    columns = ["benchmark", "metric", "higher_is_better"]
    first = items.group_by(columns, use_threads=False).aggregate([])
    return {(row["benchmark"], row["metric"]): row["higher_is_better"] for row in first.to_pylist()}


def _values(evals: pa.Table, ends: Mapping[int, int | None]) -> dict[tuple[int, Key], float]:
    """Trial and benchmark -> its value at the trial's end."""
    table = evals.filter(pc.equal(evals["split"], SPLIT)).select(["trial", "step", "name", "value"])
    found = {}
    for row in table.to_pylist():
        if row["value"] is not None and row["step"] == ends.get(row["trial"]):
            benchmark, _, metric = row["name"].rpartition("/")
            found[row["trial"], (benchmark, metric)] = row["value"]
    return found


def _influences(items: pa.Table, trial: int, key: Key, value: float | None) -> dict[Any, float] | None:
    """What each item adds to a run's value; None where that is not known."""
    mine = items.filter(
        pc.and_(
            pc.equal(items["trial"], trial),
            pc.and_(pc.equal(items["benchmark"], key[0]), pc.equal(items["metric"], key[1])),
        )
    )
    if value is None or mine.num_rows == 0 or mine["value"].null_count or mine["weight"].null_count:
        return None
    columns = {name: mine[name].to_pylist() for name in ("task", "item", "content")}
    found = task_scores.influences(
        mine["value"].to_numpy(), mine["weight"].to_numpy(), value, strata=columns["task"]
    )
    if found is None:
        return None
    return dict(zip(zip(*columns.values(), strict=True), found.tolist(), strict=True))


def _row(
    arm: str,
    key: Key,
    higher_is_better: bool | None,
    pairs: Sequence[Pair],
    values: Mapping[tuple[int, Key], float],
    influences: Mapping[tuple[int, Key], dict[Any, float] | None],
) -> Row:
    trials = [(pair.ours["trial"], pair.baseline["trial"]) for pair in pairs if pair.ours and pair.baseline]
    both = [pair for pair in trials if all((trial, key) in values for trial in pair)]
    each = np.array([[values[trial, key] for trial in pair] for pair in both]).reshape(-1, 2)
    summary = paired.summarise((each[:, 0] - each[:, 1])[None, :])
    means = each.mean(axis=0).tolist() if len(each) else [None, None]
    stderr, num_items = _over_items([(influences[a, key], influences[b, key]) for a, b in both])
    row: Row = {
        "arm": arm,
        "benchmark": key[0],
        "metric": key[1],
        "higher_is_better": higher_is_better,
        "arm_mean": means[0],
        "baseline_mean": means[1],
        "difference": float(summary.mean[0]),
        "low_95": float(summary.low_95[0]),
        "high_95": float(summary.high_95[0]),
        "items_stderr": stderr,
        "num_items": num_items,
        "num_pairs": len(both),
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _over_items(
    pairs: Sequence[tuple[dict[Any, float] | None, dict[Any, float] | None]],
) -> tuple[float | None, int | None]:
    """Standard error over items of the mean difference, and their number.

    The items are the same in all runs, so that a hard one is hard for every seed: differences are averaged
    over the pairs first, item by item.
    """
    if not pairs or any(ours is None or theirs is None for ours, theirs in pairs):
        return None, None
    first = pairs[0][0]
    assert first is not None
    total = np.zeros(len(first))
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        if ours.keys() != first.keys() or theirs.keys() != first.keys():
            return None, None
        total += [ours[item] - theirs[item] for item in first]
    return task_scores.standard_error(total / len(pairs)), len(first)


def of_study(study_dir: str, trials: pa.Table, *, strict: bool = False) -> pa.Table:
    """The benchmarks of a results folder, read anew.

    Args:
        trials: the latest attempt of each trial.
        strict: as `results.read_table` has it.
    Raises:
        VerdictError: as `benchmarks` says.
        OutputError: as `strict` says.
    """
    items = results.read_final_items(study_dir, trials, strict=strict)
    if items.num_rows == 0:
        return benchmarks(trials, results.EVAL_SCHEMA.empty_table(), items)
    return benchmarks(trials, results.read_table(study_dir, "evals", strict=strict), items)


def write(study_dir: str, table: pa.Table) -> None:
    """Write `benchmarks/benchmarks.parquet` into a results folder, in place of an earlier one; nothing where
    there are no benchmarks.

    Raises:
        OutputError: the folder cannot be written.
    """
    if table.num_rows:
        results.write_table(storage.join(study_dir, "benchmarks", "benchmarks.parquet"), table)


# --- sentences ---------------------------------------------------------------------------------------------


def sentences(table: pa.Table) -> tuple[str, ...]:
    """What benchmarks say, arm by arm, after one sentence on how to read it; none where there are none.

    Args:
        table: what `benchmarks` made.
    """
    rows = table.to_pylist()
    if not rows:
        return ()
    told = [
        "Benchmarks, arm minus baseline, described and not tested: the interval is over seeds, the standard "
        "error over items, paired item by item."
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        told.append(f"{arm}: {'; '.join(_told(row) for row in rows if row['arm'] == arm)}.")
    return tuple(told)


def _told(row: Row) -> str:
    text = f"{row['benchmark']} ({row['metric']}{direction(row)}) {row['difference']:+.4g}"
    parts = []
    if row["low_95"] is not None:
        parts.append(f"95 % interval {row['low_95']:+.4g} to {row['high_95']:+.4g}")
    parts.append(f"n = {row['num_pairs']}")
    if row["items_stderr"] is not None:
        parts.append(f"standard error {row['items_stderr']:.2g} over {row['num_items']:,} items")
    return f"{text} ({', '.join(parts)})"


def direction(row: Row) -> str:
    """`, lower is better`, where it is; higher is what people expect."""
    return ", lower is better" if row["higher_is_better"] is False else ""
