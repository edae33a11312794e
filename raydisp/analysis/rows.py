"""Rows of `trials` by what they are: the search, the baseline, the best; and which values compare."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp.config.search import Objective
from raydisp.results import STATUSES, TRIAL_COLUMNS

Row = dict[str, Any]
"""One row of `trials`: column name -> Python value, None where it is null."""

LARGE_TEXTS = ("study_json", "packages_json", "traceback")


def searched_fields(trials: pa.Table) -> list[str]:
    """Dotted names of the fields that the study searches, in the order of its file."""
    return [name for name in trials.column_names if name not in TRIAL_COLUMNS]


def search_trials(trials: pa.Table) -> pa.Table:
    """The rows that the search suggested, whatever became of them; the baseline is not among them."""
    in_search = pc.equal(trials["phase"], "search")
    return trials.filter(pc.and_(in_search, pc.not_equal(trials["arm"], "baseline")))


def baseline_row(trials: pa.Table, objective: Objective) -> Row | None:
    """The baseline's row of the search phase, the best where it is searched too; one without a value, of any
    status, where none has one; None where there is none yet."""
    in_search = pc.equal(trials["phase"], "search")
    rows = trials.filter(pc.and_(in_search, pc.equal(trials["arm"], "baseline"))).to_pylist()
    sign = 1.0 if objective.mode == "min" else -1.0
    valued = [(sign * value, row) for row in rows if (value := value_of(row, objective.metric)) is not None]
    return min(valued, key=lambda pair: pair[0])[1] if valued else next(iter(rows), None)


def search_arms(trials: pa.Table) -> list[str]:
    """Names of the arms of the search but the baseline, in the order of their first trials."""
    return list(dict.fromkeys(search_trials(trials).sort_by("trial")["arm"].to_pylist()))


def of_arm(trials: pa.Table, arm: str) -> pa.Table:
    """The rows of one arm and of the baseline."""
    return trials.filter(pc.is_in(trials["arm"], pa.array([arm, "baseline"], pa.string())))


def value_of(row: Row | None, metric: str) -> float | None:
    """A metric of a completed trial; None where it is missing, not finite, or the trial did not complete."""
    if row is None or row["status"] != "completed":
        return None
    value = row.get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def same_budget(row: Row, other: Row) -> bool:
    """Whether two trials saw the same number of tokens; only then do their values compare."""
    return row["num_tokens"] is not None and bool(row["num_tokens"] == other["num_tokens"])


def count_statuses(trials: pa.Table) -> dict[str, int]:
    """Status -> number of rows, in the order of `results.STATUSES`; statuses without a row are left out."""
    counts = Counter(trials["status"].to_pylist())
    known = {status: counts.pop(status) for status in STATUSES if status in counts}
    return known | {str(status): number for status, number in counts.items()}


def best_trial(trials: pa.Table, objective: Objective) -> Row | None:
    """The completed search trial with the best objective at the most tokens; the first of equals; None where
    there is none."""
    pairs = scored(trials, objective)
    if not pairs:
        return None
    return min(pairs, key=lambda item: item[1] if objective.mode == "min" else -item[1])[0]


def scored(trials: pa.Table, objective: Objective) -> list[tuple[Row, float]]:
    """The completed search trials that compare with each other, by trial number, with their values.

    Only trials of the same number of tokens compare: those of the most tokens, where they differ.
    """
    rows = search_trials(trials).sort_by("trial").to_pylist()
    pairs = [(row, value) for row in rows if (value := value_of(row, objective.metric)) is not None]
    most = max((_tokens(row) for row, _ in pairs), default=0)
    return [(row, value) for row, value in pairs if _tokens(row) == most]


def compared_tokens(trials: pa.Table, objective: Objective) -> int | None:
    """The number of tokens at which values of a study are compared; None where no trial has a value."""
    pairs = scored(trials, objective)
    if pairs:
        number: int | None = pairs[0][0]["num_tokens"]
        return number
    baseline = baseline_row(trials, objective)
    return (
        None if baseline is None or value_of(baseline, objective.metric) is None else baseline["num_tokens"]
    )


def compared_baseline(trials: pa.Table, objective: Objective) -> float | None:
    """The baseline's value where the search's compare with it; None where it saw other tokens or has none."""
    baseline = baseline_row(trials, objective)
    if baseline is None or baseline["num_tokens"] != compared_tokens(trials, objective):
        return None
    return value_of(baseline, objective.metric)


def _tokens(row: Row) -> int:
    return -1 if row["num_tokens"] is None else int(row["num_tokens"])


def trial_field(row: Row, name: str) -> Any:
    """A field of a trial by its dotted name, searched or not; None where the row does not tell."""
    if row.get(name) is not None:
        return row[name]
    try:
        node = json.loads(row.get("config_json") or "null")
    except ValueError:
        return None
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def number(value: object) -> float | None:
    """A number as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def without_large_texts(trials: pa.Table) -> pa.Table:
    """The rows without the texts that no figure needs, which would be read anew for each."""
    return trials.drop_columns([name for name in LARGE_TEXTS if name in trials.column_names])
