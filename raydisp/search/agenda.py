"""What is left to do of a study's search, by its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp import results
from raydisp.arms import Arms
from raydisp.config import StudyConfig

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What is left to do of a study, by its rows."""

    finished: list[Row]
    """Latest rows of trials that have ended for good."""
    resumed: list[Row]
    """Latest rows of trials that were interrupted, and of failed ones that are to be tried again."""
    fixed: list[int]
    """Numbers of trials of arms with nothing to search, the baseline most often, that have no row yet."""
    new: list[int]
    """Numbers of search trials that have no row yet."""
    earlier_attempts: list[Row] = dataclasses.field(default_factory=list)
    """Rows of attempts that another one followed."""

    @property
    def num_trials(self) -> int:
        """Trials to run now."""
        return len(self.resumed) + len(self.fixed) + len(self.new)


def read_agenda(study: StudyConfig, study_dir: str, *, retry_failed: bool = False) -> Agenda:
    """What the rows say has been done, and what `search.num_trials` still asks for.

    Args:
        retry_failed: trials that failed are open again.
    Raises:
        OutputError: rows are there that cannot be read.
    """
    return search_agenda(study, read_rows(study_dir), retry_failed=retry_failed)


def read_rows(study_dir: str) -> pa.Table:
    """The rows of all attempts, for who decides by them what is left.

    Raises:
        OutputError: rows are there that cannot be read.
    """
    # Strictly: what cannot be read may have finished, and would else be run again.
    return results.read_table(study_dir, "trials", strict=True)


def search_agenda(study: StudyConfig, attempts: pa.Table, *, retry_failed: bool = False) -> Agenda:
    """As `read_agenda`, from the rows of all attempts."""
    arms = Arms(study)
    return make_agenda(
        attempts.filter(pc.not_equal(attempts["phase"], "confirm")),
        fixed=arms.fixed_trials,
        wanted=arms.search_trials,
        retry_failed=retry_failed,
    )


def make_agenda(
    attempts: pa.Table, *, fixed: Sequence[int], wanted: Sequence[int], retry_failed: bool
) -> Agenda:
    """What is left of trials with these numbers, by the rows of their attempts."""
    rows = results.latest_attempts(attempts).to_pylist()
    latest = {row["trial"]: row["attempt"] for row in rows}
    open_statuses = ("interrupted", "failed") if retry_failed else ("interrupted",)
    return Agenda(
        finished=[row for row in rows if row["status"] not in open_statuses],
        resumed=[row for row in rows if row["status"] in open_statuses],
        fixed=[trial for trial in fixed if trial not in latest],
        new=[trial for trial in wanted if trial not in latest],
        earlier_attempts=[row for row in attempts.to_pylist() if row["attempt"] < latest[row["trial"]]],
    )
