"""The training loop: next batch, forward, loss + weight x dispersion, backward, finite check, step.

It knows torch and the model, and nothing of Ray: a test, a notebook or a GPU machine calls `train` directly.
"""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from raydisp.attach import DispersionTerm
from raydisp.checkpoint import CheckpointFolder, Saved
from raydisp.config import TrialConfig
from raydisp.data import BatchLoader, TokenBlocks
from raydisp.distillation import Teacher, distillation_losses, make_teacher
from raydisp.embeddings import EmbeddingNoise
from raydisp.errors import DivergedError, OutOfMemoryError, PreemptedError
from raydisp.evaluate import Evaluation, evaluate, token_losses
from raydisp.memory import (
    is_out_of_memory,
    keep_freed_memory,
    micro_batch_sequences,
    peak_memory_bytes,
    reset_peak_memory,
)
from raydisp.methods import make_forgetting, make_noise, make_term, model_config, settings_in_use
from raydisp.optimizer import allocate_moments, make_optimizer, set_learning_rate, training_tensors
from raydisp.parallel import (
    Layout,
    all_reduce_sum,
    clip_gradients,
    gradient_sync,
    parallelise,
    seed_step,
)
from raydisp.positions import draw_positions
from raydisp.precision import LossScale, make_autocast, resolve_precision, use_tf32

MAX_SKIPPED_IN_A_ROW = 100
"""Steps without a finite gradient, one after the other, that `on_nonfinite: skip_step` bears: a model whose
every gradient is broken does not mend."""

INTERRUPTION_POLL_S = 5.0
"""About how often the workers ask whether their machines are about to be taken away."""


class Rows(Protocol):
    """Where rows go; `raydisp.results.RowWriter` is one."""

    def add(self, table: str, row: dict[str, Any]) -> None: ...
    def flush(self, step: int) -> None: ...


class Benchmarks(Protocol):
    """What a model is evaluated on besides held-out text; `raydisp.tasks.runs.TaskRuns` is one."""

    def rows(
        self, model: nn.Module, step: int, *, layout: Layout, precision: str, batch_tokens: int
    ) -> Iterable[tuple[str, dict[str, Any]]]: ...


@dataclass(frozen=True)
class TrainResult:
    """What one training is worth, and what it really used."""

    num_steps: int
    num_tokens: int
    num_skipped_steps: int
    """Steps of these whose gradient was not finite and not used."""
    train_loss: float | None
    """Cross-entropy, nats per token, mean over the last tenth of the steps; None if all of them were
    skipped, or the training was stopped before its end."""
    final: Evaluation | None
    """On the whole validation split; None: the training was stopped before its end."""
    test_loss: float | None
    """On the whole test split, nats per token; None: it was not asked for, or the training was stopped."""
    train_s: float
    """Seconds in the loop over all attempts: steps, evaluations, checkpoints."""
    tokens_per_s: float | None
    """Of the steps alone, in this attempt; None if it made none."""
    peak_memory_bytes: int
    micro_batch_tokens: int
    precision: str
    used: dict[str, Any]
    """Settings read back from the live objects (optimizer, model, methods): dotted field name -> value."""


