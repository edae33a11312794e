"""The runs of a confirm phase: what is left of them, and which comes next."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp import results, storage
from raydisp.config import StudyConfig
from raydisp.confirm.frozen_plan import FILE, Frozen, frozen_of_rows, read_frozen, write_frozen
from raydisp.confirm.planning import NothingToConfirmError, freeze, num_arms, num_seeds, refuse_changes
from raydisp.errors import OutputError
from raydisp.results.trial_list import number_ranges
from raydisp.search.agenda import Agenda, Row, make_agenda, read_rows, search_agenda

if TYPE_CHECKING:
    from raydisp.search.dispatch import Launch
    from raydisp.trial.assignment import Assignment


@dataclasses.dataclass(frozen=True)
class Work:
    """What is left of a study: of its search, and of its confirm phase once that is settled."""

    search: Agenda
    frozen: Frozen | None = None
    confirm: Agenda | None = None
    """None: not settled yet."""

    def num_trials(self, study: StudyConfig) -> int:
        """Trials to run now, those of a confirm phase that is yet to be settled included."""
        if study.confirm is None:
            return self.search.num_trials
        if self.confirm is not None:
            return self.confirm.num_trials
        m = num_arms(study)
        return self.search.num_trials + (m + 1) * num_seeds(study, m)


def read_work(study: StudyConfig, study_dir: str, *, retry_failed: bool = False) -> Work:
    """What the rows and the frozen plan say has been done, and what the study file still asks for.

    Args:
        retry_failed: trials that failed are open again.
    Raises:
        OutputError: rows are there that cannot be read, or the file asks for another plan than the frozen.
    """
    frozen, attempts = read_frozen(study_dir), read_rows(study_dir)
    # The rows are the truth: a file that was lost is written again as it was.
    of_rows = frozen_of_rows(attempts)
    if frozen is None and of_rows is None:
        return Work(search_agenda(study, attempts, retry_failed=retry_failed))
    if frozen is not None and of_rows is not None and frozen != of_rows:
        place = storage.join(study_dir, FILE)
        raise OutputError(
            f"{place} is not the plan that its runs carry; it does not change any more: remove the file, and "
            "it is made anew from them"
        )
    if frozen is None:
        assert of_rows is not None
        frozen = of_rows
        write_frozen(study_dir, frozen)
    refuse_changes(study, frozen, study_dir)
    over = dataclasses.replace(search_agenda(study, attempts), resumed=[], fixed=[], new=[])
    return Work(over, frozen, confirm_agenda(frozen, attempts, retry_failed=retry_failed))


def settle(study: StudyConfig, study_dir: str) -> Work:
    """Freeze the plan, now that the search is over and its runs can start. Raises as `freeze`."""
    attempts = read_rows(study_dir)
    unended = [row["trial"] for row in search_agenda(study, attempts).resumed]
    if unended:
        raise NothingToConfirmError(
            f"trial {number_ranges(unended)} of the search has not ended; the same command goes on with it"
        )
    frozen = freeze(study, results.latest_attempts(attempts))
    write_frozen(study_dir, frozen)
    return read_work(study, study_dir)


def confirm_agenda(frozen: Frozen, attempts: pa.Table, *, retry_failed: bool = False) -> Agenda:
    """What is left to do of the phase, by the rows of all attempts."""
    return make_agenda(
        attempts.filter(pc.equal(attempts["phase"], "confirm")),
        fixed=list(frozen.trials()),
        wanted=[],
        retry_failed=retry_failed,
    )


class ConfirmDispatcher:
    """Hands out the runs of the phase: those that were interrupted, then seed by seed."""

    def __init__(
        self,
        launch: Launch,
        frozen: Frozen,
        agenda: Agenda,
        *,
        on_finished: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """Args: on_finished: called with the row of each run that ends for good."""
        self._launch = launch
        self._frozen = frozen
        self._pairs = frozen.trials()
        self._text = frozen.to_json()
        self._on_finished = on_finished
        self.running: dict[int, Assignment] = {}
        self.over: str | None = None
        """Why no further run starts, where that is not their number."""
        self._waiting = collections.deque(
            [self._assign(row["trial"], row["attempt"] + 1) for row in agenda.resumed]
            + [self._assign(trial, 1) for trial in agenda.fixed]
        )
        self._failed = [row for row in agenda.finished if row["status"] == "failed"]

    def _assign(self, trial: int, attempt: int) -> Assignment:
        arm, seed = self._pairs[trial]
        return self._launch.assign(
            trial,
            attempt,
            arm,
            {**self._frozen.arms[arm].values, "seed": seed},
            stops=False,
            confirm_json=self._text,
            keep_model=self._frozen.keeps_model(seed),
        )

    def next(self) -> Assignment | None:
        """The next assignment; None: none now, and none at all once nothing is running."""
        if not self._waiting:
            return None
        limit = self._launch.study.failures.max_failed_trials
        if limit is not None and len(self._failed) > limit:
            message = " ".join((self._failed[0]["error_message"] or "").split())[:300]
            self.over = (
                f"{len(self._failed)} confirm runs failed, more than failures.max_failed_trials = {limit}; "
                f"the first was trial {self._failed[0]['trial']}: {message}. Mend that and run the command "
                "with --retry-failed"
            )
            return None
        assignment = self._waiting.popleft()
        self.running[assignment.trial] = assignment
        return assignment

    def reported(self, trial: int, metrics: Mapping[str, Any]) -> None:
        """Nobody decides by what a run shows on the way."""

    def put_back(self, assignment: Assignment, attempt: int) -> None:
        """A run goes on with another attempt."""
        self.running.pop(assignment.trial, None)
        self._waiting.appendleft(dataclasses.replace(assignment, attempt=attempt))

    def leave(self, trial: int) -> None:
        """A run goes on with the next run of the command."""
        self.running.pop(trial, None)

    def close(self, row: Row, curve: Sequence[Any] = ()) -> None:
        """A run has ended for good."""
        self.running.pop(row["trial"], None)
        if row["status"] == "failed":
            self._failed.append(row)
        self._on_finished(row)
