"""Which trial comes next, and what becomes of one that has ended: for trials on Ray and simulated ones."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from raydisp import results
from raydisp.arms import Arm, Arms
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.search.agenda import Agenda, Row
from raydisp.search.budget import Budget
from raydisp.search.curves import Point, read_curves
from raydisp.search.optuna_study import OptunaStudy, copied_statuses
from raydisp.search.stopping import full_tokens
from raydisp.search.warm_start import read_warm_starts
from raydisp.trial.assignment import Assignment


@dataclasses.dataclass(frozen=True)
class Launch:
    """What all trials of one run of the command share."""

    study: StudyConfig
    study_dir: str
    cache_dir: str
    working_dir: str
    prepared: str
    model_revision: str | None
    code_version: str
    packages: dict[str, str]
    plan: Plan
    stop_rule: dict[str, str] | None = None
    """Name and namespace of the actor that stops trials; None: nobody does."""
    data_sha256: str | None = None
    """Of the study's data."""
    teacher_revision: str | None = None
    """Of `distillation.teacher`."""
    lease: str | None = None
    """Of the results folder; a trial that finds another one there stops."""
    code_sha256: str | None = None
    """Of the code, which all nodes must have; None: it is not looked at."""
    task_folders: tuple[str, ...] = ()
    """Of lm-evaluation-harness's own tasks, where those of the study are."""

    def assign(
        self,
        trial: int,
        attempt: int,
        arm: str,
        values: Mapping[str, Any],
        *,
        stops: bool = True,
        confirm_json: str | None = None,
        keep_model: bool = False,
    ) -> Assignment:
        """The assignment of one attempt.

        Args:
            stops: whether the scheduler may stop it.
            confirm_json: of a trial of the confirm phase: the frozen plan.
            keep_model: whether its weights are kept at its end.
        """
        return Assignment(
            study=self.study.model_dump(mode="json"),
            study_dir=self.study_dir,
            cache_dir=self.cache_dir,
            working_dir=self.working_dir,
            trial=trial,
            attempt=attempt,
            phase="search" if confirm_json is None else "confirm",
            arm=arm,
            values=dict(values),
            gpus_per_worker=self.plan.gpus_per_worker,
            prepared=self.prepared,
            model_revision=self.model_revision,
            code_version=self.code_version,
            packages=self.packages,
            stop_rule=self.stop_rule if stops else None,
            data_sha256=self.data_sha256,
            teacher_revision=self.teacher_revision,
            lease=self.lease,
            confirm_json=confirm_json,
            keep_model=keep_model,
            code_sha256=self.code_sha256,
            task_folders=self.task_folders,
        )


