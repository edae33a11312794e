"""The dispersion loss on any Hugging Face causal language model, by hooks.

`DispersionTerm` catches the chosen layers and computes the loss when asked: for a training loop of one's own,
this project's included. `attach_dispersion` goes one step further and adds it to `outputs.loss`, for loops
that cannot be changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import make_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from raydisp.layers import HiddenStateCapture, num_hidden_layers, resolve_layers, unwrap
from raydisp.losses import check_settings, dispersion_loss
from raydisp.schedules import WeightSchedule

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100  # the label that Hugging Face's losses leave out


class DispersionTerm:
    """The dispersion loss of one model: the layers it is taken from and its settings.

    Args:
        model: a decoder-only Hugging Face model, also wrapped by `torch.compile`, DDP or FSDP2.
        weight: what the caller multiplies the loss with; kept here, not applied.
        schedule: what share of the weight counts in each step; None: all of it, always.
        variant, temperature, clamp, margin, max_tokens: as in `raydisp.losses.dispersion_loss`.
        layers: as in `raydisp.layers.resolve_layers`.
    Raises:
        ValueError: a setting out of range, or blocks that cannot be found.

    Example:
        with term.recording():
            outputs = model(input_ids, labels=input_ids)
        loss = outputs.loss + term.weight * term.loss()
    """

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
        schedule: WeightSchedule | None = None,
    ) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"weight = {weight} must be a finite number.")
        check_settings(variant, temperature=temperature, clamp=clamp, margin=margin, max_tokens=max_tokens)
        self.weight = weight
        self.variant = variant
        self.temperature = temperature
        self.clamp = clamp
        self.margin = margin
        self.max_tokens = max_tokens
        self.schedule = schedule
        self._capture = HiddenStateCapture(model, resolve_layers(layers, num_hidden_layers(model)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that carry a hook now; empty after `remove`."""
        return tuple(self._capture.handles)

    def weight_at(self, step: int) -> float:
        """The weight in a step, counted from 0."""
        share = 1.0 if self.schedule is None else self.schedule(step)
        return self.weight * share if share else 0.0

    def recording(self) -> AbstractContextManager[None]:
        """Within it, a forward pass of the model is caught."""
        return self._capture.recording()

    def start(self) -> None:
        """As entering `recording`, for hooks."""
        self._capture.start()

    def stop(self) -> None:
        """As leaving `recording`, for hooks."""
        self._capture.stop()

    def loss(
        self,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The loss of the recorded pass, unweighted: float32 scalar, mean over the chosen layers.

        Args:
            mask: [B, L], true (or 1) where a token counts, as in an attention mask; None counts all.
            generator: for `max_tokens`; each layer draws its own positions, the same for all sequences.
            positions: [layers, B, K] int64, those of each layer and sequence instead.
        Raises:
            RuntimeError: nothing was recorded since the last call.
        """
        values = [
            dispersion_loss(
                hidden,
                self.variant,
                temperature=self.temperature,
                clamp=self.clamp,
                margin=self.margin,
                max_tokens=self.max_tokens,
                mask=None if mask is None else mask.to(hidden.device),
                generator=generator,
                positions=None if positions is None else positions[number].to(hidden.device),
            ).float()
            for number, hidden in enumerate(self._capture.take().values())
        ]
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._capture.remove()


class AttachedDispersion:
    """What `attach_dispersion` has put on a model; `remove` takes it off again.

    Attributes:
        term: the `DispersionTerm`; its `weight` and settings may be changed between steps.
        step: optimiser steps done, for a term with a schedule: set it before each step, or let
            `raydisp.trainer_callback.DispersionSteps` do so in a `transformers.Trainer`.
    """

    def __init__(self, model: nn.Module, term: DispersionTerm, generator: torch.Generator | None) -> None:
        self.term = term
        self.step: int | None = None
        self._generator = generator
        self._recording = False
        self._warned = False
        model = unwrap(model)
        for name, output_class in vars(modeling_outputs).items():
            if name.startswith("CausalLMOutput"):
                _output_class(
                    output_class
                )  # made here, because torch.compile cannot trace the making of a class
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._recording = model.training and torch.is_grad_enabled()
        if self._recording and self.term.schedule is not None:
            if self.step is None:
                raise RuntimeError(
                    "The weight of the attached dispersion loss follows a schedule, and no step is known: "
                    "set the handle's `step` before each step, or give Trainer the callback DispersionSteps."
                )
            self._recording = self.term.weight_at(self.step) != 0.0
        if self._recording:
            self.term.start()

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any | None:
        if not self._recording:
            return None
        self._recording = False
        self.term.stop()
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None  # an attention pattern, not one mark per token
        dispersion = self.term.loss(mask, self._generator)
        added = self.term.weight_at(self.step or 0) * _share_of_batch(kwargs) * dispersion
        if isinstance(outputs, tuple):
            return (outputs[0] + added, *outputs[1:]) if kwargs.get("labels") is not None else None
        if outputs.get("loss") is None and not self._warned:
            self._warned = True
            logger.warning(
                "The model was called without labels and returned no loss, so the dispersion loss is added "
                "to nothing; add weight * outputs.dispersion_loss to the loss that you compute."
            )
        fields = dict(outputs.items())
        if fields.get("loss") is not None:
            fields["loss"] = fields["loss"] + added
        return _output_class(type(outputs))(**fields, dispersion_loss=dispersion)

    def remove(self) -> None:
        """Take every hook off the model; it is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.term.remove()


def _share_of_batch(kwargs: dict[str, Any]) -> Tensor | float:
    """What part of an optimiser step's targets this forward pass holds, if the caller has told.

    `transformers.Trainer` divides the summed cross-entropy of each accumulated batch by the targets of the
    whole step (`num_items_in_batch`) and adds the parts up. The dispersion loss, a mean, has to be weighted
    by the same parts; else it would count once per accumulated batch.
    """
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None:
        return 1.0
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = kwargs["labels"][..., 1:]
    share: Tensor = (targets != IGNORED_LABEL).sum() / num_items
    return share


# Model output class -> the same with the field `dispersion_loss` at its end. A declared field, unlike an
# extra key, survives DDP and FSDP2, which take outputs apart and rebuild them.
_OUTPUT_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {}


def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    if base not in _OUTPUT_CLASSES:
        field = ("dispersion_loss", Tensor | None, None)
        _OUTPUT_CLASSES[base] = make_dataclass(base.__name__, [field], bases=(base,))
    return _OUTPUT_CLASSES[base]


def attach_dispersion(
    model: nn.Module,
    weight: float = 0.1,
    variant: str = "angular_spread",
    layers: str | Sequence[int] = "all",
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    margin: float = 0.5,
    max_tokens: int | None = None,
    generator: torch.Generator | None = None,
    schedule: WeightSchedule | None = None,
) -> AttachedDispersion:
    """Make a Hugging Face causal language model add the dispersion loss to `outputs.loss` while it trains.

    In training mode with gradients on, `outputs.loss` becomes loss + weight * dispersion and
    `outputs.dispersion_loss` is the unweighted term; in evaluation mode nothing changes. An `attention_mask`
    [B, L] passed by name leaves padding out. Gradient accumulation by `transformers.Trainer` is accounted
    for. The model's weights, configuration and `save_pretrained` are untouched.

    Args:
        model: attach before `torch.compile` first runs it; wrapping in DDP or FSDP2 may come before or after.
        weight: factor of the term.
        generator: what `max_tokens` draws positions from; None is torch's global generator.
        schedule: of the weight over the steps, of which the handle must then be told (`step`); in those where
            it is 0 the outputs are the model's own. None: the weight is the same in all.
        variant, layers, temperature, clamp, margin, max_tokens: as in `DispersionTerm`.
    Returns:
        A handle whose `remove()` undoes it.
    Raises:
        ValueError: as `DispersionTerm`.
    """
    term = DispersionTerm(
        model,
        weight=weight,
        variant=variant,
        temperature=temperature,
        clamp=clamp,
        margin=margin,
        layers=layers,
        max_tokens=max_tokens,
        schedule=schedule,
    )
    return AttachedDispersion(model, term, generator)
