"""What methods other than dispersion do to the input embeddings: noise on them, and forgetting them.

Both are functions of seed and step. Whichever worker, micro-batch or attempt it is, it finds the same noise
and the same new embeddings, and no generator's state is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raydisp.layers import unwrap
from raydisp.positions import mix
from raydisp.seeds import derive_seed

FORGETTING_STD = 0.02
"""Standard deviation of new embeddings."""

FORGETTING_WARMUP_FRAC = 0.08
"""Of the embeddings' own learning rate."""

_ROWS_AT_A_TIME = 4096  # of new embeddings: bounds the memory that drawing them takes


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The lookup of token ids, wrapped or not. The output head may share its weight."""
    plain: Any = unwrap(model)
    embedding: nn.Embedding = plain.get_input_embeddings()
    return embedding


# --- noise -------------------------------------------------------------------------------------------


class EmbeddingNoise:
    """NEFTune: uniform noise in +-alpha / sqrt(L F) on what the lookup returns, within `added` alone.

    Evaluation is not within it, and an output head that shares the weight is no lookup: neither gets noise.

    Source: arXiv:2310.05914.
    """

    def __init__(self, model: nn.Module, *, alpha: float, seed: int) -> None:
        self.alpha = alpha
        self._seed = seed
        self._now: tuple[int, int] | None = None
        self._handle = input_embedding(model).register_forward_hook(self._add)

    @contextmanager
    def added(self, step: int, first_sequence: int) -> Iterator[None]:
        """Within it, forward passes get noise.

        Args:
            first_sequence: number of the pass's first sequence in the global batch.
        """
        self._now = (step, first_sequence)
        try:
            yield
        finally:
            self._now = None

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._now is None:
            return None
        step, first = self._now
        batch, length, num_features = output.shape
        noise = draw_noise(
            torch.arange(first, first + batch, device=output.device),
            length=length,
            num_features=num_features,
            seed=self._seed,
            step=step,
        )
        return output + noise.mul_(self.alpha / math.sqrt(length * num_features)).to(output.dtype)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


def draw_noise(sequences: Tensor, *, length: int, num_features: int, seed: int, step: int) -> Tensor:
    """Numbers as if drawn uniformly from (-1, 1), independent between sequences, tokens, features and steps.

    Args:
        sequences: [B] int64, their numbers in the global batch; the result is on the same device.
    Returns:
        [B, length, num_features] float32, the same on every device.
    """
    tokens = torch.arange(length, device=sequences.device)
    features = torch.arange(num_features, device=sequences.device)
    base = derive_seed("noisy_embedding", seed, step)
    streams = mix(mix(sequences + (base & 0xFFFFFFFF))[:, None] ^ (tokens + (base >> 32)))
    numbers = mix(streams[..., None] ^ mix(features))
    # The middles of 2^24 equal parts of (-1, 1), which float32 holds exactly.
    return (numbers >> 8).float().sub_(2**23 - 0.5).mul_(2.0**-23)


# --- forgetting --------------------------------------------------------------------------------------


class ActiveForgetting:
    """Draws the input embeddings anew every K steps, and gives them a learning rate of their own.

    A head that shares their weight is drawn anew with them.

    Attributes:
        every_steps: K.
        group: the embeddings' group in the optimizer.

    Source: arXiv:2307.01163.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every_steps: int,
        learning_rate: float,
        seed: int,
        num_steps: int,
    ) -> None:
        """Takes the embeddings out of their group of the optimizer, into one with the same weight decay.

        Args:
            model: as the optimizer knows its parameters: sharded already, if they are.
            learning_rate: their peak.
            num_steps: T, above every_steps.
        """
        embedding = input_embedding(model)
        self.every_steps = every_steps
        self._optimizer = optimizer
        self._weight = embedding.weight
        self._padding_row = getattr(embedding, "padding_idx", None)
        self._seed = seed
        self._num_steps = num_steps
        former = next(g for g in optimizer.param_groups if any(p is self._weight for p in g["params"]))
        former["params"] = [p for p in former["params"] if p is not self._weight]
        optimizer.add_param_group({**former, "params": [self._weight], "peak_lr": learning_rate})
        self.group = optimizer.param_groups[-1]

    def set_learning_rate(self, step: int) -> None:
        """Of the embeddings, for the update of step 0..T-1."""
        self.group["lr"] = self.group["peak_lr"] * forgetting_factor(step, self._num_steps, self.every_steps)

    @torch.no_grad()
    def forget(self, steps_done: int) -> bool:
        """Draw the embeddings anew and clear what Adam knows of them, if it is time.

        Workers that hold shards each take theirs from the same draw; nothing is exchanged.

        Returns:
            Whether it was time.
        """
        if steps_done % self.every_steps or not 0 < steps_done < self._num_steps:
            return False
        held, first = _local_rows(self._weight)
        generator = torch.Generator().manual_seed(derive_seed("active_forgetting", self._seed, steps_done))
        num_rows, num_features = self._weight.shape
        for start in range(0, num_rows, _ROWS_AT_A_TIME):
            size = min(_ROWS_AT_A_TIME, num_rows - start)
            rows = torch.empty(size, num_features).normal_(0.0, FORGETTING_STD, generator=generator)
            if self._padding_row is not None and start <= self._padding_row < start + size:
                rows[self._padding_row - start] = 0.0
            low, high = max(start, first), min(start + size, first + len(held))
            if low < high:
                held[low - first : high - first].copy_(rows[low - start : high - start])
        for moment in self._optimizer.state.get(self._weight, {}).values():
            moment.zero_()
        return True


def _local_rows(weight: Tensor) -> tuple[Tensor, int]:
    """The rows of a matrix that this worker holds, and the number of the first of them."""
    if not isinstance(weight, DTensor):
        return weight, 0
    mesh = weight.device_mesh
    # FSDP2 shards as torch.chunk does: equal shares, rounded up, while there are rows left.
    share = -(-weight.shape[0] // mesh.size())
    return weight.to_local(), share * mesh.get_local_rank()


def forgetting_factor(step: int, num_steps: int, every_steps: int) -> float:
    """Share of the embeddings' peak learning rate in step 0..num_steps-1.

    Linear from 0 over the first 8 % of the steps, then linear to 0, sped up so that about one such course
    lies between two resets: read at index (step * floor(num_steps / every_steps)) mod num_steps.
    """
    index = step * (num_steps // every_steps) % num_steps
    warmup = FORGETTING_WARMUP_FRAC * num_steps
    return index / warmup if index < warmup else (num_steps - index) / (num_steps - warmup)
