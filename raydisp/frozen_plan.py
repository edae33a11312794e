"""The plan of a confirm phase as its rows carry it, and the pairs of runs that it asks for.

Every row of the phase has the same plan in `confirm_json`, frozen before the first run. A pair is a run of an
arm and a run of the baseline with the same seed: the same initial weights, the same data in the same order,
the same number of tokens. What is not that is no pair, and says why.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp.errors import VerdictError
from raydisp.results import TRIAL_COLUMNS, latest_attempts
from raydisp.trial_list import number_ranges

Row = dict[str, Any]

PLAN_VERSION = 1
CONFIRM = "confirm"

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
class Plan:
    """What was frozen before the runs, as far as a verdict needs it."""

    primary_outcome: str
    """A numeric column of `trials`; lower is better."""
    unit: str
    baseline: str
    """Name of the arm that the others are compared with."""
    arms: Mapping[str, Mapping[str, Any]]
    """The others by name, in the plan's order."""
    seeds: tuple[int, ...]
    smallest_effect: float
    alpha: float
    pretrained: bool
    """The model was not trained from scratch: its initial weights do not depend on the seed."""


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


def confirm_rows(trials: pa.Table) -> pa.Table:
    """The rows of the confirm phase, the latest attempt of each trial."""
    return latest_attempts(trials.filter(pc.equal(trials["phase"], CONFIRM)))


def read_plan(trials: pa.Table) -> Plan:
    """The plan that the confirm rows of a study carry.

    Raises:
        VerdictError: there are no such rows, they carry no plan or several, or it is not one of ours.
    """
    rows = confirm_rows(trials)
    if rows.num_rows == 0:
        raise VerdictError(
            "there is no run of a confirm phase among these trials; a study has one where its file has a "
            "section `confirm`"
        )
    numbers: dict[str | None, list[int]] = {}
    for row in rows.select(["trial", "confirm_json"]).to_pylist():
        numbers.setdefault(row["confirm_json"], []).append(row["trial"])
    if None in numbers:
        raise VerdictError(
            f"confirm_json is null in trial {number_ranges(numbers[None])}: without the plan that was frozen "
            "before the runs there is nothing to judge them by"
        )
    if len(numbers) > 1:
        each = " and ".join(f"trials {number_ranges(of_plan)}" for of_plan in numbers.values())
        raise VerdictError(
            f"confirm_json differs between {each}: runs of different plans are not judged together"
        )
    return parse_plan(str(next(iter(numbers))))


def parse_plan(text: str) -> Plan:
    """A plan from its JSON.

    Raises:
        VerdictError: it is not one, or of a newer raydisp.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise VerdictError(f"confirm_json is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise VerdictError(f"confirm_json must be an object, not {tree!r:.60}")
    version = tree.get("schema_version")
    if isinstance(version, int) and version > PLAN_VERSION:
        raise VerdictError(
            f"confirm_json was written by a newer raydisp (schema_version {version}, this one knows "
            f"{PLAN_VERSION}); update raydisp to read it"
        )

    def take(name: str, holds: bool, rule: str) -> Any:
        if not holds:
            raise VerdictError(f"confirm_json: {name} = {tree.get(name)!r:.60} must be {rule}")
        return tree[name]

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    outcome: Any = tree.get("primary_outcome")
    arms: Any = tree.get("arms")
    seeds: Any = tree.get("seeds")
    effect: Any = tree.get("smallest_effect")
    alpha: Any = tree.get("alpha")
    take("schema_version", version == PLAN_VERSION, str(PLAN_VERSION))
    kind = TRIAL_COLUMNS.get(outcome) if isinstance(outcome, str) else None
    take("primary_outcome", kind == pa.float64(), "a column of trials that holds numbers, such as test_loss")
    baseline = take("baseline", isinstance(tree.get("baseline"), str), "the name of an arm")
    holds_arms = isinstance(arms, dict) and all(isinstance(arm, dict) for arm in arms.values())
    take("arms", holds_arms and bool({*arms} - {baseline}), "an object of at least one arm by its name")
    holds_seeds = isinstance(seeds, list) and all(is_whole(seed) for seed in seeds)
    take("seeds", holds_seeds and 0 < len(seeds) == len(set(seeds)), "a list of distinct whole numbers")
    return Plan(
        primary_outcome=outcome,
        unit=take("unit", isinstance(tree.get("unit"), str), "text"),
        baseline=baseline,
        arms={name: arm for name, arm in arms.items() if name != baseline},
        seeds=tuple(seeds),
        smallest_effect=float(take("smallest_effect", is_number(effect) and effect > 0, "a number above 0")),
        alpha=float(take("alpha", is_number(alpha) and 0 < alpha < 1, "a number between 0 and 1")),
        pretrained=take("pretrained", isinstance(tree.get("pretrained"), bool), "true or false"),
    )


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
    for arm in plan.arms:
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