@dataclass
class _Progress:
    """What a training knows besides its tensors; a checkpoint holds it as JSON."""

    step: int
    """Number of steps done."""
    num_skipped_steps: int
    skipped_in_a_row: int
    recent_lm_losses: collections.deque[float]
    loss_scale: LossScale | None
    """Of fp16."""
    train_s: float
    """In earlier attempts."""

    @classmethod
    def start(cls, trial: TrialConfig, precision: str) -> _Progress:
        recent: collections.deque[float] = collections.deque(maxlen=max(1, trial.num_steps // 10))
        return cls(0, 0, 0, recent, LossScale() if precision == "fp16" else None, 0.0)

    def resume(self, saved: Saved) -> None:
        state = saved.state
        self.step = saved.step
        self.num_skipped_steps = state["num_skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.recent_lm_losses.extend(state["recent_lm_losses"])
        self.train_s = state["train_s"]
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.value, self.loss_scale.good_steps = state["loss_scale"]

    def state(self, train_s: float) -> dict[str, Any]:
        scale = self.loss_scale
        return {
            "num_skipped_steps": self.num_skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_lm_losses": list(self.recent_lm_losses),
            "loss_scale": None if scale is None else [scale.value, scale.good_steps],
            "train_s": train_s,
        }

    def keep_step(self, lm_loss: float) -> None:
        self.skipped_in_a_row = 0
        self.recent_lm_losses.append(lm_loss)
        if self.loss_scale is not None:
            self.loss_scale.grow()

    def skip_step(self, quantity: str, value: float, *, fail: bool) -> None:
        """Count a step whose gradient cannot be used, or end the training for it.

        A gradient of fp16 that overflows beside a finite loss is what loss scaling expects.
        """
        scaled = quantity != "loss" and self.loss_scale is not None and self.loss_scale.shrink()
        self.skipped_in_a_row += 1
        if (fail and not scaled) or self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(self.step + 1, quantity, value)
        self.num_skipped_steps += 1


def train(
    model: nn.Module,
    train_blocks: TokenBlocks,
    validation_blocks: TokenBlocks,
    trial: TrialConfig,
    *,
    layout: Layout,
    rows: Rows | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume_from: Saved | None = None,
    on_start: Callable[[], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    must_stop: Callable[[dict[str, Any]], bool] | None = None,
    interruption: Callable[[], str | None] | None = None,
    test_blocks: TokenBlocks | None = None,
    benchmarks: Benchmarks | None = None,
    on_end: Callable[[nn.Module], None] | None = None,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Train a model as the trial says.

    Every worker of the layout calls it with the same arguments; only the main one writes rows. The result
    does not depend on the layout beyond float rounding (dropout aside). After an error on one worker, it
    starts no exchange with the others.

    Args:
        model: a Hugging Face causal language model on the CPU, float32.
        rows: receives the rows of `steps`, `evals` and `layers`, on the main worker.
        checkpoints: where they are saved, by all workers together; none are made without it, or without
            trial.checkpoint.every_tokens.
        resume_from: go on from here: what `checkpoints.find` returned.
        on_start: called once before the first step of this attempt.
        on_evaluation: called on every worker after each evaluation, with step, num_tokens, elapsed_s and the
            metrics of the evaluation under the names of the columns of `trials`.
        must_stop: asked on the main worker, with the same, after each evaluation between start and end:
            whether the training ends here, before its budget.
        interruption: called on all workers at the same steps, about every INTERRUPTION_POLL_S; why this
            machine must be left now, if it must: the same on all workers.
        test_blocks: evaluated as a whole at the end, for the loss alone.
        benchmarks: asked on all workers for rows at each evaluation, and leaves the model as it was.
        on_end: called once on all workers after the last evaluation of a training that came to its end, with
            the trained model in its wrapper (DDP's) and, under fsdp, in shards. Its time and its memory do
            not count.
        teacher: where the trial distils: another such model, with the same vocabulary; changed in place.
    Raises:
        DivergedError: the loss or the gradient is not finite; raised on all workers at the same step,
            before the optimizer used it.
        OutOfMemoryError: a forward or backward pass did not fit.
        PreemptedError: `interruption` gave a reason; a checkpoint is saved first.
        CheckpointError: resume_from is of another model.
        OutputError: a checkpoint cannot be written.
    """
    if layout.device.type == "cpu":
        keep_freed_memory()
    reset_peak_memory(layout.device)
    precision = resolve_precision(trial.train.precision, layout.device)
    use_tf32(trial.train.tf32)
    autocast = make_autocast(precision, layout.device)
    term = make_term(model, trial)
    wrapped = parallelise(model, layout, trial.train, precision)
    optimizer = make_optimizer(model, trial.train)
    forgetting = make_forgetting(model, optimizer, trial)
    taught_by = make_teacher(teacher, trial, device=layout.device, precision=precision)
    micro = micro_batch_sequences(trial, layout, vocab_size=model_config(model).vocab_size)
    num_steps, tokens_per_step = trial.num_steps, trial.train.global_batch_tokens
    progress = _Progress.start(trial, precision)
    if resume_from is not None:
        assert checkpoints is not None
        allocate_moments(model, optimizer, resume_from.names)
        checkpoints.load(resume_from, training_tensors(model, optimizer))
        progress.resume(resume_from)
    first_step = progress.step
    evaluate_every, log_spaced = trial.steps_between(trial.evaluate.every_tokens), set(trial.log_spaced_steps)
    checkpoint_every = trial.steps_between(trial.checkpoint.every_tokens) if checkpoints is not None else None
    started, steps_s = time.perf_counter(), 0.0

    def elapsed_s() -> float:
        return progress.train_s + time.perf_counter() - started

    def metrics_of(step: int, evaluation: Evaluation) -> dict[str, Any]:
        at = {"step": step, "num_tokens": step * tokens_per_step, "elapsed_s": elapsed_s()}
        return {**at, **evaluation.metrics()}

    def measure(step: int, blocks: TokenBlocks, split: str, max_tokens: int | None) -> Evaluation:
        evaluation = evaluate(
            wrapped,
            blocks,
            split=split,
            layout=layout,
            max_tokens=max_tokens,
            condensation_tokens=trial.evaluate.max_tokens,
            batch_sequences=micro,
            autocast=autocast,
            measure_condensation=split == "validation",
        )
        if rows is not None:
            evals, layers = evaluation.rows(step, step * tokens_per_step)
            for table, new in (("evals", evals), ("layers", layers)):
                for row in new:
                    rows.add(table, row)
        return evaluation

    def run_benchmarks(benchmarks: Benchmarks, step: int) -> None:
        batch_tokens = micro * trial.data.context_length
        at = {"step": step, "num_tokens": step * tokens_per_step}
        for table, row in benchmarks.rows(
            wrapped, step, layout=layout, precision=precision, batch_tokens=batch_tokens
        ):
            if rows is not None:
                rows.add(table, {**at, **row})

    def report(step: int, evaluation: Evaluation) -> None:
        if benchmarks is not None:
            run_benchmarks(benchmarks, step)
        if rows is not None:
            rows.flush(step)
        if on_evaluation is not None:
            on_evaluation(metrics_of(step, evaluation))

    def run_evaluation(step: int) -> Evaluation:
        evaluation = measure(step, validation_blocks, "validation", trial.evaluate.max_tokens)
        report(step, evaluation)
        return evaluation

    def save_checkpoint(val_loss: float | None) -> None:
        assert checkpoints is not None
        if rows is not None:
            rows.flush(progress.step)  # before the checkpoint: rows up to it are then safe
        tensors = training_tensors(model, optimizer)
        checkpoints.save(progress.step, tensors, progress.state(elapsed_s()), value=val_loss)

    noise = make_noise(model, trial)
    try:
        if first_step == 0:
            run_evaluation(0)
        if on_start is not None:
            on_start()
        asked = _Interruption(interruption, layout, first_step)
        wrapped.train()
        with BatchLoader(
            train_blocks,
            seed=trial.seed,
            sequences_per_step=trial.sequences_per_step,
            first_step=first_step,
            num_steps=num_steps,
            rank=layout.rank,
            world_size=layout.world_size,
            pin_memory=layout.device.type == "cuda",
        ) as batches:
            for step, batch in enumerate(batches, start=first_step):
                step_started = time.perf_counter()
                lr = set_learning_rate(optimizer, step, num_steps, trial.train)
                if forgetting is not None:
                    forgetting.set_learning_rate(step)
                seed_step(trial.seed, step, layout)
                scale = 1.0 if progress.loss_scale is None else progress.loss_scale.value
                with _memory_limit_told(step + 1, micro * trial.data.context_length):
                    losses = accumulate_gradients(
                        wrapped,
                        batch,
                        term,
                        trial,
                        step,
                        layout,
                        micro,
                        autocast,
                        noise=noise,
                        teacher=taught_by,
                        loss_scale=scale,
                    )
                    grad_norm = clip_gradients(model.parameters(), trial.train.grad_clip, unscale=1 / scale)
                # The one wait for the device in a step. The numbers are the same on all workers: all of them
                # use this gradient, or none.
                *parts, norm = torch.stack([*losses, grad_norm.to(losses.lm)]).tolist()
                lm_loss, dispersion, distilled = parts
                weight = 0.0 if term is None else term.weight_at(step)
                loss = total_loss(StepLosses(*parts), weight, taught_by)
                decisive = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
                if not math.isfinite(decisive[1]):
                    progress.skip_step(*decisive, fail=trial.train.on_nonfinite == "fail")
                else:
                    optimizer.step()
                    progress.keep_step(lm_loss)
                optimizer.zero_grad(set_to_none=True)
                steps_s += time.perf_counter() - step_started
                done = progress.step = step + 1
                if rows is not None:
                    rows.add(
                        "steps",
                        {
                            "step": done,
                            "num_tokens": done * tokens_per_step,
                            "loss": loss,
                            "lm_loss": lm_loss,
                            "dispersion_loss": dispersion if weight != 0.0 else None,
                            "dispersion_weight": weight,
                            "distillation_loss": distilled if taught_by is not None else None,
                            "grad_norm": norm,
                            "learning_rate": lr,
                            "elapsed_s": elapsed_s(),
                        },
                    )
                if done == num_steps:
                    break
                val_loss = None
                if (evaluate_every and done % evaluate_every == 0) or done in log_spaced:
                    evaluation = run_evaluation(done)
                    val_loss = evaluation.loss
                    stopped = must_stop is not None and must_stop(metrics_of(done, evaluation))
                    if _on_any_worker(stopped, layout):
                        break
                if forgetting is not None and forgetting.forget(done):
                    val_loss = None  # of the model before it, and a checkpoint has the one after it
                if checkpoint_every and done % checkpoint_every == 0:
                    save_checkpoint(val_loss)
                reason = asked.at(done)
                if reason is not None:
                    if checkpoints is not None and (not checkpoint_every or done % checkpoint_every):
                        save_checkpoint(val_loss)
                    raise PreemptedError(done, reason)
        final, test = None, None
        if progress.step == num_steps:
            final = measure(num_steps, validation_blocks, "validation", None)
            if test_blocks is not None:
                test = measure(num_steps, test_blocks, "test", None)
            report(num_steps, final)
        used = settings_in_use(
            model, optimizer, term, trial, noise=noise, forgetting=forgetting, teacher=taught_by
        )
        if checkpoints is not None:
            checkpoints.wait()
        train_s, peak_memory = elapsed_s(), peak_memory_bytes(layout.device)
        if on_end is not None and final is not None:
            on_end(wrapped)
    except PreemptedError:
        if checkpoints is not None:
            checkpoints.wait()  # no error: all workers are here
        raise
    except BaseException:
        if checkpoints is not None:
            checkpoints.abandon()
        if rows is not None:
            with contextlib.suppress(Exception):  # what ended the training is told, not this
                rows.flush(progress.step)
        raise
    finally:
        if term is not None:
            term.remove()
        if noise is not None:
            noise.remove()
    steps_here = progress.step - first_step
    recent = progress.recent_lm_losses
    return TrainResult(
        num_steps=progress.step,
        num_tokens=progress.step * tokens_per_step,
        num_skipped_steps=progress.num_skipped_steps,
        train_loss=math.fsum(recent) / len(recent) if recent and final is not None else None,
        final=final,
        test_loss=None if test is None else test.loss,
        train_s=train_s,
        tokens_per_s=steps_here * tokens_per_step / steps_s if steps_here else None,
        peak_memory_bytes=peak_memory,
        micro_batch_tokens=micro * trial.data.context_length,
        precision=precision,
        used=used,
    )


def _on_any_worker(told: bool, layout: Layout) -> bool:
    """Whether any worker says so; all must ask."""
    if layout.world_size == 1:
        return told
    votes = torch.tensor(float(told), device=layout.device)
    all_reduce_sum([votes], layout)
    return bool(votes.item())


class _Interruption:
    """Asks now and then whether the machines must be left: on all workers at the same step.

    The question may itself wait for all workers (Ray Train's does), so that when it is put is settled between
    them: each time, the main worker says after how many steps the next one comes.
    """

    def __init__(self, ask: Callable[[], str | None] | None, layout: Layout, first_step: int) -> None:
        self._ask, self._layout = ask, layout
        self._last, self._next = first_step, first_step + 1
        self._last_s = time.perf_counter()

    def at(self, step: int) -> str | None:
        """Why the training must stop after this step, if it must."""
        if self._ask is None or step < self._next:
            return None
        now = time.perf_counter()
        ahead = int(INTERRUPTION_POLL_S * (step - self._last) / max(now - self._last_s, 1e-9))
        told = torch.tensor(float(max(1, ahead)) if self._layout.is_main else 0.0, device=self._layout.device)
        all_reduce_sum([told], self._layout)
        self._last, self._last_s, self._next = step, now, step + int(told.item())
        return self._ask()


@contextlib.contextmanager
def _memory_limit_told(step: int, micro_batch_tokens: int) -> Iterator[None]:
    """Turns an allocation that failed into an OutOfMemoryError, and lets go of what the step held."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(step, micro_batch_tokens, reason) from error


Number = TypeVar("Number", float, Tensor)


class StepLosses(NamedTuple, Generic[Number]):
    """What a step's loss is made of, over the global batch; none of it weighted."""

    lm: Number
    """Cross-entropy, nats per token."""
    dispersion: Number
    """0 where the term is off."""
    distillation: Number
    """T^2 KL(teacher || student), nats per token; 0 without a teacher."""


def total_loss(losses: StepLosses[Number], dispersion_weight: float, teacher: Teacher | None) -> Number:
    """(1 - alpha) x cross-entropy + alpha x distillation + weight x dispersion: what is made small."""
    loss = losses.lm
    if teacher is not None:
        loss = (1.0 - teacher.weight) * loss + teacher.weight * losses.distillation
    if dispersion_weight != 0.0:
        loss = loss + dispersion_weight * losses.dispersion
    return loss


def accumulate_gradients(
    model: nn.Module,
    batch: Tensor,
    term: DispersionTerm | None,
    trial: TrialConfig,
    step: int,
    layout: Layout,
    micro_sequences: int,
    autocast: AbstractContextManager[Any],
    *,
    noise: EmbeddingNoise | None = None,
    teacher: Teacher | None = None,
    loss_scale: float = 1.0,
) -> StepLosses[Tensor]:
    """Forward and backward over this worker's share of the global batch, in micro-batches.

    Cross-entropy and distillation are normalised by the predicted tokens of the global batch and the
    dispersion by its sequences, so that neither the number of workers nor of micro-batches changes the sum.

    Args:
        model: wrapped; gradients are added to its parameters.
        batch: [B, L] int64, this worker's sequences.
        term: None: no dispersion; where its weight in this step is 0, it is as if there were none.
        step: counted from 0.
        noise: None: none on the input embeddings.
        teacher: None: the text alone is learnt.
        loss_scale: factor of the gradients, as fp16 needs one.
    Returns:
        Scalars, float64, of the global batch.
    """
    num_sequences, context_length = trial.sequences_per_step, batch.shape[1]
    weight = 0.0 if term is None else term.weight_at(step)
    if weight == 0.0:
        term = None
    # DDP and FSDP2 divide the sum over workers by their number; this undoes it.
    scale = loss_scale * layout.world_size / num_sequences
    totals = torch.zeros(3, dtype=torch.float64, device=layout.device)
    micro_batches = batch.split(micro_sequences)
    for index, micro_batch in enumerate(micro_batches):
        input_ids = micro_batch.to(layout.device, non_blocking=True)
        first = layout.rank * len(batch) + index * micro_sequences  # in the global batch
        recording = term.recording() if term is not None else contextlib.nullcontext()
        noisy = noise.added(step, first) if noise is not None else contextlib.nullcontext()
        # Before the student's pass, whose activations are not there yet.
        taught = teacher.logits(input_ids, autocast) if teacher is not None else None
        with gradient_sync(model, enabled=index == len(micro_batches) - 1):
            with recording, noisy, autocast:
                logits = model(input_ids=input_ids, use_cache=False).logits
            lm_sum = token_losses(logits, input_ids).sum() / (context_length - 1)
            dispersion_sum = distillation_sum = torch.zeros_like(lm_sum)
            if term is not None:
                positions = None
                if term.max_tokens is not None and term.max_tokens < context_length:
                    positions = draw_positions(
                        torch.arange(first, first + len(micro_batch), device=layout.device),
                        num_layers=len(term.layers),
                        length=context_length,
                        max_tokens=term.max_tokens,
                        seed=trial.seed,
                        step=step,
                    )
                dispersion_sum = term.loss(positions=positions) * len(micro_batch)
            if teacher is not None and taught is not None:
                nats = distillation_losses(logits, taught, temperature=teacher.temperature)
                distillation_sum = nats.sum() / (context_length - 1)
            del logits, taught  # the backward pass needs neither
            sums = StepLosses(lm_sum, dispersion_sum, distillation_sum)
            totals += torch.stack([part.detach().double() for part in sums])
            (total_loss(sums, weight, teacher) * scale).backward()
    all_reduce_sum([totals], layout)
    return StepLosses(*(totals / num_sequences))
