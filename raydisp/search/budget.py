"""When a search is over before its number of trials: tokens, hours, no improvement, too many failures.

All of it is worked out from rows, so that the same command goes on counting where it was.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from raydisp.arms import Arms
from raydisp.config import StudyConfig
from raydisp.config.search import Objective
from raydisp.search.stopping import full_tokens

Row = Mapping[str, Any]


class Budget:
    """What a study has used, and whether it may start another trial."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._search = study.search
        self._arms = Arms(study)
        self._tokens: dict[int, int] = {}
        self._intervals: list[tuple[datetime.datetime, datetime.datetime]] = []
        self._began: datetime.datetime | None = None
        self._failed: list[Row] = []
        self._best: float | None = None
        self._since_best = 0

    def begin(self, now: datetime.datetime) -> None:
        """A run of the command starts its first trial."""
        self._began = self._began or now

    def add(self, row: Row, *, num_tokens: int | None = None) -> None:
        """Take a trial that has ended for good, in the order in which trials ended.

        Args:
            num_tokens: what it has seen, where its row does not tell.
        """
        tokens = row.get("num_tokens") if row.get("num_tokens") is not None else num_tokens
        self._tokens[row["trial"]] = tokens or 0
        self.add_time(row)
        if row["status"] == "failed":
            self._failed.append(row)
        rule = self._search.stop_when
        if rule is None or not self._arms.of(row["trial"]).searched or row["status"] != "completed":
            return
        value = row.get(self._counted.metric)
        if value is None or not math.isfinite(value):
            return
        gained = -value if self._counted.mode == "min" else value
        if self._best is None or gained > self._best + rule.min_improvement:
            self._best, self._since_best = gained, 0
        else:
            self._since_best += 1

    def add_time(self, row: Row) -> None:
        """Count the time of an attempt, whatever became of it."""
        if row.get("started_at") is not None and row.get("ended_at") is not None:
            self._intervals.append((row["started_at"], row["ended_at"]))

    @property
    def _counted(self) -> Objective:
        rule = self._search.stop_when
        named = [
            objective for objective in self._search.objectives if rule and objective.metric == rule.metric
        ]
        return named[0] if named else self._search.primary

    def hours(self, now: datetime.datetime) -> float:
        """Hours in which at least one trial ran, over all runs of the command."""
        seconds, end = 0.0, None
        current = [(self._began, now)] if self._began is not None else []
        for start, stop in sorted([*self._intervals, *current]):
            start = start if end is None else max(start, end)
            if stop > start:
                seconds += (stop - start).total_seconds()
            end = stop if end is None else max(end, stop)
        return seconds / 3600

    @property
    def tokens(self) -> int:
        """Training tokens of the trials that have ended."""
        return sum(self._tokens.values())

    def failure(self) -> str | None:
        """Why the study is stopped for its failures, with the first of them; None: it goes on."""
        limit = self._study.failures.max_failed_trials
        if limit is None or len(self._failed) <= limit:
            return None
        first = self._failed[0]
        message = " ".join((first["error_message"] or "").split())[:300]
        return (
            f"{len(self._failed)} trials failed, more than failures.max_failed_trials = {limit}; the first "
            f"was trial {first['trial']}: {message}. Mend that and run the command with --retry-failed, or "
            "raise the limit"
        )

    def over(self, running: int, now: datetime.datetime) -> str | None:
        """Why no further trial may start; None: one may.

        Args:
            running: trials that have started and not ended: each will see a full budget at most.
        """
        search, full = self._search, full_tokens(self._study)
        limit = search.max_tokens_total
        if limit is not None and self.tokens + (running + 1) * full > limit:
            return (
                f"search.max_tokens_total = {limit:,}: {self.tokens:,} tokens are used"
                + (f", {running * full:,} go to trials that run" if running else "")
                + f", and one more trial takes {full:,}"
            )
        if search.max_hours is not None and self.hours(now) >= search.max_hours:
            return f"search.max_hours = {search.max_hours:g}: trials ran for {self.hours(now):.2f} hours"
        rule = search.stop_when
        if rule is not None and self._since_best >= rule.no_improvement_trials:
            least = f" by more than {rule.min_improvement:g}" if rule.min_improvement else ""
            return (
                f"search.stop_when: the best {self._counted.metric} did not improve{least} in the last "
                f"{self._since_best} completed trials"
            )
        return self.failure()
