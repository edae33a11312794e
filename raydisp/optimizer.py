"""AdamW as this field uses it, its learning rate over training, and the tensors that it and a model hold."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from raydisp.config.train import TrainConfig


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


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, settings: TrainConfig
) -> float:
    """Set the learning rate of step 0..num_steps-1 in all groups; returns it, as the first group has it."""
    factor = learning_rate_factor(step, num_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


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


def training_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The tensors that a training goes on from, by name: parameters, persistent buffers, moments.

    Shared ones (tied embeddings) stand there once. Everything else about a training is a function of its
    settings, its seed and its step: data order, noise, learning rate.

    Args:
        model: the plain model, not its DDP wrapper; its parameters may be sharded.
    """
    persistent = model.state_dict().keys()
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def allocate_moments(model: nn.Module, optimizer: torch.optim.AdamW, names: Collection[str]) -> None:
    """Give the optimizer the state that stands under these names of `training_tensors`, to be filled."""
    for name, parameter in model.named_parameters():
        if f"optimizer.{name}.exp_avg" in names:
            optimizer.state[parameter] = {
                # of the fused kernel: a float32 scalar beside the parameter
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
