"""Tells an attached dispersion loss which step of a `transformers.Trainer` it is."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from raydisp.attach import AttachedDispersion


class DispersionSteps(TrainerCallback):
    """Sets `step` of an attached dispersion loss before each step, so that its weight follows its schedule.

    Right on `resume_from_checkpoint` too: the Trainer's own count is taken.

    Example:
        schedule = WeightSchedule(num_steps=1000, name="linear_warmup")
        handle = attach_dispersion(model, weight=0.1, schedule=schedule)
        Trainer(model, TrainingArguments(max_steps=1000), callbacks=[DispersionSteps(handle)], ...).train()
    """

    def __init__(self, handle: AttachedDispersion) -> None:
        self._handle = handle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer before the first forward pass of a step."""
        self._handle.step = state.global_step
