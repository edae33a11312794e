"""The search on Ray: Tune places the trials that the dispatcher hands out, and rows decide.

What a finished trial was worth is read from its row, so nothing that a process failed to report is lost, and
everything that the search knows can be made anew from rows at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydisp import results, storage
from raydisp.arms import Arms
from raydisp.cluster.autoscaler import ACCELERATOR
from raydisp.cluster.packing import Plan
from raydisp.cluster.placement import PlacementWatch, describe_offer
from raydisp.cluster.session import read_offer
from raydisp.config import StudyConfig, field_of
from raydisp.confirm.frozen_plan import Frozen
from raydisp.confirm.runs import ConfirmDispatcher
from raydisp.errors import OutputError, PreemptedError, UnfitProcessError
from raydisp.interrupts import stop_tune_on_interrupt
from raydisp.search import space
from raydisp.search.agenda import Agenda, Row
from raydisp.search.curves import Point, of_metric, read_curves
from raydisp.search.dispatch import Dispatcher, Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.search.stopping import StopRules, full_tokens
from raydisp.search.warm_start import WarmStart
from raydisp.storage import lease
from raydisp.tally import Watcher
from raydisp.trackers import told_at_end
from raydisp.trial import retries, tidy
from raydisp.trial.assignment import Assignment, Report, blank_row, checkpoint_dir
from raydisp.trial.attempts import run_trial

logger = logging.getLogger(__name__)

SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}

RunTrial = Callable[[Assignment, Report], Row]


class StudySearcher(Searcher):
    """Gives Tune the next assignment, and closes each trial by the row that it left."""

    def __init__(
        self,
        dispatcher: Dispatcher | ConfirmDispatcher,
        optuna_study: OptunaStudy | None,
        *,
        close_stop_rule: Callable[[int, str], None] = lambda trial, status: None,
        taken_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        optuna_study: None: there is none to keep a copy of.
        close_stop_rule: told of each trial that ends, with its status.
        taken_over: whether another command has the results folder now: nothing more is written.
        """
        super().__init__()
        self._dispatcher = dispatcher
        self._optuna = optuna_study
        self._close_stop_rule = close_stop_rule
        self.running: dict[str, Assignment] = {}
        self.taken_over = taken_over
        self.stopped = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next assignment as a dictionary; None: none as yet; or that there will be none."""
        if self.taken_over():
            return None if self.running else Searcher.FINISHED
        assignment = self._dispatcher.next()
        if assignment is None:
            # One that runs now may have to go on in another process, or leave something of the budget.
            return None if self.running else Searcher.FINISHED
        self.running[trial_id] = assignment
        return dataclasses.asdict(assignment)

    def reported(self, trial_id: str, result: Mapping[str, Any]) -> int | None:
        """A trial has evaluated; returns its number."""
        assignment = self.running.get(trial_id)
        if assignment is None or "step" not in result:
            return None
        self._dispatcher.reported(assignment.trial, result)
        if self._optuna is not None:
            self._optuna.try_snapshot(assignment.study_dir, now=False)
        return assignment.trial

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Close a trial by its row, or put it up again; a lost process gets a row that says so."""
        assignment = self.running.pop(trial_id, None)
        if assignment is None or self._is_taken_over(assignment):
            return
        try:
            attempts = results.read_attempts(
                assignment.study_dir, assignment.trial, through=assignment.attempt, strict=True
            )
        except OutputError as problem:  # rows that are there, and not to be read just now
            logger.error("%s; it is looked at again with the next run of the command", problem)
            self._dispatcher.leave(assignment.trial)
            return
        begun = attempts[-1] if attempts and attempts[-1]["attempt"] >= assignment.attempt else None
        if self.stopped and (begun is None or begun["status"] == "interrupted"):
            self._dispatcher.leave(assignment.trial)
            return  # goes on with the next run of the command
        row = begun
        if row is None or (row["status"] == "interrupted" and row["ended_at"] is None):
            row = lost_row(assignment, attempts, begun)
        if row["error_type"] == retries.NOT_PLACED and row["status"] == "interrupted" and not self.running:
            row = end_as_failed(assignment, row)  # nothing of the study has the place that it waits for
        if row["status"] == "interrupted":
            logger.warning("trial %d goes on elsewhere: %s", row["trial"], row["error_message"])
            self._dispatcher.put_back(assignment, row["attempt"] + 1)
            return
        self._dispatcher.close(row, _curve_of(assignment))
        self._close_stop_rule(row["trial"], row["status"])
        if self._optuna is not None:
            self._optuna.try_snapshot(assignment.study_dir)

    def _is_taken_over(self, assignment: Assignment) -> bool:
        """Whether the folder is another's: the heartbeat may not have told yet."""
        held = assignment.lease is None or lease.still_held(assignment.study_dir, assignment.lease)
        return self.taken_over() or not held

    def stop(self) -> None:
        """The user has stopped the study: trials that have not ended by themselves were interrupted."""
        self.stopped = True

    # Tune keeps copies of a searcher to restore it from; ours is rebuilt from rows, so they hold nothing.
    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _curve_of(assignment: Assignment) -> list[Point]:
    study = StudyConfig.model_validate(assignment.study)
    evals = results.read_table(assignment.study_dir, "evals", trial=assignment.trial)
    return read_curves(evals, before_tokens=full_tokens(study)).get(assignment.trial, [])


