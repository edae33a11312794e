"""The search: Optuna suggests, Ray Tune places, rows decide.

`StudySearcher` hands Tune one assignment after the other: the baseline, trials that were interrupted, then
what Optuna suggests. What a finished trial was worth is read from its row, so nothing that a process failed
to report is lost, and the Optuna study can be rebuilt from rows at any time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import sqlite3
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from raydisp import results, retries, space, storage, tidy
from raydisp.agenda import BASELINE, Agenda, Row
from raydisp.cluster import DRIVER_RESOURCES, Plan
from raydisp.config import SearchConfig, StudyConfig, field_of
from raydisp.errors import OutputError, PreemptedError, UnfitProcessError
from raydisp.interrupts import stop_tune_on_interrupt
from raydisp.seeds import derive_seed
from raydisp.worker import Assignment, Report, blank_row, checkpoint_dir, run_trial

logger = logging.getLogger(__name__)

RunTrial = Callable[[Assignment, Report], Row]


def make_sampler(search: SearchConfig, seed: int, trial: int) -> BaseSampler:
    """The sampler that suggests one trial.

    A fresh one for every trial, seeded by the study's seed and the trial's number: what it suggests is then a
    function of these and of the finished trials, and no generator's state has to survive a restart.
    """
    seed = derive_seed("search", seed, trial) % 2**32
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            seed=seed, n_startup_trials=search.startup_trials, multivariate=True, constant_liar=True
        )


class OptunaStudy:
    """The Optuna study behind a raydisp study: live in a local SQLite file, copied whole to the results."""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        """Start an empty one in a local folder."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config = study
        self._distributions = space.distributions(study)
        self._file = folder / "optuna.db"
        self._study = optuna.create_study(
            study_name=study.name,
            storage=f"sqlite:///{self._file}",
            direction="minimize" if study.search.objective.mode == "min" else "maximize",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([study.search.objective.metric])
        self._live: dict[int, optuna.Trial] = {}

    def add_finished(self, row: Row) -> None:
        """Take a finished search trial of an earlier run from its row."""
        params = space.to_optuna(self.searched_values(row))
        value, state = self._outcome(row)
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=self._distributions,
                value=value,
                state=state,
                user_attrs=self._attributes(row),
            )
        )

    def suggest(self, trial: int) -> space.Values:
        """Values for a new trial."""
        self._study.sampler = make_sampler(self._config.search, self._config.seed, trial)
        self._live[trial] = self._study.ask(self._distributions)
        return space.from_optuna(self._config, self._live[trial].params)

    def enqueue(self, trial: int, values: Mapping[str, Any]) -> None:
        """Open a trial with given values: one that was interrupted goes on."""
        self._study.enqueue_trial(space.to_optuna(values))
        self._live[trial] = self._study.ask(self._distributions)

    def finish(self, row: Row) -> None:
        """Close a trial by its row; one without a finite value is told as failed, never left running."""
        live = self._live.pop(row["trial"], None)
        if live is None:
            return
        for name, attribute in self._attributes(row).items():
            live.set_user_attr(name, attribute)
        value, state = self._outcome(row)
        self._study.tell(live, value, state)

    def snapshot(self, study_dir: str) -> None:
        """Copy a consistent state to `<study_dir>/optuna.db`."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "optuna.db"
            with (
                contextlib.closing(sqlite3.connect(self._file)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
            storage.write_bytes(storage.join(study_dir, "optuna.db"), copy.read_bytes())

    def close(self) -> None:
        """Tell what is still open as failed, and let go of the file."""
        for live in self._live.values():
            self._study.tell(live, None, TrialState.FAIL)
        self._live = {}
        storage = self._study._storage
        storage.remove_session()
        backend = getattr(storage, "_backend", storage)
        backend.engine.dispose()

    def _outcome(self, row: Row) -> tuple[float | None, TrialState]:
        value = row.get(self._config.search.objective.metric)
        if row["status"] == "completed" and value is not None and math.isfinite(value):
            return value, TrialState.COMPLETE
        return None, TrialState.FAIL

    def searched_values(self, row: Row) -> space.Values:
        """What a search trial was given, from its row."""
        config = json.loads(row["config_json"])
        return {name: field_of(config, name) for name in self._config.search.space}

    @staticmethod
    def _attributes(row: Row) -> dict[str, Any]:
        kept = ("trial", "status", "num_tokens", "error_message")
        return {name: row[name] for name in kept if row.get(name) is not None}


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

    def assign(self, trial: int, attempt: int, arm: str, values: Mapping[str, Any]) -> Assignment:
        """The assignment of one attempt."""
        return Assignment(
            study=self.study.model_dump(mode="json"),
            study_dir=self.study_dir,
            cache_dir=self.cache_dir,
            working_dir=self.working_dir,
            trial=trial,
            attempt=attempt,
            phase="search",
            arm=arm,
            values=dict(values),
            gpus_per_worker=self.plan.gpus_per_worker,
            prepared=self.prepared,
            model_revision=self.model_revision,
            code_version=self.code_version,
            packages=self.packages,
        )


class StudySearcher(Searcher):
    """Gives Tune the next assignment, and closes each trial by the row that it left."""

    def __init__(
        self,
        launch: Launch,
        agenda: Agenda,
        optuna_study: OptunaStudy,
        on_finished: Callable[[Row], None],
    ) -> None:
        super().__init__()
        self._launch = launch
        self._optuna = optuna_study
        self._on_finished = on_finished
        self.running: dict[str, Assignment] = {}
        self._again: collections.deque[Assignment] = collections.deque()
        self.stopped = False
        for row in agenda.finished:
            if row["trial"] != BASELINE:
                optuna_study.add_finished(row)
        self._todo = self._assignments(agenda)

    def _assignments(self, agenda: Agenda) -> Iterator[Assignment]:
        launch = self._launch
        if agenda.needs_baseline:
            yield launch.assign(BASELINE, 1, "baseline", {"dispersion.weight": 0.0})
        for row in agenda.resumed:
            if row["trial"] == BASELINE:
                values: space.Values = {"dispersion.weight": 0.0}
            else:
                values = self._optuna.searched_values(row)
                self._optuna.enqueue(row["trial"], values)
            yield launch.assign(row["trial"], row["attempt"] + 1, row["arm"], values)
        for trial in agenda.new:
            yield launch.assign(trial, 1, "search", self._optuna.suggest(trial))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next assignment as a dictionary; None: none as yet; or that there will be none."""
        assignment = self._again.popleft() if self._again else next(self._todo, None)
        if assignment is None:
            # One that runs now may have to go on in another process.
            return None if self.running else Searcher.FINISHED
        self.running[trial_id] = assignment
        return dataclasses.asdict(assignment)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Close a trial by its row, or put it up again; a lost process gets a row that says so."""
        assignment = self.running.pop(trial_id, None)
        if assignment is None:
            return
        attempts = results.read_attempts(assignment.study_dir, assignment.trial)
        begun = attempts[-1] if len(attempts) >= assignment.attempt else None
        if self.stopped and (begun is None or begun["status"] == "interrupted"):
            return  # goes on with the next run of the command
        row = begun
        if row is None or (row["status"] == "interrupted" and row["ended_at"] is None):
            row = lost_row(assignment, attempts, begun)
        if row["status"] == "interrupted":
            logger.warning("trial %d goes on elsewhere: %s", row["trial"], row["error_message"])
            self._again.append(dataclasses.replace(assignment, attempt=row["attempt"] + 1))
            return
        self._optuna.finish(row)
        try:
            self._optuna.snapshot(assignment.study_dir)
        except OutputError as problem:  # a copy for readers; the next one may do better
            logger.warning("%s", problem)
        self._on_finished(row)

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
        error_message="the trial's process ended without a word: killed, most often for want of memory",
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


def run_search(
    launch: Launch,
    agenda: Agenda,
    *,
    on_result: Callable[[Mapping[str, Any]], None],
    on_finished: Callable[[Row], None],
    run: RunTrial = run_trial,
) -> None:
    """Run what is left of a search on the Ray that is running.

    Args:
        on_result: called with what a running trial reports: trial, step, num_tokens, val_loss, elapsed_s.
        on_finished: called with the row of each trial that ends.
        run: trains one trial in its process and returns its row.
    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    with tempfile.TemporaryDirectory(prefix="raydisp-") as scratch:
        optuna_study = OptunaStudy(launch.study, Path(scratch))
        searcher = StudySearcher(launch, agenda, optuna_study, on_finished)
        tuner = tune.Tuner(
            tune.with_resources(_trainable(launch.study, run), _trial_resources(launch.plan)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # the searcher knows: trials may come back
                reuse_actors=True,  # imports are paid once per process
                max_concurrent_trials=launch.plan.max_concurrent_trials,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[_Results(searcher.running, on_result)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            with stop_tune_on_interrupt(searcher.stop):
                tuner.fit()
        finally:
            optuna_study.close()
            optuna_study.snapshot(launch.study_dir)
            storage.delete_dir(storage.join(launch.study_dir, ".ray"))
        if searcher.stopped:
            raise KeyboardInterrupt


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
        tune.report({"status": row["status"]})
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
    if plan.num_workers > 1:
        return tune.PlacementGroupFactory([dict(DRIVER_RESOURCES)])
    bundle = {"CPU": plan.cpus_per_worker}
    if plan.gpus_per_worker:
        bundle["GPU"] = plan.gpus_per_worker
    return tune.PlacementGroupFactory([bundle])


class _Results(tune.Callback):
    """Passes on what running trials report."""

    def __init__(
        self, running: Mapping[str, Assignment], on_result: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._running = running
        self._on_result = on_result

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy that nobody reads; a progress bar cannot be in it

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        assignment = self._running.get(trial.trial_id)
        if assignment is not None and "step" in result:
            self._on_result({"trial": assignment.trial, **result})
