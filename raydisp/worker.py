"""A trial, attempt by attempt, from its assignment to its rows.

`run_attempt` is the boundary where exceptions end: whatever happens inside becomes the attempt's row. Where
the training runs is decided in one place, `_place`: a trial of one worker trains in its own process, one of
several through Ray Train (five processes more, measured at 30 s of start-up on two cores against 8 s).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raydisp import lease, node_checks, results, retries, shared_blocks, space, storage, tidy
from raydisp.capacity import describe_workers
from raydisp.config import StudyConfig, TrialConfig, field_of, replace_fields, with_fields
from raydisp.endings import describe_failure, root_cause
from raydisp.errors import (
    ConfigError,
    LeaseLostError,
    OutputError,
    PlacementTimeoutError,
    PreemptedError,
    ResourceError,
)
from raydisp.layers import resolve_layers
from raydisp.models_config import ScratchModel
from raydisp.studyfile import explain

if TYPE_CHECKING:
    from raydisp.parallel import Layout

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]

STOP_RULE_TIMEOUT_S = 60.0
"""How long a trial waits to be told whether it goes on."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a trial process is told: plain values only, so that it travels as JSON."""

    study: dict[str, Any]
    """The study file, resolved."""
    study_dir: str
    cache_dir: str
    working_dir: str
    """Relative paths of the study file start here."""
    trial: int
    attempt: int
    phase: str
    arm: str
    values: dict[str, Any]
    """Fields that differ from the study file: dotted name -> value."""
    gpus_per_worker: float
    prepared: str
    """Folder of the study's token blocks."""
    model_revision: str | None
    code_version: str
    packages: dict[str, str]
    stop_rule: dict[str, str] | None = None
    """Name and namespace of the actor that says whether the trial goes on, and the metric that it watches."""
    data_sha256: str | None = None
    """Of the study's data; a trial that varies them finds out its own."""
    teacher_revision: str | None = None
    """Of `distillation.teacher`, which is the same in all trials; None: there is none."""
    lease: str | None = None
    """Of the results folder, while this study holds it."""
    confirm_json: str | None = None
    """Of the confirm phase: its frozen plan, which stands on every row."""
    keep_model: bool = False
    """Whether the weights are kept when the trial has completed."""
    code_sha256: str | None = None
    """Of the code on the node where the study was started; None: it is not looked at."""
    task_folders: Sequence[str] = ()
    """Of the harness's own tasks, where those of the study are."""

    @property
    def name(self) -> str:
        return results.trial_name(self.trial)


def run_trial(assignment: Assignment, report: Report) -> dict[str, Any]:
    """Train one trial: attempt after attempt, until one ends it or it has to go on in another process.

    Returns:
        The row of the last attempt; `interrupted` where the trial must leave this machine.
    """
    while True:
        row = run_attempt(assignment, report)
        alone = row["world_size"] == 1
        elsewhere = row["error_type"] == retries.NOT_PLACED or (
            alone and row["error_type"] == retries.PREEMPTED
        )
        if row["status"] != "interrupted" or elsewhere:
            return row
        logger.warning("%s goes on: %s", assignment.name, row["error_message"])
        assignment = dataclasses.replace(assignment, attempt=assignment.attempt + 1)