def lost_row(assignment: Assignment, attempts: Sequence[Row], begun: Row | None) -> Row:
    """Write and return the row of an attempt whose process ended without a word, while the study went on.

    Args:
        attempts: rows of all attempts of the trial so far.
        begun: the last of them, if it is the row that the lost attempt left when it began.
    Returns:
        The row, `interrupted` where the trial goes on.
    """
    study = StudyConfig.model_validate(assignment.study)
    row: Row = dict(begun or {**blank_row(assignment, study, time.time()), "started_at": None})
    row.update(
        status="failed",
        error_type="ProcessLost",
        error_message="the trial's process ended without a word: it was killed, most often for want of "
        "memory, or could not start (--verbose shows more)",
        ended_at=results.now(),
    )
    earlier = [attempt for attempt in attempts if attempt["attempt"] < row["attempt"]]
    context_length = field_of(json.loads(row["config_json"]), "data.context_length")
    max_failures = study.failures.max_failures
    if retries.goes_on([*earlier, row], context_length=context_length, max_failures=max_failures):
        row["status"] = "interrupted"
    try:
        results.write_trial(assignment.study_dir, row, space.column_types(study))
        if row["status"] == "failed":
            storage.delete_dir(checkpoint_dir(assignment))
    except (OutputError, OSError) as problem:
        logger.error("%s: %s", assignment.name, problem)
    return row


def end_as_failed(assignment: Assignment, row: Row) -> Row:
    """Write and return a row that says of an interrupted attempt that no other follows."""
    study = StudyConfig.model_validate(assignment.study)
    row = {**row, "status": "failed"}
    try:
        results.write_trial(assignment.study_dir, row, space.column_types(study))
        storage.delete_dir(checkpoint_dir(assignment))
    except (OutputError, OSError) as problem:
        logger.error("%s: %s", assignment.name, problem)
    return row


