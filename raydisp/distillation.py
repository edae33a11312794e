"""Knowledge distillation: a student's divergence from a larger teacher, and the teacher beside a training.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from raydisp.config import TrialConfig
from raydisp.precision import AUTOCAST_DTYPES

CHUNK_ELEMENTS = 2**22
"""Logits that are turned into probabilities at a time: what bounds the memory that it takes."""


def distillation_losses(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    r"""T^2 KL(p_teacher || p_student) of each token given those before it, p = softmax(logits / T).

    The factor T^2 keeps the gradient's size as T changes, so that a weight means the same at all temperatures
    (section 2 of the source). Whole probabilities are never held: beside the two logits there is the gradient
    for the student's, of their dtype, made at once. The backward pass can be run once.

    Args:
        student: [B, L, V] logits, any float dtype; computed in float32 or wider.
        teacher: [B, L, W] logits of the same tokens; no gradient goes to them. Where V and W differ, the
            first min(V, W) count: models of one tokenizer fill up their vocabularies to round numbers of
            their own, with entries that no token has.
        temperature: T > 0, dimensionless.
    Returns:
        [B, L - 1], float32 or wider, nats.
    Raises:
        ValueError: other shapes, or a temperature that is not above 0.
    """
    if student.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher are [B, L, V] and [B, L, W] logits of the same tokens, not "
            f"{list(student.shape)} and {list(teacher.shape)}"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature = {temperature} is not above 0")
    vocab_size = min(student.shape[-1], teacher.shape[-1])
    # Laid flat without a copy. The last position, which predicts nothing that is there, is dropped below.
    mine, theirs = (logits[..., :vocab_size].flatten(0, 1) for logits in (student, teacher))
    divergence: Tensor = _Divergence.apply(mine, theirs.detach(), temperature)
    return divergence.view(student.shape[:2])[:, :-1]


class _Divergence(torch.autograd.Function):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row of [N, V] logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        values = torch.empty(len(student), dtype=dtype, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        num_rows = max(1, CHUNK_ELEMENTS // student.shape[1])
        for first in range(0, len(student), num_rows):
            rows = slice(first, first + num_rows)
            mine, theirs = (
                (logits[rows].to(dtype) / temperature).log_softmax(-1) for logits in (student, teacher)
            )
            share = theirs.exp()
            values[rows] = (share * (theirs - mine)).sum(-1) * temperature**2
            if gradient is not None:
                # T^2 x (p_student - p_teacher) / T
                gradient[rows] = mine.exp_().sub_(share).mul_(temperature)
        ctx.gradient = gradient
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("The gradient of distillation_losses can be had once; call it again.")
        return gradient.mul_(grad_values.unsqueeze(-1)), None, None


class Teacher:
    """A model that does not learn, beside one that does: on every worker a whole copy, whatever the strategy.

    It is part of no wrapper, no optimizer and no checkpoint. Its matrix products are those of the training's
    precision: the weights of linear layers are kept in it, as autocast would cast them anew in each pass, and
    all else (embeddings, norms) in float32.

    Attributes:
        weight: alpha, of its predictions in the loss, in (0, 1].
        temperature: of both models' predictions.
    """

    def __init__(
        self, model: nn.Module, *, weight: float, temperature: float, device: torch.device, precision: str
    ) -> None:
        """Args:
        model: a Hugging Face causal language model on the CPU, float32; changed in place.
        precision: fp32, bf16 or fp16.
        """
        self.weight = weight
        self.temperature = temperature
        self._model: Any = model.eval().requires_grad_(False)
        dtype = AUTOCAST_DTYPES.get(precision)
        if dtype is not None:
            _cast_linear_weights(self._model, dtype)
        self._model.to(device)

    def logits(self, input_ids: Tensor, autocast: AbstractContextManager[Any]) -> Tensor:
        """[B, L] int64 -> [B, L, V] logits, without a graph; random states stay as they are."""
        with torch.no_grad(), autocast:
            logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits
            return logits


def _cast_linear_weights(model: Any, dtype: torch.dtype) -> None:
    # A head that shares the embeddings' weight leaves it in float32: a lookup, unlike a product, is not cast.
    kept = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept:
            module.weight.data = module.weight.data.to(dtype)


def make_teacher(
    model: nn.Module | None, trial: TrialConfig, *, device: torch.device, precision: str
) -> Teacher | None:
    """The teacher of a trial; None where nothing is distilled.

    Raises:
        ValueError: the trial distils, and there is no model.
    """
    settings = trial.distillation
    if not settings.is_on:
        return None
    if model is None:
        raise ValueError("the trial distils from distillation.teacher, and train() was given no teacher")
    return Teacher(
        model, weight=settings.weight, temperature=settings.temperature, device=device, precision=precision
    )