class Dispatcher:
    """Hands out the search's assignments: arms that are one trial, trials that were interrupted, then what
    the samplers suggest."""

    def __init__(
        self,
        launch: Launch,
        agenda: Agenda,
        optuna_study: OptunaStudy,
        *,
        curves: Mapping[int, Sequence[Point]] | None = None,
        on_finished: Callable[[Row], None] | None = None,
        now: Callable[[], datetime.datetime] = results.now,
    ) -> None:
        """Tell the sampler and the budget what earlier runs have done.

        Args:
            curves: trial -> its evaluations so far.
            on_finished: called with the row of each trial that ends for good.
            now: the time, which a simulation makes up.
        """
        self._launch = launch
        self._optuna = optuna_study
        self._on_finished = on_finished or (lambda row: None)
        self._now = now
        self._full_tokens = full_tokens(launch.study)
        self._arms = Arms(launch.study)
        self.running: dict[int, Assignment] = {}
        self.over: str | None = None
        """Why no further trial starts, where that is not the number of trials."""
        self._again: collections.deque[Assignment] = collections.deque()
        self._budget = Budget(launch.study)
        self._rebuild(agenda, curves or {})
        self._opened = collections.deque(self._open(agenda))
        self._new = collections.deque(agenda.new)

    def _rebuild(self, agenda: Agenda, curves: Mapping[int, Sequence[Point]]) -> None:
        open_trials = {row["trial"] for row in agenda.resumed}
        for row in sorted([*agenda.finished, *agenda.resumed], key=lambda row: row["trial"]):
            if not self._arms.of(row["trial"]).searched:
                continue
            if row["trial"] not in open_trials:
                self._optuna.add_finished(row, curves.get(row["trial"], ()))
            else:
                self._optuna.resume(row["trial"], self._optuna.searched_values(row))
                for num_tokens, metrics in curves.get(row["trial"], ()):
                    self._optuna.report(row["trial"], num_tokens, metrics)
        earliest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        for row in sorted(agenda.finished, key=lambda row: row["ended_at"] or earliest):
            self._budget.add(row, num_tokens=_last_tokens(curves.get(row["trial"], ())))
        for row in [*agenda.earlier_attempts, *agenda.resumed]:
            timed = self._launch.study.search.max_hours is not None
            self._budget.add_time(_cut_off(self._launch.study_dir, row) if timed else row)

    def _open(self, agenda: Agenda) -> Iterator[Assignment]:
        for trial in agenda.fixed:
            yield self._assign(trial, 1, {})
        for row in agenda.resumed:
            searched = self._arms.of(row["trial"]).searched
            yield self._assign(
                row["trial"], row["attempt"] + 1, self._optuna.searched_values(row) if searched else {}
            )

    def _assign(self, trial: int, attempt: int, searched: Mapping[str, Any]) -> Assignment:
        arm: Arm = self._arms.of(trial)
        return self._launch.assign(trial, attempt, arm.name, {**arm.fixed, **searched}, stops=arm.searched)

    def next(self) -> Assignment | None:
        """The next assignment; None: none now, and none at all once nothing is running."""
        assignment = self._again.popleft() if self._again else None
        if assignment is None and (self._opened or self._new):
            failure = self._budget.failure()
            if failure is None:
                assignment = self._opened.popleft() if self._opened else self._suggest()
            elif not self.running:
                self.over = failure
        if assignment is not None:
            self._budget.begin(self._now())
            self.running[assignment.trial] = assignment
        return assignment

    def _suggest(self) -> Assignment | None:
        if not self._new:
            return None
        reason = self._budget.over(len(self.running), self._now())
        if reason is not None:
            # Trials that run may still leave something: one that is stopped early uses less than it might.
            self.over = None if self.running else reason
            return None
        trial = self._new.popleft()
        return self._assign(trial, 1, self._optuna.suggest(trial))

    def reported(self, trial: int, metrics: Mapping[str, Any]) -> None:
        """A trial that runs has evaluated; its curve is what lies between its first step and its end."""
        if 0 < metrics["num_tokens"] < self._full_tokens:
            self._optuna.report(trial, metrics["num_tokens"], metrics)

    def put_back(self, assignment: Assignment, attempt: int) -> None:
        """A trial goes on with another attempt."""
        self.running.pop(assignment.trial, None)
        self._again.append(dataclasses.replace(assignment, attempt=attempt))

    def leave(self, trial: int) -> None:
        """A trial goes on with the next run of the command."""
        self.running.pop(trial, None)

    def close(self, row: Row, curve: Sequence[Point] = ()) -> None:
        """A trial has ended for good."""
        self.running.pop(row["trial"], None)
        self._budget.add(row, num_tokens=_last_tokens(curve))
        self._optuna.finish(row, curve)
        self._on_finished(row)


def refresh_optuna_copy(study: StudyConfig, study_dir: str, agenda: Agenda) -> None:
    """Make `optuna.db` of a study with nothing left to do anew, where it does not say what the rows do.

    A command that was killed after its last trial may have left it behind, or it was deleted.
    """
    arms = Arms(study)
    wanted = [row for row in agenda.finished if arms.of(row["trial"]).searched]
    if copied_statuses(study_dir) == {row["trial"]: row["status"] for row in wanted}:
        return
    curves = read_curves(results.read_table(study_dir, "evals"), before_tokens=full_tokens(study))
    with tempfile.TemporaryDirectory(prefix="raydisp-") as scratch:
        optuna_study = OptunaStudy(study, Path(scratch))
        for warm_start in read_warm_starts(study):
            warm_start.tell(optuna_study)
        for row in sorted(wanted, key=lambda row: row["trial"]):
            optuna_study.add_finished(row, curves.get(row["trial"], ()))
        optuna_study.close()
        optuna_study.try_snapshot(study_dir)


def _cut_off(study_dir: str, row: Row) -> Row:
    """A row with the time at which its attempt was cut off, as far as its steps tell."""
    if row["ended_at"] is not None or row["started_at"] is None:
        return row
    steps = results.read_table(study_dir, "steps", trial=row["trial"])
    took = steps.filter(pc.equal(steps["attempt"], row["attempt"]))["elapsed_s"]
    if len(took) == 0:
        return row
    seconds = pc.max(took).as_py() - pc.min(took).as_py()
    return {**row, "ended_at": row["started_at"] + datetime.timedelta(seconds=seconds)}


def _last_tokens(curve: Sequence[Point]) -> int | None:
    return curve[-1][0] if curve else None
