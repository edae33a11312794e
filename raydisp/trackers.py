"""Trackers beside the Parquet rows: TensorBoard, MLflow and Weights & Biases, through Ray's own callbacks.

The rows are the truth, and a tracker is a copy for those who like to look there. Each works on a thread of
its own, so that a server which does not answer keeps nobody waiting; the first thing that goes wrong there is
a warning, and from then on the tracker is silent. Secrets come from the environment alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydisp import results, storage
from raydisp.config import StudyConfig
from raydisp.config.trackers import Mlflow, Settings, Tensorboard, Wandb, name_of, settings_of

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""How long a study that is over waits for its trackers, all of them together."""
CLOSE_INTERRUPTED_S = 3.0
"""The same, where the user has stopped it."""
MAX_WAITING = 100_000
"""Events that wait for a tracker, until it counts as broken."""

SECRET_VARIABLES = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")

THREAD_NAME = "raydisp-tracker"

REPORTED_AT_END = (
    "num_tokens",
    "train_loss",
    "test_loss",
    "train_s",
    "startup_s",
    "tokens_per_s",
    "peak_memory_bytes",
)
"""Columns of `trials` that are known only when a trial has ended."""


def told_at_end(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial reports last: its status, and what only its row knows."""
    return {"status": row["status"], **{name: row.get(name) for name in REPORTED_AT_END}}


@dataclasses.dataclass(eq=False)
class TrackedTrial:
    """A trial as Ray's callbacks see it: of Tune's own trial, what they look at."""

    trial_id: str
    name: str
    config: dict[str, Any]
    """Its number, attempt, arm and seed, and every field that differs from the study file."""
    local_path: str
    experiment_dir_name: str
    checkpoint: None = None
    num_tokens: int = 0
    status: str | None = None
    """How it ended; None: it runs, or was cut off."""

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        os.makedirs(self.local_path, exist_ok=True)

    def __str__(self) -> str:
        return self.name


def tracked_trial(trial_id: str, assignment: Mapping[str, Any], folder: str) -> TrackedTrial:
    """Args: folder: where the tracker keeps its files; the trial's are in one of its name."""
    study, values = assignment["study"], assignment["values"]
    config = {
        "trial": assignment["trial"],
        "attempt": assignment["attempt"],
        "phase": assignment["phase"],
        "arm": assignment["arm"],
        "seed": values.get("seed", study["seed"]),
        **{name: value if _is_plain(value) else str(value) for name, value in values.items()},
    }
    name = f"{assignment['arm']}-{assignment['trial']:05d}"
    if assignment["attempt"] > 1:
        name += f"-attempt-{assignment['attempt']}"
    return TrackedTrial(trial_id, name, config, os.path.join(folder, name), study["name"])


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among what a trial has reported, without Tune's own."""
    return {
        name: value
        for name, value in result.items()
        if (name in results.TRIAL_COLUMNS or name in ("step", "elapsed_s"))
        and name not in ("num_tokens", "trial", "attempt", "seed")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


class Tracker(tune.Callback):
    """Passes on what Tune says to one of Ray's logger callbacks, on a thread, until something goes wrong."""

    def __init__(self, name: str, make: Callable[[], Any], folder: str = "") -> None:
        """Args:
        make: the callback; called on the thread.
        folder: where it keeps files.
        """
        self.name = name
        self.broken = False
        self._make = make
        self._folder = folder
        self._events: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MAX_WAITING)
        self._trials: dict[str, TrackedTrial] = {}
        self._thread = threading.Thread(target=self._work, name=f"{THREAD_NAME}-{name}", daemon=True)

    # --- on Tune's thread: nothing here waits ------------------------------------------------------------

    def setup(
        self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any
    ) -> None:
        if self._thread.ident is None:  # once for both phases of a study
            self._thread.start()

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        trial_id, assignment = trial.trial_id, trial.config
        self._put(lambda inner: self._start(inner, trial_id, assignment))

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        trial_id, told = trial.trial_id, dict(result)
        self._put(lambda inner: self._report(inner, trial_id, told))

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.trial_id
        self._put(lambda inner: self._end(inner, trial_id))

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy that nobody reads

    def close(self, timeout_s: float) -> None:
        """Wait for what has been said to be passed on, and let go."""
        if self._thread.ident is None:
            return
        self._put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._give_up(f"it has not taken everything within {timeout_s:g} s")

    def _put(self, event: Callable[[Any], None] | None) -> None:
        if self.broken:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._give_up("it does not keep up")

    def _give_up(self, reason: str) -> None:
        if self.broken:
            return
        self.broken = True
        text = redact(" ".join(reason.split()))
        if len(text) > 400:  # what was tried stands at the start, and why it failed at the end
            text = f"{text[:200]} ... {text[-200:]}"
        logger.warning(
            "%s gets no more of this study: %s. The study goes on, and its rows are complete", self.name, text
        )

    # --- on the tracker's thread -------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            inner = self._make()
            inner.setup()
            for event in iter(self._events.get, None):
                if self.broken:
                    return
                event(inner)
            for trial_id in list(self._trials):
                self._end(inner, trial_id)
            inner.on_experiment_end(trials=[])
        except (Exception, SystemExit) as error:
            cause = getattr(error, "cause", None) or error  # of what a Ray actor has raised
            self._give_up(f"{type(cause).__name__}: {cause}")

    def _start(self, inner: Any, trial_id: str, assignment: Mapping[str, Any]) -> None:
        trial = self._trials[trial_id] = tracked_trial(trial_id, assignment, self._folder)
        inner.log_trial_start(trial)

    def _report(self, inner: Any, trial_id: str, result: Mapping[str, Any]) -> None:
        trial = self._trials.get(trial_id)
        if trial is None:
            return
        tokens = result.get("num_tokens")
        trial.num_tokens = trial.num_tokens if tokens is None else int(tokens)
        metrics = metrics_of(result)
        if metrics:
            # What they take as the step.
            inner.log_trial_result(0, trial, {**metrics, "training_iteration": trial.num_tokens})
        trial.status = result.get("status")

    def _end(self, inner: Any, trial_id: str) -> None:
        trial = self._trials.pop(trial_id, None)
        if trial is not None:
            inner.log_trial_end(trial, failed=trial.status not in ("completed", "pruned"))


def redact(text: str) -> str:
    """A message without user names and passwords of URIs, and without values of secret variables."""
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name.upper()) and len(value) >= 6:
            text = text.replace(value, "***")
    return text


