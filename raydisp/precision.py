"""Number formats of a training: what `auto` means, autocast, TF32, and the loss scaling of fp16."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16: bf16 on a GPU that computes in it."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def make_autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass; it can be entered again and again."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])


def use_tf32(enabled: bool) -> None:
    """Let float32 products of a GPU run in TF32, or not, in this process from now on."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


@dataclass
class LossScale:
    """Dynamic loss scaling: gradients of fp16 underflow, so that the loss is multiplied before backward.

    The scale is halved when a gradient overflows and doubled after `growth_interval` steps without it
    (arXiv:1710.03740). `torch.amp.GradScaler` does the same, but checks each gradient of its own, on each
    worker; the loop knows the global norm anyway.
    """

    value: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def grow(self) -> None:
        """A step went well."""
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def shrink(self) -> bool:
        """A gradient overflowed; False if that cannot be for the scale, because there is none left."""
        if self.value <= 1.0:
            return False
        self.value, self.good_steps = self.value / 2, 0
        return True