@tidy.left_as_found()
def run_attempt(assignment: Assignment, report: Report) -> dict[str, Any]:
    """Make one attempt at a trial and write its row; never raises for what the trial does.

    Args:
        report: called with metrics after each evaluation.
    Returns:
        The row as written: `interrupted` if the trial is to go on with another attempt.
    Raises:
        LeaseLostError: another command has taken over the results folder; nothing is written.
    """
    if os.path.isdir(assignment.working_dir):
        os.chdir(assignment.working_dir)
    study = StudyConfig.model_validate(assignment.study)
    searched = space.column_types(study)
    started = time.time()
    _refuse_if_taken_over(assignment)
    row = blank_row(assignment, study, started)
    context_length = field_of(json.loads(row["config_json"]), "data.context_length")
    earlier: list[dict[str, Any]] = []
    try:
        known = results.read_attempts(assignment.study_dir, assignment.trial)
        earlier = [attempt for attempt in known if attempt["attempt"] < assignment.attempt]
        # There from the start: whatever is killed from now on, the study knows what to go on with.
        results.write_trial(assignment.study_dir, row, searched)
        node_checks.refuse_other_versions(assignment.packages, assignment.code_sha256)
        trial = _combined(study, assignment.values)
        row["config_sha256"] = trial.sha256
        smaller = retries.reduced_micro_batch(earlier, context_length=context_length)
        if smaller is not None:
            trial = replace_fields(trial, {"train.micro_batch_tokens": smaller})
            row["note"] = f"micro-batches of {smaller} tokens, because an attempt with more ran out of memory"
        outcome = _place(assignment, study, trial, started, report)
        used, note = outcome.pop("used"), outcome.pop("note", None)
        row["note"] = "; ".join(text for text in (row.get("note"), note) if text) or None
        for name, column in searched.items():
            if row[name] is not None:  # null: a field that is not searched here
                row[name] = space.column_value(in_the_words_of(trial, name, used), column)
        row.update(outcome)
    except Exception as error:
        if isinstance(root_cause(error)[0], LeaseLostError):
            raise  # the row is another command's by now
        tokens_per_step = field_of(json.loads(row["config_json"]), "train.global_batch_tokens")
        row.update(describe_failure(error, tokens_per_step))
        row.update(_told_by_workers(assignment, study))
        max_failures = study.failures.max_failures
        if retries.goes_on([*earlier, row], context_length=context_length, max_failures=max_failures):
            row["status"] = "interrupted"
    row["ended_at"] = _utc(time.time())
    _refuse_if_taken_over(assignment)
    _refuse_if_given_up(assignment)
    try:
        results.write_trial(assignment.study_dir, row, searched)
        # A trial that has ended for good needs its checkpoints no more.
        if row["status"] != "interrupted":
            storage.delete_dir(checkpoint_dir(assignment))
    except (OutputError, OSError) as error:
        logger.error("%s: %s", assignment.name, error)
    return row


def checkpoint_dir(assignment: Assignment) -> str:
    """Where the trial's checkpoints are, whichever attempt made them."""
    return storage.join(assignment.study_dir, "checkpoints", assignment.name)


def _combined(study: StudyConfig, values: Mapping[str, Any]) -> TrialConfig:
    try:
        return replace_fields(study.trial, values)
    except ValidationError as error:
        # Each value is allowed alone, or the study would not have started; together they are not.
        raise ConfigError(
            f"{explain(error, with_fields(study.trial, values))} (suggested: {values})"
        ) from None


def blank_row(assignment: Assignment, study: StudyConfig, started: float) -> dict[str, Any]:
    """The row of a trial that has begun: `interrupted`, until it is replaced by how the trial ended."""
    trial = study.trial
    row: dict[str, Any] = {
        "study": study.name,
        "phase": assignment.phase,
        "trial": assignment.trial,
        "attempt": assignment.attempt,
        "arm": assignment.arm,
        "status": "interrupted",
        "seed": assignment.values.get("seed", trial.seed),
        "config_json": json.dumps(with_fields(trial, assignment.values), sort_keys=True),
        "study_json": json.dumps(assignment.study),
        "confirm_json": assignment.confirm_json,
        "world_size": study.resources.max_workers,
        "strategy": trial.train.strategy,
        "error_type": None,
        "hostname": socket.gethostname(),
        "data_sha256": None if _varies(assignment, "data", "model") else assignment.data_sha256,
        "model_revision": None if _varies(assignment, "model") else assignment.model_revision,
        "teacher_revision": assignment.teacher_revision,
        "code_version": assignment.code_version,
        "packages_json": json.dumps(assignment.packages, sort_keys=True),
        "started_at": _utc(started),
    }
    for name, column in space.column_types(study).items():
        row[name] = space.column_value(assignment.values.get(name), column)  # null: it is not set in this one
    return row


