"""The methods that a trial's settings switch on, as live objects on its model, and what of them really ran.

Each `make_...` returns None where its method is off: the baseline pays nothing for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raydisp.attach import DispersionTerm
from raydisp.config import TrialConfig
from raydisp.distillation import Teacher
from raydisp.embeddings import ActiveForgetting, EmbeddingNoise
from raydisp.layers import unwrap
from raydisp.schedules import WeightSchedule


def make_term(model: nn.Module, trial: TrialConfig) -> DispersionTerm | None:
    """The dispersion term on the model; None where the weight is 0 in all steps."""
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
        schedule=WeightSchedule(
            trial.num_steps,
            settings.schedule,
            warmup_frac=settings.warmup_frac,
            start_frac=settings.start_frac,
        ),
    )


def make_noise(model: nn.Module, trial: TrialConfig) -> EmbeddingNoise | None:
    """The noise on the input embeddings; None where there is none."""
    alpha = trial.noisy_embedding.alpha
    return EmbeddingNoise(model, alpha=alpha, seed=trial.seed) if alpha > 0.0 else None


def make_forgetting(
    model: nn.Module, optimizer: torch.optim.Optimizer, trial: TrialConfig
) -> ActiveForgetting | None:
    """Who draws the input embeddings anew; None where nobody does."""
    settings = trial.active_forgetting
    if settings.every_steps is None:
        return None
    return ActiveForgetting(
        model,
        optimizer,
        every_steps=settings.every_steps,
        learning_rate=settings.learning_rate,
        seed=trial.seed,
        num_steps=trial.num_steps,
    )


def settings_in_use(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    term: DispersionTerm | None,
    trial: TrialConfig,
    *,
    noise: EmbeddingNoise | None = None,
    forgetting: ActiveForgetting | None = None,
    teacher: Teacher | None = None,
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
        "noisy_embedding.alpha": 0.0 if noise is None else noise.alpha,
        "active_forgetting.every_steps": None if forgetting is None else forgetting.every_steps,
        "distillation.weight": 0.0 if teacher is None else teacher.weight,
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
        if (schedule := term.schedule) is not None:
            used["dispersion.schedule"] = schedule.name
            used["dispersion.warmup_frac"] = schedule.warmup_frac
            used["dispersion.start_frac"] = schedule.start_frac
    if forgetting is not None:
        used["active_forgetting.learning_rate"] = forgetting.group["peak_lr"]
    if teacher is not None:
        used["distillation.temperature"] = teacher.temperature
    return used


def model_config(model: nn.Module) -> Any:
    """The Hugging Face configuration of the text model, wrapped or not."""
    plain: Any = unwrap(model)
    return plain.config.get_text_config()
