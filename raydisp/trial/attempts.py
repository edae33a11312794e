"""A trial, attempt by attempt, from its assignment to its rows.

`run_attempt` is the boundary where exceptions end: whatever happens inside becomes the attempt's row. Where
the training runs is decided in one place, `_place`: a trial of one worker trains in its own process, one of
several through Ray Train (five processes more, measured at 30 s of start-up on two cores against 8 s).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raydisp import results, storage
from raydisp.cluster import node_checks
from raydisp.cluster.capacity import describe_workers
from raydisp.config import StudyConfig, TrialConfig, field_of, replace_fields, with_fields
from raydisp.errors import (
    ConfigError,
    LeaseLostError,
    OutputError,
    PlacementTimeoutError,
    PreemptedError,
    ResourceError,
)
from raydisp.search import space
from raydisp.studyfile import explain
from raydisp.trial import retries, tidy
from raydisp.trial.assignment import (
    Assignment,
    Report,
    blank_row,
    checkpoint_dir,
    in_the_words_of,
    refuse_if_given_up,
    refuse_if_taken_over,
    utc,
)
from raydisp.trial.endings import describe_failure, root_cause
from raydisp.trial.share import train_share

if TYPE_CHECKING:
    from raydisp.parallel import Layout

logger = logging.getLogger(__name__)


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
    refuse_if_taken_over(assignment)
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
    row["ended_at"] = utc(time.time())
    refuse_if_taken_over(assignment)
    refuse_if_given_up(assignment)
    try:
        results.write_trial(assignment.study_dir, row, searched)
        # A trial that has ended for good needs its checkpoints no more.
        if row["status"] != "interrupted":
            storage.delete_dir(checkpoint_dir(assignment))
    except (OutputError, OSError) as error:
        logger.error("%s: %s", assignment.name, error)
    return row


def _combined(study: StudyConfig, values: Mapping[str, Any]) -> TrialConfig:
    try:
        return replace_fields(study.trial, values)
    except ValidationError as error:
        # Each value is allowed alone, or the study would not have started; together they are not.
        raise ConfigError(
            f"{explain(error, with_fields(study.trial, values))} (suggested: {values})"
        ) from None


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
    from raydisp.cluster.preemption import notice_to_this_node
    from raydisp.parallel import Layout

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

    from raydisp.cluster.elastic import choose_num_workers
    from raydisp.trial.lean_trainer import LeanTrainer

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
    from raydisp.cluster.placement import describe_offer, not_placed
    from raydisp.cluster.session import read_offer

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

    from raydisp.cluster.preemption import notice_to_the_workers
    from raydisp.parallel import Layout

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
    refuse_if_taken_over(assignment)
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


def _device(gpus: float) -> Any:
    import torch

    return torch.device("cuda", 0) if gpus > 0 else torch.device("cpu")