def _varies(assignment: Assignment, *parts: str) -> bool:
    """Whether the trial differs from its study in any field of these parts."""
    return any(name.split(".")[0] in parts for name in assignment.values)


def in_the_words_of(trial: TrialConfig, name: str, used: Mapping[str, Any]) -> Any:
    """A setting as read back from the live objects; layers in the trial's word for them where it is true.

    A setting that no live object holds (the batch size, for example) is the trial's.
    """
    configured = _field(trial, name)
    if name not in used:
        return configured
    value = used[name]
    if name == "dispersion.layers" and used.get("num_layers"):
        told = resolve_layers(configured, used["num_layers"])
        return configured if list(told) == list(value) else list(value)
    return value


def _field(trial: TrialConfig, dotted: str) -> Any:
    value: Any = trial
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


# --- where it runs -------------------------------------------------------------------------------------


def _place(
    assignment: Assignment, study: StudyConfig, trial: TrialConfig, started: float, report: Report
) -> dict[str, Any]:
    if not study.resources.goes_through_ray_train:
        return _train_here(assignment, study, trial, started, report)
    return _train_distributed(assignment, study, trial, started)


def _train_here(
    assignment: Assignment, study: StudyConfig, trial: TrialConfig, started: float, report: Report
) -> dict[str, Any]:
    from raydisp.parallel import Layout
    from raydisp.preemption import notice_to_this_node

    layout = Layout(device=_device(assignment.gpus_per_worker))
    return train_share(assignment, study, trial, started, layout, report, notice_to_this_node)


