"""The training loop: next batch, forward, loss + weight x dispersion, backward, finite check, step.

It knows torch and the model, and nothing of Ray: a test, a notebook or a GPU machine calls `train` directly.
"""

from __future__ import annotations

import collections
import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raydisp.attach import DispersionTerm
from raydisp.checkpoint import Checkpoint, CheckpointFolder
from raydisp.config import TrainConfig, TrialConfig
from raydisp.data import BatchLoader, TokenBlocks
from raydisp.errors import DivergedError
from raydisp.evaluate import Evaluation, evaluate, token_losses
from raydisp.layers import unwrap
from raydisp.parallel import Layout, all_reduce_sum, derive_seed, gradient_sync, seed_step, wrap_ddp


class Rows(Protocol):
    """Where rows go; `raydisp.results.RowWriter` is one."""

    def add(self, table: str, row: dict[str, Any]) -> None: ...
    def flush(self, step: int) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """What one finished training is worth, and what it really used."""

    num_steps: int
    num_tokens: int
    train_loss: float
    """Cross-entropy, nats per token, mean over the last tenth of the steps."""
    final: Evaluation
    train_s: float
    """Seconds in the loop over all attempts: steps, evaluations, checkpoints."""
    tokens_per_s: float | None
    """Of the steps alone, in this attempt; None if it made none."""
    peak_memory_bytes: int
    precision: str
    used: dict[str, Any]
    """Settings read back from the live optimizer, dispersion term and model: dotted field name -> value."""


