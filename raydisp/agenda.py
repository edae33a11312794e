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
    resumed: list[Row]
    """Latest rows of trials that were interrupted."""
    needs_baseline: bool
    new: list[int]
    """Numbers of search trials that have no row yet."""

    @property
    def num_trials(self) -> int:
        """Trials to run now."""
        return len(self.resumed) + int(self.needs_baseline) + len(self.new)


def read_agenda(study: StudyConfig, study_dir: str) -> Agenda:
    """What the rows say has been done, and what `search.num_trials` still asks for."""
    rows = results.latest_attempts(results.read_table(study_dir, "trials")).to_pylist()
    known = {row["trial"] for row in rows}
    wanted = range(1, study.search.num_trials + 1)
    return Agenda(
        finished=[row for row in rows if row["status"] != "interrupted"],
        resumed=[row for row in rows if row["status"] == "interrupted"],
        needs_baseline=BASELINE not in known,
        new=[trial for trial in wanted if trial not in known],
    )
