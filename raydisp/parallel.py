"""Data parallelism as functions over a model and plain tensors; the loop asks a `Layout` and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Layout:
    """Which share of the work this process has, and where it computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes rows and checkpoints."""
        return self.rank == 0


def wrap_ddp(model: nn.Module, layout: Layout) -> nn.Module:
    """The model on the layout's device, gradients averaged over its workers."""
    model = model.to(layout.device)
    if layout.world_size == 1:
        return model
    device_ids = [layout.device] if layout.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within it, backward passes exchange gradients between workers only if enabled (accumulation)."""
    if enabled or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def all_reduce_sum(tensors: Iterable[Tensor], layout: Layout) -> None:
    """Replace each tensor, in place, by its sum over the workers; all workers must call it."""
    if layout.world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts: unlike seed + step, neighbours do not collide."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_step(seed: int, step: int, layout: Layout) -> None:
    """Seed the noise of one step (dropout) as a function of (seed, step, rank).

    Nothing of a generator's state then has to be kept in a checkpoint.
    """
    torch.manual_seed(derive_seed("step", seed, step, layout.rank))
