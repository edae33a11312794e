"""The pairs of runs that a plan asks for, and what became of them.

A pair is a run of an arm and a run of the baseline with the same seed: the same initial weights, the same
data in the same order, the same number of tokens. What is not that is no pair, and says why.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pyarrow as pa

from raydisp.confirm.frozen_plan import Plan, confirm_rows
from raydisp.errors import VerdictError
from raydisp.results.trial_list import number_ranges

Row = dict[str, Any]


SAME_WITHIN_A_PAIR = {
    "initial_weights_sha256": "with other initial weights",
    "first_batch_sha256": "with another first batch",
    "last_batch_sha256": "with another last batch",
}
"""Columns that two runs of a pair must agree in where both have them -> what it is where they do not."""
UNEQUAL_BUDGETS = "of unequal budgets"
NEVER_STARTED, INTERRUPTED = "never started", "interrupted"
OF_BASELINE = "baseline "
"""Before a problem that is the baseline's."""
_LARGE_TEXTS = {"config_json", "study_json", "confirm_json", "packages_json", "traceback"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A planned pair of runs, whatever became of them."""

    arm: str
    seed: int
    ours: Row | None
    """Row of the arm's run; None if it never started."""
    baseline: Row | None
    problem: str
    """Why this is no complete pair, in a few words; empty where it is one."""

    @property
    def is_outstanding(self) -> bool:
        """It may still become complete: what it lacks is a run that never started, or can be continued."""
        return self.problem.removeprefix(OF_BASELINE) in (NEVER_STARTED, INTERRUPTED)

    def values(self, metric: str) -> tuple[float, float]:
        """A metric of the arm's run and the baseline's; both NaN unless the pair is complete and has both."""
        if self.problem or self.ours is None or self.baseline is None:
            return math.nan, math.nan
        ours, theirs = value_of(self.ours, metric), value_of(self.baseline, metric)
        return (ours, theirs) if math.isfinite(ours - theirs) else (math.nan, math.nan)

    def difference(self, metric: str) -> float:
        """Arm minus baseline; NaN unless the pair is complete and both runs have the metric."""
        ours, theirs = self.values(metric)
        return ours - theirs


def value_of(row: Row, metric: str) -> float:
    """A metric of a run, `test_perplexity` from its `test_loss`; NaN where it has none."""
    if metric == "test_perplexity":
        loss = row.get("test_loss")
        return math.exp(loss) if loss is not None and loss < 700 else math.nan
    value = row.get(metric)
    return math.nan if value is None else float(value)


def pair_up(trials: pa.Table, plan: Plan) -> list[Pair]:
    """The planned pairs, arm by arm and in the order of the seeds.

    Raises:
        VerdictError: the runs are on different data, or two trials are the same run of the plan.
    """
    table = confirm_rows(trials)
    rows = table.select([name for name in table.column_names if name not in _LARGE_TEXTS]).to_pylist()
    _check_data(rows)
    runs: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["arm"], row["seed"])
        if key in runs:
            raise VerdictError(
                f"trials {runs[key]['trial']} and {row['trial']} are both the run of {key[0]} with seed "
                f"{key[1]}; a plan has each once, so one of them does not belong to this study"
            )
        runs[key] = row
    pairs = []
    for arm in plan.compared:
        for seed in plan.seeds:
            ours, theirs = runs.get((arm, seed)), runs.get((plan.baseline, seed))
            pairs.append(Pair(arm, seed, ours, theirs, _problem(ours, theirs, plan)))
    return pairs


def _check_data(rows: list[Row]) -> None:
    numbers: dict[str, list[int]] = {}
    for row in rows:
        if row["data_sha256"] is not None:
            numbers.setdefault(row["data_sha256"], []).append(row["trial"])
    if len(numbers) > 1:
        each = " and ".join(f"{sha[:12]} in trial {number_ranges(of)}" for sha, of in numbers.items())
        raise VerdictError(
            f"the confirm runs are on different data (data_sha256 is {each}), so their losses do not "
            "compare; run the study anew under another name"
        )


def _problem(ours: Row | None, theirs: Row | None, plan: Plan) -> str:
    """Why two runs are no complete pair; '' where they are one."""
    sides = (("", ours), (OF_BASELINE, theirs))
    if ours is None and theirs is None:
        return NEVER_STARTED
    # What has ended badly is told before what may still come.
    for who, row in sides:
        if row is not None and row["status"] not in ("completed", INTERRUPTED):
            return f"{who}{row['status']}"
    for who, row in sides:
        if row is None:
            return f"{who}{NEVER_STARTED}"
        if row["status"] != "completed":
            return f"{who}{row['status']}"
        if not math.isfinite(value_of(row, plan.primary_outcome)):
            return f"{who}without {plan.primary_outcome}"
    assert ours is not None
    assert theirs is not None
    if ours["num_tokens"] is None or ours["num_tokens"] != theirs["num_tokens"]:
        return UNEQUAL_BUDGETS
    for column, told in SAME_WITHIN_A_PAIR.items():
        if None not in (ours[column], theirs[column]) and ours[column] != theirs[column]:
            return told
    return ""