@contextlib.contextmanager
def running(study: StudyConfig, study_dir: str) -> Iterator[list[tune.Callback]]:
    """The study's trackers as callbacks for Tune; at the end they get a little time to catch up."""
    found = [make_tracker(name_of(entry), settings_of(entry), study, study_dir) for entry in study.trackers]
    with _silence():
        limit = CLOSE_TIMEOUT_S
        try:
            yield list(found)
        except BaseException:
            limit = CLOSE_INTERRUPTED_S
            raise
        finally:
            deadline = time.monotonic() + limit
            for tracker in found:
                tracker.close(max(0.1, deadline - time.monotonic()))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within it, what libraries log on the trackers' threads (each retry of a connection) is not shown,
    unless everything is."""

    def shown(record: logging.LogRecord) -> bool:
        ours = record.name.startswith("raydisp")
        return ours or not (record.threadName or "").startswith(THREAD_NAME)

    handlers = [] if logging.getLogger().isEnabledFor(logging.INFO) else list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(shown)


def make_tracker(name: str, settings: Settings, study: StudyConfig, study_dir: str) -> Tracker:
    """The tracker that an entry of the study file means."""
    # wandb makes its own folder `wandb`.
    home = study_dir if isinstance(settings, Wandb) else storage.join(study_dir, name)
    folder = getattr(settings, "dir", None) or home
    folder = os.path.abspath(os.path.expanduser(folder))
    if isinstance(settings, Tensorboard):
        return Tracker(name, _tensorboard, folder)
    if isinstance(settings, Mlflow):
        return Tracker(name, lambda: _mlflow(settings, study))
    return Tracker(name, lambda: _wandb(settings, folder), folder)


def _tensorboard() -> Any:
    from ray.tune.logger import TBXLoggerCallback

    return TBXLoggerCallback()


def _mlflow(settings: Mlflow, study: StudyConfig) -> Any:
    # By default it tries for minutes; what the user has set stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "0")  # else it prints its own lines
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(
        tracking_uri=settings.tracking_uri,
        experiment_name=settings.experiment or study.name,
        tags={"study": study.name},
    )


def _wandb(settings: Wandb, folder: str) -> Any:
    from ray.air.integrations.wandb import WandbLoggerCallback

    class Actor(WandbLoggerCallback._logger_actor_cls):
        """Ray's own, which gets the key as an argument: Ray would pass it on in a runtime environment, and
        logs those."""

        def __init__(self, *arguments: Any, key: str | None, **settings: Any) -> None:
            if key is not None:
                os.environ["WANDB_API_KEY"] = key
            super().__init__(*arguments, **settings)

    class Callback(WandbLoggerCallback):
        def setup(self, *arguments: Any, **info: Any) -> None:
            os.makedirs(folder, exist_ok=True)
            with _environment("WANDB_MODE", settings.mode):  # it asks for a key unless this says offline
                super().setup()
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._remote_logger_class = ray.remote(num_cpus=0, scheduling_strategy=here)(Actor)
            self.kwargs["key"] = os.environ.get("WANDB_API_KEY") if settings.mode == "online" else None

        def _start_logging_actor(self, trial: Any, exclude: list[str], **settings: Any) -> None:
            trial.local_path = folder  # where it works; wandb makes a folder for each run itself
            super()._start_logging_actor(trial, exclude, **settings)

        def _cleanup_logging_actors(self, timeout: int = 0, kill_on_timeout: bool = False) -> None:
            futures = list(self._trial_logging_futures.values())
            if not futures:
                return
            done, _ = ray.wait(futures, num_returns=len(futures), timeout=timeout)
            super()._cleanup_logging_actors(0, kill_on_timeout)
            ray.get(done)  # raises what went wrong in one of them

    return Callback(
        project=settings.project, mode=settings.mode, dir=folder, upload_timeout=int(CLOSE_TIMEOUT_S) - 5
    )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
