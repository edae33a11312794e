"""One worker's share of a trial: model, data, checkpoints and rows put together, and trained.

It runs in the trial's own process or in each of Ray Train's workers, and knows Ray only to ask the stop rule.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raydisp import results
from raydisp.config import StudyConfig, TrialConfig
from raydisp.config.model import ScratchModel
from raydisp.data import shared_blocks
from raydisp.errors import OutputError
from raydisp.trial.assignment import (
    Assignment,
    GuardedRows,
    Report,
    checkpoint_dir,
    refuse_if_taken_over,
    varies,
)

if TYPE_CHECKING:
    from raydisp.parallel import Layout

logger = logging.getLogger(__name__)

STOP_RULE_TIMEOUT_S = 60.0
"""How long a trial waits to be told whether it goes on."""


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
    if varies(assignment, "data", "model") or not shared_blocks.fetch(folder, study.output):
        folder = data.prepare(trial, assignment.cache_dir)
    meta = data.read_meta(folder)
    revision = assignment.model_revision
    if varies(assignment, "model"):
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
        refuse_if_taken_over(assignment)
        rows = GuardedRows(
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
        from raydisp.tasks import runs as task_runs

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
    from raydisp.trial import kept_models

    def keep(model: Any) -> None:
        refuse_if_taken_over(assignment)
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