def train(
    model: nn.Module,
    train_blocks: TokenBlocks,
    validation_blocks: TokenBlocks,
    trial: TrialConfig,
    *,
    layout: Layout,
    rows: Rows | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume_from: Checkpoint | None = None,
    on_start: Callable[[], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model as the trial says.

    Every worker of the layout calls it with the same arguments; only the main one writes. The result does
    not depend on the layout beyond float rounding (dropout aside).

    Args:
        model: a Hugging Face causal language model on the CPU, float32.
        rows: receives the rows of `steps`, `evals` and `layers`, on the main worker.
        checkpoints: where the main worker saves them; none are made without it, or without
            trial.checkpoint.every_tokens.
        resume_from: go on from here; the same on all workers. Its tensors are let go once they are loaded.
        on_start: called once before the first step of this attempt.
        on_evaluation: called on every worker after each evaluation, with step, num_tokens and val_loss.
    Raises:
        DivergedError: the loss or the gradient is not finite; raised on all workers at the same step,
            before the optimizer used it.
    """
    precision = resolve_precision(trial.train.precision, layout.device)
    autocast = make_autocast(precision, layout.device)
    term = make_term(model, trial)
    wrapped = wrap_ddp(model, layout)
    optimizer = make_optimizer(model, trial.train)
    micro = micro_batch_sequences(trial, layout, vocab_size=model_config(model).vocab_size)
    num_steps, tokens_per_step = trial.num_steps, trial.train.global_batch_tokens
    recent: collections.deque[float] = collections.deque(maxlen=max(1, num_steps // 10))
    first_step, earlier_s = 0, 0.0
    if resume_from is not None:
        first_step = resume_from.step
        model.load_state_dict(resume_from.tensors["model"])
        optimizer.load_state_dict(resume_from.tensors["optimizer"])
        resume_from.tensors.clear()
        recent.extend(resume_from.state["recent_lm_losses"])
        earlier_s = resume_from.state["train_s"]

    evaluate_every = trial.steps_between(trial.evaluate.every_tokens)
    checkpoint_every = trial.steps_between(trial.checkpoint.every_tokens) if checkpoints is not None else None
    started, steps_s, done = time.perf_counter(), 0.0, first_step

    def elapsed_s() -> float:
        return earlier_s + time.perf_counter() - started

    def run_evaluation(step: int, max_tokens: int | None) -> Evaluation:
        evaluation = evaluate(
            wrapped,
            validation_blocks,
            split="validation",
            layout=layout,
            max_tokens=max_tokens,
            condensation_tokens=trial.evaluate.max_tokens,
            batch_sequences=micro,
            autocast=autocast,
        )
        if rows is not None:
            evals, layers = evaluation.rows(step, step * tokens_per_step)
            for table, new in (("evals", evals), ("layers", layers)):
                for row in new:
                    rows.add(table, row)
            rows.flush(step)
        if on_evaluation is not None:
            on_evaluation(
                {
                    "step": step,
                    "num_tokens": step * tokens_per_step,
                    "val_loss": evaluation.loss,
                    "elapsed_s": elapsed_s(),
                }
            )
        return evaluation

    try:
        if first_step == 0:
            run_evaluation(0, trial.evaluate.max_tokens)
        if on_start is not None:
            on_start()
        wrapped.train()
        with BatchLoader(
            train_blocks,
            seed=trial.seed,
            sequences_per_step=trial.sequences_per_step,
            first_step=first_step,
            num_steps=num_steps,
            rank=layout.rank,
            world_size=layout.world_size,
        ) as batches:
            for step, batch in enumerate(batches, start=first_step):
                step_started = time.perf_counter()
                factor = learning_rate_factor(step, num_steps, trial.train)
                for group in optimizer.param_groups:
                    lr = group["lr"] = group["peak_lr"] * factor
                seed_step(trial.seed, step, layout)
                losses = accumulate_gradients(wrapped, batch, term, trial, step, layout, micro, autocast)
                grad_norm = clip_gradients(model, trial.train.grad_clip)
                lm_loss, dispersion, norm = torch.stack([*losses, grad_norm.to(losses[0])]).tolist()
                loss = lm_loss + (term.weight * dispersion if term is not None else 0.0)
                # The same numbers on all workers: all of them stop here, or none.
                for quantity, value in (("loss", loss), ("gradient norm", norm)):
                    if not math.isfinite(value):
                        raise DivergedError(step + 1, quantity, value)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                steps_s += time.perf_counter() - step_started
                recent.append(lm_loss)
                done = step + 1
                if rows is not None:
                    rows.add(
                        "steps",
                        {
                            "step": done,
                            "num_tokens": done * tokens_per_step,
                            "loss": loss,
                            "lm_loss": lm_loss,
                            "dispersion_loss": dispersion if term is not None else None,
                            "grad_norm": norm,
                            "learning_rate": lr,
                            "elapsed_s": elapsed_s(),
                        },
                    )
                if done < num_steps and evaluate_every and done % evaluate_every == 0:
                    run_evaluation(done, trial.evaluate.max_tokens)
                if done < num_steps and checkpoint_every and done % checkpoint_every == 0 and layout.is_main:
                    if rows is not None:
                        rows.flush(done)  # before the checkpoint: rows up to it are then safe
                    assert checkpoints is not None
                    checkpoints.save(
                        Checkpoint(
                            done,
                            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                            {"recent_lm_losses": list(recent), "train_s": elapsed_s()},
                        )
                    )
        final = run_evaluation(num_steps, None)
        used = settings_in_use(model, optimizer, term, trial)
    except BaseException:
        if rows is not None:
            with contextlib.suppress(Exception):  # what ended the training is told, not this
                rows.flush(done)
        raise
    finally:
        if term is not None:
            term.remove()
    steps_here = num_steps - first_step
    return TrainResult(
        num_steps=num_steps,
        num_tokens=num_steps * tokens_per_step,
        train_loss=math.fsum(recent) / len(recent),
        final=final,
        train_s=elapsed_s(),
        tokens_per_s=steps_here * tokens_per_step / steps_s if steps_here else None,
        peak_memory_bytes=peak_memory_bytes(layout.device),
        precision=precision,
        used=used,
    )


def accumulate_gradients(
    model: nn.Module,
    batch: Tensor,
    term: DispersionTerm | None,
    trial: TrialConfig,
    step: int,
    layout: Layout,
    micro_sequences: int,
    autocast: AbstractContextManager[Any],
) -> tuple[Tensor, Tensor]:
    """Forward and backward over this worker's share of the global batch, in micro-batches.

    The cross-entropy is normalised by the predicted tokens of the global batch and the dispersion by its
    sequences, so that neither the number of workers nor of micro-batches changes the sum.

    Args:
        model: wrapped; gradients are added to its parameters.
        batch: [B, L] int64, this worker's sequences.
        term: None: no dispersion.
    Returns:
        (cross-entropy, dispersion) of the global batch: scalars, float64, the second unweighted.
    """
    num_sequences, context_length = trial.sequences_per_step, batch.shape[1]
    # DDP divides the sum over workers by their number; this undoes it.
    scale = layout.world_size / num_sequences
    totals = torch.zeros(2, dtype=torch.float64, device=layout.device)
    micro_batches = batch.split(micro_sequences)
    for index, micro_batch in enumerate(micro_batches):
        input_ids = micro_batch.to(layout.device, non_blocking=True)
        recording = term.recording() if term is not None else contextlib.nullcontext()
        with gradient_sync(model, enabled=index == len(micro_batches) - 1):
            with recording, autocast:
                output = model(input_ids=input_ids, use_cache=False)
            lm_sum = token_losses(output.logits, input_ids).sum() / (context_length - 1)
            objective = lm_sum
            if term is not None:
                # One generator state per step: the positions drawn are the same in every micro-batch and on
                # every worker.
                generator = None
                if term.max_tokens is not None:
                    generator = torch.Generator(device=layout.device)
                    generator.manual_seed(derive_seed("dispersion", trial.seed, step))
                dispersion_sum = term.loss(generator=generator) * len(micro_batch)
                objective = objective + term.weight * dispersion_sum
                totals[1] += dispersion_sum.detach().double()
            totals[0] += lm_sum.detach().double()
            (objective * scale).backward()
    all_reduce_sum([totals], layout)
    totals /= num_sequences
    return totals[0], totals[1]


def make_term(model: nn.Module, trial: TrialConfig) -> DispersionTerm | None:
    """The dispersion term on the model; None where the weight is 0: the baseline pays nothing for it."""
    settings = trial.dispersion
    if settings.weight == 0.0:
        return None
    return DispersionTerm(
        model,
        weight=settings.weight,
        variant=settings.variant,
        temperature=settings.temperature,
        clamp=settings.clamp,
        margin=settings.margin,
        layers=settings.layers,
        max_tokens=settings.max_tokens,
    )


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only, not on biases and norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_lr"] = settings.learning_rate
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )


def learning_rate_factor(step: int, num_steps: int, settings: TrainConfig) -> float:
    """Share of the peak learning rate in step 0..num_steps-1: linear warm-up, then half a cosine.

    The warm-up's last step and the cosine's first are at the peak. The cosine would reach
    min_learning_rate_frac at step num_steps, so that no step is spent at a rate of 0.
    """
    warmup_steps = math.ceil(settings.warmup_frac * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    floor = settings.min_learning_rate_frac
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip by the global norm (None: do not); returns the norm before clipping, a scalar tensor."""
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16: bf16 on a GPU that computes in it."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def make_autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass; it can be entered again and again."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def micro_batch_sequences(trial: TrialConfig, layout: Layout, *, vocab_size: int) -> int:
    """Sequences per forward pass of one worker.

    `auto` bounds the float32 logits, which dominate in small models, to 256 MiB on a CPU and 2 GiB on a GPU;
    logits, their gradient and the softmax then take about three times that.
    """
    mine = trial.sequences_per_step // layout.world_size
    if trial.train.micro_batch_tokens != "auto":
        return min(mine, trial.train.micro_batch_tokens // trial.data.context_length)
    limit_bytes = 2**31 if layout.device.type == "cuda" else 2**28
    per_sequence = trial.data.context_length * vocab_size * 4
    return min(mine, max(1, limit_bytes // per_sequence))


def settings_in_use(
    model: nn.Module, optimizer: torch.optim.Optimizer, term: DispersionTerm | None, trial: TrialConfig
) -> dict[str, Any]:
    """Settings read back from the live objects, for those that can be searched: what really ran."""
    decayed = optimizer.param_groups[0]
    config = model_config(model)
    used: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "train.learning_rate": decayed["peak_lr"],
        "train.weight_decay": decayed["weight_decay"],
        "train.beta1": decayed["betas"][0],
        "train.beta2": decayed["betas"][1],
        "dispersion.weight": 0.0,
    }
    for name, attribute in (
        ("num_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("num_heads", "num_attention_heads"),
        ("vocab_size", "vocab_size"),
    ):
        if hasattr(trial.model, name):
            used[f"model.{name}"] = getattr(config, attribute)
    if term is not None:
        for name in ("weight", "variant", "temperature", "clamp", "margin", "max_tokens"):
            used[f"dispersion.{name}"] = getattr(term, name)
        used["dispersion.layers"] = list(term.layers)
    return used


def model_config(model: nn.Module) -> Any:
    """The Hugging Face configuration of the text model, wrapped or not."""
    plain: Any = unwrap(model)
    return plain.config.get_text_config()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory of this process so far: CUDA's allocator on a GPU, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
