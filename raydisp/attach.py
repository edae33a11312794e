"""The dispersion loss on any Hugging Face causal language model, by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from raydisp.layers import HiddenStateCapture, num_hidden_layers, resolve_layers
from raydisp.losses import dispersion_loss


class DispersionTerm:
    """The dispersion loss of one model: what is caught, with which settings."""

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 0.1,
        variant: str = "angular_spread",
        temperature: float = 1.0,
        clamp: float = 0.1,
        margin: float = 0.5,
        layers: str | Sequence[int] = "all",
        max_tokens: int | None = None,
    ) -> None:
        self.weight = weight
        self.variant = variant
        self.temperature = temperature
        self.clamp = clamp
        self.margin = margin
        self.max_tokens = max_tokens
        self._capture = HiddenStateCapture(model, resolve_layers(layers, num_hidden_layers(model)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that carry a hook now; empty after `remove`."""
        return tuple(self._capture.handles)

    def recording(self) -> AbstractContextManager[None]:
        """Within it, a forward pass of the model is caught."""
        return self._capture.recording()

    def loss(self, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean over the chosen layers of the loss of the recorded pass: a scalar, float32, unweighted."""
        values = [
            dispersion_loss(
                hidden,
                self.variant,
                temperature=self.temperature,
                clamp=self.clamp,
                margin=self.margin,
                max_tokens=self.max_tokens,
                mask=mask,
                generator=generator,
            )
            for hidden in self._capture.take().values()
        ]
        return torch.stack(values).mean().float()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._capture.remove()