def run_search(
    launch: Launch,
    agenda: Agenda,
    *,
    warm_starts: Sequence[WarmStart] = (),
    watcher: Watcher,
    callbacks: Sequence[tune.Callback] = (),
    taken_over: Callable[[], bool] = lambda: False,
    run: RunTrial = run_trial,
) -> str | None:
    """Run what is left of a search on the Ray that is running.

    Args:
        warm_starts: trials of other studies that the sampler knows from the start.
        watcher: told of what happens.
        callbacks: told by Tune itself, as trackers are; none of them may raise or wait.
        taken_over: whether another command has the results folder now.
        run: trains one trial in its process and returns its row.
    Returns:
        Why the search ended before its number of trials; None: it did not.
    Raises:
        KeyboardInterrupt: the user stopped it.
        OutputError: another command has taken over the results folder.
    """
    study = launch.study
    curves = read_curves(results.read_table(launch.study_dir, "evals"), before_tokens=full_tokens(study))
    for trial in begin_anew(launch.study_dir, agenda):
        curves.pop(trial, None)
    with (
        tempfile.TemporaryDirectory(prefix="raydisp-") as scratch,
        _stop_rule(launch, agenda, curves) as rule,
    ):
        if rule is not None:
            launch = dataclasses.replace(launch, stop_rule=rule[1])
        optuna_study = OptunaStudy(study, Path(scratch))
        for warm_start in warm_starts:
            warm_start.tell(optuna_study)
        dispatcher = Dispatcher(launch, agenda, optuna_study, curves=curves, on_finished=watcher.finished)
        # At once: what an earlier run has left open there is open no more.
        optuna_study.try_snapshot(launch.study_dir)
        searcher = StudySearcher(
            dispatcher,
            optuna_study,
            close_stop_rule=(lambda trial, status: rule[0].close.remote(trial, status))
            if rule is not None
            else (lambda trial, status: None),
            taken_over=taken_over,
        )
        try:
            _run_on_tune(launch, searcher, Path(scratch), watcher, callbacks, run)
        finally:
            optuna_study.close()
            if not taken_over():
                optuna_study.try_snapshot(launch.study_dir)
        return dispatcher.over


def run_confirm(
    launch: Launch,
    frozen: Frozen,
    agenda: Agenda,
    *,
    watcher: Watcher,
    callbacks: Sequence[tune.Callback] = (),
    taken_over: Callable[[], bool] = lambda: False,
    run: RunTrial = run_trial,
) -> str | None:
    """Run what is left of a confirm phase; arguments, result and errors as `run_search` has them."""
    begin_anew(launch.study_dir, agenda)
    dispatcher = ConfirmDispatcher(launch, frozen, agenda, on_finished=watcher.finished)
    with tempfile.TemporaryDirectory(prefix="raydisp-") as scratch:
        searcher = StudySearcher(dispatcher, None, taken_over=taken_over)
        _run_on_tune(launch, searcher, Path(scratch), watcher, callbacks, run)
    return dispatcher.over


def begin_anew(study_dir: str, agenda: Agenda) -> list[int]:
    """Make failed trials that are put up again begin as if they had done nothing; returns their numbers."""
    again = [row["trial"] for row in agenda.resumed if row["status"] == "failed"]
    for trial in again:
        storage.delete_dir(storage.join(study_dir, "checkpoints", results.trial_name(trial)))
    return again