def _train_distributed(
    assignment: Assignment, study: StudyConfig, trial: TrialConfig, started: float
) -> dict[str, Any]:
    # Ray Train reads these here and passes them on; what the user has set stays. Its controller looks after
    # the workers every 2 s by default, and each report and the end of a trial wait for that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # One wait of the length that the study says, instead of Ray's many without end.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(study.resources.placement_timeout_s)
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.tune.integration.ray_train import TuneReportCallback

    from raydisp.elastic import choose_num_workers
    from raydisp.lean_trainer import LeanTrainer

    num_workers = choose_num_workers(
        study.resources,
        trial.sequences_per_step,
        assignment.gpus_per_worker,
        again=assignment.attempt > 1,
    )
    resources = {"CPU": study.resources.cpus_per_worker}
    if assignment.gpus_per_worker:
        resources["GPU"] = assignment.gpus_per_worker
    trainer = LeanTrainer(
        _ray_train_worker,
        train_loop_config={
            "assignment": dataclasses.asdict(assignment),
            "trial": trial.model_dump(mode="json"),
            "started": started,
        },
        torch_config=TorchConfig(timeout_s=math.ceil(study.failures.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=assignment.gpus_per_worker > 0,
            resources_per_worker=resources,
            accelerator_type=study.resources.accelerator_type,
            placement_strategy="PACK",  # on one node where they fit, and else on as few as it takes
        ),
        run_config=RunConfig(
            # After the trial and its attempt, never the time: what Train stores can be told apart.
            name=f"{assignment.name}-attempt-{assignment.attempt}",
            storage_path=storage.join(assignment.study_dir, ".ray"),
            callbacks=[TuneReportCallback()],
            # What is tried again is settled in `retries`, for both ways of placing a trial, and is a row.
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except ControllerError as error:  # before the workers ran
        raise _not_begun(error.controller_failure, assignment, study) from error
    assert isinstance(outcome, dict), "the main worker returns the outcome"
    if "preempted" in outcome:
        raise PreemptedError(*outcome["preempted"])
    return outcome


def _not_begun(failure: Exception, assignment: Assignment, study: StudyConfig) -> Exception:
    """Why Ray Train did not start a trial's workers, in our words where it is a matter of place."""
    from raydisp.cluster import read_offer
    from raydisp.placement import describe_offer, not_placed

    kind = type(failure).__name__
    if kind not in ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
        return failure
    wanted, gpus = study.resources, assignment.gpus_per_worker
    needs = describe_workers(wanted.max_workers, wanted.cpus_per_worker, gpus, at_least=wanted.min_workers)
    offer = describe_offer(read_offer(), wanted.cpus_per_worker, gpus)
    if kind == "InsufficientClusterResourcesError":
        return ResourceError(f"resources: a trial of {needs} can never be placed; {offer}")
    return PlacementTimeoutError(not_placed(needs, wanted.placement_timeout_s, offer))


def _ray_train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker process."""
    import ray.train
    import ray.train.torch

    from raydisp.parallel import Layout
    from raydisp.preemption import notice_to_the_workers

    assignment = Assignment(**loop_config["assignment"])
    if os.path.isdir(assignment.working_dir):
        os.chdir(assignment.working_dir)
    context = ray.train.get_context()
    layout = Layout(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    study = StudyConfig.model_validate(assignment.study)
    trial = TrialConfig.model_validate(loop_config["trial"])
    node_checks.refuse_other_versions(assignment.packages, assignment.code_sha256)
    tell_hosts(assignment, study, layout)
    try:
        return train_share(
            assignment, study, trial, loop_config["started"], layout, ray.train.report, notice_to_the_workers
        )
    except PreemptedError as error:
        # All workers stop together; an exception would make Ray Train wait for the node to be gone.
        return {"preempted": [error.step, error.reason]}


def tell_hosts(assignment: Assignment, study: StudyConfig, layout: Layout) -> None:
    """Have the row of an attempt name the hosts of its workers from their start, and not that of the driver,
    which is most often the head: whatever is lost later, it is known where it ran. All workers must call it.
    """
    import torch.distributed as dist

    hosts: list[Any] = [socket.gethostname()]
    if layout.world_size > 1:
        timeout = datetime.timedelta(seconds=study.failures.collective_timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)  # on the CPU, whatever the training's is
        hosts = [None] * layout.world_size
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        dist.destroy_process_group(group)
    if not layout.is_main:
        return
    _refuse_if_taken_over(assignment)
    try:
        row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
        if row is not None and row["ended_at"] is None:
            row.update(hostname=", ".join(dict.fromkeys(hosts)), world_size=layout.world_size)
            results.write_trial(assignment.study_dir, row, space.column_types(study))
    except (OutputError, OSError) as problem:
        logger.warning("%s: its row does not name its hosts: %s", assignment.name, problem)


def _told_by_workers(assignment: Assignment, study: StudyConfig) -> dict[str, Any]:
    """What `tell_hosts` has written, for the row of an attempt that failed; {} where that is not known."""
    if not study.resources.goes_through_ray_train:
        return {}
    try:
        row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
    except (OutputError, OSError):
        return {}
    return {} if row is None else {name: row[name] for name in ("hostname", "world_size")}


def train_share(
    assignment: Assignment,
    study: StudyConfig,
    trial: TrialConfig,
    started: float,
    layout: Layout,
    report: Report,
    interruption: Callable[[], str | None],
) -> dict[str, Any]:
    """This worker's part of a trial's training.

    Args:
        interruption: as `raydisp.train.train` has it.
    Returns:
        Columns of `trials` with their values, and under `used` the settings read back.
    """
    import torch

    from raydisp import data, models, vocabulary
    from raydisp.checkpoint import CheckpointFolder
    from raydisp.train import train

    limit_memory(layout.device, assignment.gpus_per_worker)
    if layout.device.type == "cpu":
        torch.set_num_threads(max(1, int(study.resources.cpus_per_worker)))
    # The study has made its data and pinned its model once; a trial that varies them makes its own.
    folder = assignment.prepared
    # Without a shared file system the study's folder is on another node, and a copy in the object store.
    if _varies(assignment, "data", "model") or not shared_blocks.fetch(folder, study.output):
        folder = data.prepare(trial, assignment.cache_dir)
    meta = data.read_meta(folder)
    revision = assignment.model_revision
    if _varies(assignment, "model"):
        revision = models.resolve_revision(trial.model)
        vocabulary.check_shared_vocabulary(trial)
    build = functools.partial(
        models.build_model,
        context_length=trial.data.context_length,
        eos_token_id=meta["eos_token_id"],
        seed=trial.seed,
    )
    # A model from scratch has the size that the study says, or its teacher's vocabulary; a pretrained one
    # must fit its tokenizer.
    vocab_size = meta["vocab_size"]
    if isinstance(trial.model, ScratchModel):
        vocab_size = vocabulary.teachers_vocab_size(trial, assignment.teacher_revision)
    model = build(trial.model, vocab_size=vocab_size, revision=revision)
    taught_by, teacher = trial.distillation.teacher, None
    if taught_by is not None and trial.distillation.is_on:
        teacher = build(taught_by, vocab_size=meta["vocab_size"], revision=assignment.teacher_revision)
    identity = f"{trial.sha256} on data {meta['data_sha256']} from model {revision}"
    if assignment.teacher_revision is not None:
        identity += f" taught by {assignment.teacher_revision}"
    timeout_s = study.failures.collective_timeout_s
    checkpoints = CheckpointFolder(checkpoint_dir(assignment), identity, layout, timeout_s=timeout_s)
    resume_from = checkpoints.find()
    resumed_step = resume_from.step if resume_from else 0
    hosts = checkpoints.gather(socket.gethostname())
    rows = None
    if layout.is_main:
        _refuse_if_taken_over(assignment)
        rows = _GuardedRows(
            assignment,
            results.RowWriter(
                assignment.study_dir, assignment.trial, assignment.attempt, resumed_step=resumed_step
            ),
        )
    confirms = assignment.phase == "confirm"
    identities = (
        _identities(model, data.TokenBlocks(folder, "train"), trial) if confirms and layout.is_main else {}
    )
    first_step_at: list[float] = []
    notes: list[str] = []
    benchmarks = None
    if trial.evaluate.tasks:
        from raydisp import task_runs

        known = assignment.task_folders
        benchmarks = task_runs.of_trial(study, trial, folder, at_rungs=not confirms, known=known, notes=notes)
    result = train(
        model,
        data.TokenBlocks(folder, "train"),
        data.TokenBlocks(folder, "validation"),
        trial,
        layout=layout,
        rows=rows,
        checkpoints=checkpoints,
        resume_from=resume_from,
        on_start=lambda: first_step_at.append(time.time()),
        on_evaluation=report,
        must_stop=_must_stop(assignment) if layout.is_main else None,
        interruption=interruption,
        test_blocks=data.TokenBlocks(folder, "test") if confirms else None,
        benchmarks=benchmarks,
        teacher=teacher,
        on_end=_keep_model(assignment, trial, folder, layout, notes) if assignment.keep_model else None,
    )
    return {
        "status": "completed" if result.final is not None else "pruned",
        "num_steps": result.num_steps,
        "num_tokens": result.num_tokens,
        "num_skipped_steps": result.num_skipped_steps,
        "resumed_step": resumed_step,
        "train_loss": result.train_loss,
        **(result.final.metrics() if result.final is not None else {}),
        "test_loss": result.test_loss,
        **identities,
        "train_s": result.train_s,
        "startup_s": first_step_at[0] - started,
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "world_size": layout.world_size,
        "precision": result.precision,
        "micro_batch_tokens": result.micro_batch_tokens,
        "device": _device_name(layout.device),
        "hostname": ", ".join(dict.fromkeys(hosts)),
        "data_sha256": meta["data_sha256"],
        "model_revision": revision,
        "used": result.used,
        "note": "; ".join(notes) or None,
    }


def _identities(model: Any, train_blocks: Any, trial: TrialConfig) -> dict[str, str]:
    """What two runs of a pair have in common: initial weights, first and last batch, as SHA-256."""
    from raydisp import data, models

    batches = {"first_batch_sha256": 0, "last_batch_sha256": trial.num_steps - 1}
    return {
        "initial_weights_sha256": models.weights_sha256(model),
        **{
            column: data.batch_sha256(train_blocks, trial.seed, step, trial.sequences_per_step)
            for column, step in batches.items()
        },
    }


def _keep_model(
    assignment: Assignment, trial: TrialConfig, prepared: str, layout: Layout, notes: list[str]
) -> Callable[[Any], None]:
    """Args: notes: gets why the weights could not be kept, which takes nothing from what was measured."""
    from raydisp import kept_models

    def keep(model: Any) -> None:
        _refuse_if_taken_over(assignment)
        try:
            kept_models.keep(
                model,
                kept_models.place_of(assignment.study_dir, assignment.trial),
                os.path.join(prepared, "tokenizer"),
                is_main=layout.is_main,
                about={
                    "study": assignment.study["name"],
                    "trial": assignment.trial,
                    "arm": assignment.arm,
                    "seed": trial.seed,
                    "config_sha256": trial.sha256,
                },
            )
        except (OutputError, OSError) as problem:
            logger.warning("%s: its weights are not kept: %s", assignment.name, problem)
            notes.append(f"its weights were not kept: {problem}")

    return keep


def _refuse_if_taken_over(assignment: Assignment) -> None:
    """A process that outlives its study, or its attempt, cut off from both, must not write into what another
    one goes on with.

    Raises:
        LeaseLostError: another command holds the results folder, or another attempt has begun.
    """
    if assignment.lease is None:
        return
    if not lease.still_held(assignment.study_dir, assignment.lease):
        raise LeaseLostError(f"{assignment.name} ends: its study no longer holds {assignment.study_dir}")
    if results.attempt_exists(assignment.study_dir, assignment.trial, assignment.attempt + 1):
        raise LeaseLostError(f"{assignment.name} ends: another attempt goes on with it elsewhere")


def _refuse_if_given_up(assignment: Assignment) -> None:
    """Raise LeaseLostError where the study has taken a trial's attempt for lost, and written how it ended."""
    if assignment.lease is None:
        return
    row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
    if row is not None and row["ended_at"] is not None:
        raise LeaseLostError(f"{assignment.name} ends: its study has taken it for lost")


@dataclasses.dataclass(frozen=True)
class _GuardedRows:
    """Rows that are written only while the trial's study holds its folder."""

    assignment: Assignment
    writer: results.RowWriter

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.writer.add(table, row)

    def flush(self, step: int) -> None:
        _refuse_if_taken_over(self.assignment)
        self.writer.flush(step)


def _must_stop(assignment: Assignment) -> Callable[[dict[str, Any]], bool] | None:
    """Asks the study's rule, an actor, whether the trial must stop; where it does not answer, it need not."""
    rule = assignment.stop_rule
    if rule is None:
        return None

    def ask(metrics: dict[str, Any]) -> bool:
        import ray

        try:
            actor = ray.get_actor(rule["name"], namespace=rule["namespace"])
            told = actor.report.remote(assignment.trial, metrics["num_tokens"], metrics[rule["metric"]])
            return bool(ray.get(told, timeout=STOP_RULE_TIMEOUT_S))
        except (ray.exceptions.RayError, ValueError) as error:
            logger.warning("%s goes on: nobody says whether it must stop (%s)", assignment.name, error)
            return False

    return ask


def _device(gpus: float) -> Any:
    import torch

    return torch.device("cuda", 0) if gpus > 0 else torch.device("cpu")


def limit_memory(device: Any, gpus: float) -> None:
    """Keep a worker that has a part of a GPU to its part of the memory: then it is the one that runs out, and
    not its neighbour. Ray counts the parts, and holds nobody to them.

    Args:
        gpus: of the worker; whole ones have all their memory.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(gpus if 0 < gpus < 1 else 1.0, device)


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
