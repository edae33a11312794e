"""What is left to do of a study, by its rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from raydisp import results
from raydisp.config import StudyConfig

BASELINE = 0
"""Number of the baseline trial; search trials count from 1."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What is left to do of a study, by its rows."""

    finished: list[Row]
    """Latest rows of trials that have ended for good."""
    resumed: list[Row]
    """Latest rows of trials that were interrupted, and of failed ones that are to be tried again."""
    needs_baseline: bool
    new: list[int]
    """Numbers of search trials that have no row yet."""
    earlier_attempts: list[Row] = dataclasses.field(default_factory=list)
    """Rows of attempts that another one followed."""

    @property
    def num_trials(self) -> int:
        """Trials to run now."""
        return len(self.resumed) + int(self.needs_baseline) + len(self.new)


def read_agenda(study: StudyConfig, study_dir: str, *, retry_failed: bool = False) -> Agenda:
    """What the rows say has been done, and what `search.num_trials` still asks for.

    Args:
        retry_failed: trials that failed are open again.
    Raises:
        OutputError: rows are there that cannot be read.
    """
    # Strictly: what cannot be read may have finished, and would else be run again.
    attempts = results.read_table(study_dir, "trials", strict=True)
    rows = results.latest_attempts(attempts).to_pylist()
    latest = {row["trial"]: row["attempt"] for row in rows}
    open_statuses = ("interrupted", "failed") if retry_failed else ("interrupted",)
    wanted = range(1, study.search.num_trials + 1)
    return Agenda(
        finished=[row for row in rows if row["status"] not in open_statuses],
        resumed=[row for row in rows if row["status"] in open_statuses],
        needs_baseline=BASELINE not in latest,
        new=[trial for trial in wanted if trial not in latest],
        earlier_attempts=[row for row in attempts.to_pylist() if row["attempt"] < latest[row["trial"]]],
    )
