"""Dispersion losses: hidden states [B, L, F] -> one number, lower where tokens point further apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _off_diagonal_mean(matrix: Tensor) -> Tensor:
    length = matrix.shape[-1]
    return (matrix.sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(-1)) / (length * (length - 1))


def _angles(hidden: Tensor, clamp: float) -> Tensor:
    unit = hidden / (hidden.norm(dim=-1, keepdim=True) + 0.01)
    cosines = unit @ unit.mT
    clamped = cosines + (cosines.clamp(-1 + clamp, 1 - clamp) - cosines).detach()
    return torch.arccos(clamped) / math.pi


def _squared_distances(hidden: Tensor) -> Tensor:
    squares = hidden.square().sum(-1)
    return (squares[:, :, None] + squares[:, None, :] - 2 * hidden @ hidden.mT).clamp_min(0)


def angular_spread(hidden: Tensor, *, temperature: float = 1.0, clamp: float = 0.1) -> Tensor:
    return (_off_diagonal_mean(torch.exp(-_angles(hidden, clamp) / temperature)).log() + 0.01).mean()


def orthogonalization(hidden: Tensor, *, margin: float = 0.5, clamp: float = 0.1) -> Tensor:
    return _off_diagonal_mean((margin - _angles(hidden, clamp)).clamp_min(0).square()).mean()


def l2_repel(hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
    mean = torch.exp(-_squared_distances(hidden) / temperature).mean((1, 2))
    return (mean.log() + 0.01 + 0.1 * hidden.square().mean((1, 2))).mean()


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "angular_spread": angular_spread,
    "orthogonalization": orthogonalization,
    "l2_repel": l2_repel,
}


def dispersion_loss(
    hidden: Tensor,
    variant: str = "angular_spread",
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    margin: float = 0.5,
    max_tokens: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    if max_tokens is not None and max_tokens < hidden.shape[1]:
        positions = torch.randperm(hidden.shape[1], generator=generator)[:max_tokens].to(hidden.device)
        hidden = hidden[:, positions]
    hidden = hidden.float() if hidden.dtype != torch.float64 else hidden
    settings = {"temperature": temperature, "clamp": clamp, "margin": margin}
    function = VARIANTS[variant]
    assert function.__kwdefaults__ is not None
    return function(hidden, **{name: settings[name] for name in function.__kwdefaults__})