def _run_on_tune(
    launch: Launch,
    searcher: StudySearcher,
    scratch: Path,
    watcher: Watcher,
    callbacks: Sequence[tune.Callback],
    run: RunTrial,
) -> None:
    """Have Tune run what the searcher hands out.

    Args:
        scratch: local folder for what Tune writes.
    """
    study = launch.study
    # Tune would put these from the environment of the command into that of each trial, by way of a log file
    # and the dashboard. A trial has those of its node: of its role, or of whoever started Ray there.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(SECRETS)
    placement = PlacementWatch(study.resources.placement_timeout_s, launch.plan.needs)
    tuner = tune.Tuner(
        tune.with_resources(_trainable(study, run), _trial_resources(launch.plan)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # the searcher knows: trials may come back
            reuse_actors=True,  # imports are paid once per process
            max_concurrent_trials=launch.plan.max_concurrent_trials,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[_Events(launch.plan, placement, searcher, watcher), *callbacks],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    try:
        with stop_tune_on_interrupt(searcher.stop):
            tuner.fit()
    finally:
        if not searcher.taken_over():
            with contextlib.suppress(OSError):  # Ray Train may still be writing there
                storage.delete_dir(storage.join(launch.study_dir, ".ray"))
    if searcher.taken_over():
        raise OutputError(
            f"{launch.study_dir} was taken over by another command, because this one had given no sign "
            "of life for too long; it goes on there"
        )
    if searcher.stopped:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _stop_rule(
    launch: Launch, agenda: Agenda, curves: Mapping[int, Sequence[Point]]
) -> Iterator[tuple[Any, dict[str, str]] | None]:
    """The actor that trials ask whether to go on, on this node: its handle, and where trials find it."""
    watched = launch.study.search.watched
    if watched is None:
        yield None
        return
    where = {"name": f"raydisp-{uuid.uuid4().hex[:12]}", "namespace": ray.get_runtime_context().namespace}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(StopRules)
    handle = actor.options(**where, scheduling_strategy=here).remote(launch.study)
    arms = Arms(launch.study)
    for row in sorted([*agenda.finished, *agenda.resumed], key=lambda row: row["trial"]):
        if arms.of(row["trial"]).searched:
            curve = of_metric(curves.get(row["trial"], ()), watched.metric)
            handle.replay.remote(row["trial"], curve, row["status"])
    try:
        yield handle, {**where, "metric": watched.metric}
    finally:
        with contextlib.suppress(Exception):  # Ray may be gone already
            ray.kill(handle)


def _trainable(study: StudyConfig, run: RunTrial = run_trial) -> Callable[[dict[str, Any]], None]:
    """What Tune calls in a trial's process, for one trial after the other.

    Args:
        run: trains one trial and returns its row.
    """

    def run_in_process(config: dict[str, Any]) -> None:
        # How long Tune waits for this function to come to its end before the process gets another trial;
        # after that it would fail the other one.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
        assignment = Assignment(**config)
        threads = tidy.threads()
        row = run(assignment, tune.report)
        tune.report(told_at_end(row))
        if row["status"] == "interrupted":  # by notice: no trial may follow on this node
            raise PreemptedError(row["resumed_step"] or 0, row["error_message"])
        left = tidy.leftovers(threads)
        if left or row["status"] == "failed":
            # The row is written, and says how the trial ended. By an error here Tune ends the process instead
            # of giving it the next trial, which then gets a fresh one.
            raise UnfitProcessError(
                f"after {assignment.name}, {row['status']}: {', '.join(left) or 'an error'}"
            )

    # Tune registers trainables by name for the whole cluster: two studies must not have the same.
    run_in_process.__name__ = f"raydisp_{study.name}_{uuid.uuid4().hex[:8]}"
    return run_in_process


def _trial_resources(plan: Plan) -> tune.PlacementGroupFactory:
    """A trial of one worker trains in its own process; one of several only waits in it for Ray Train."""
    if plan.through_ray_train:
        return tune.PlacementGroupFactory([dict(plan.driver_resources)])
    bundle = {"CPU": plan.cpus_per_worker}
    if plan.gpus_per_worker:
        bundle["GPU"] = plan.gpus_per_worker
    if plan.accelerator_type is not None:  # a small part of what each such node has once
        bundle[f"{ACCELERATOR}{plan.accelerator_type}"] = 0.001
    return tune.PlacementGroupFactory([bundle])


class _Events(tune.Callback):
    """Passes on what happens to trials, and sees to it that none waits for its place for ever."""

    def __init__(
        self, plan: Plan, placement: PlacementWatch, searcher: StudySearcher, watcher: Watcher
    ) -> None:
        self._plan = plan
        self._placement = placement
        self._searcher = searcher
        self._watcher = watcher
        self._numbers: dict[str, int] = {}
        """Tune's name for a trial that runs -> its number."""

    def on_step_begin(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        self._watcher.tick()
        states = {trial.status for trial in trials}
        pending, running = "PENDING" in states, "RUNNING" in states
        if self._placement.saw(pending=pending, running=running, now=time.monotonic()):
            offer = describe_offer(read_offer(), self._plan.cpus_per_worker, self._plan.gpus_per_worker)
            raise self._placement.error(offer)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy that nobody reads; a progress bar cannot be in it

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        assignment = self._searcher.running.get(trial.trial_id)
        if assignment is not None:
            self._numbers[trial.trial_id] = assignment.trial
            self._watcher.started(assignment.trial)

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        number = self._searcher.reported(trial.trial_id, result)
        if number is not None:
            self._watcher.reported({"trial": number, **result})

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        number = self._numbers.pop(trial.trial_id, None)
        if number is not None:
            self._watcher.stopped(number)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)
