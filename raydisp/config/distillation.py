"""The study file's `distillation`: the teacher of a small model, and how much it counts."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from raydisp.config.model import GgufModel, HubModel, PathModel
from raydisp.config.section import Fraction, Section


class HubTeacher(HubModel):
    """A pretrained model from the Hugging Face hub (or its local cache)."""

    place: ClassVar[str] = "distillation.teacher"


class PathTeacher(PathModel):
    """A pretrained model from a local folder written by save_pretrained."""

    place: ClassVar[str] = "distillation.teacher"


class GgufTeacher(GgufModel):
    """A pretrained model from one GGUF file."""

    place: ClassVar[str] = "distillation.teacher"


TeacherConfig = Annotated[HubTeacher | PathTeacher | GgufTeacher, Field(discriminator="source")]


class DistillationConfig(Section):
    """Knowledge distillation (arXiv 1503.02531): the student learns a larger model's predictions too.

    Loss = (1 - weight) x cross-entropy + weight x temperature^2 x KL(teacher || student), the divergence of
    predictions that the temperature softens. Both have one vocabulary: a student from scratch has the
    teacher's, and its tokenizer.
    """

    teacher: Annotated[TeacherConfig | None, Field(description="null: no distillation")] = None
    weight: Annotated[
        Fraction, Field(description="of the teacher's predictions; the text itself has the rest; 0: off")
    ] = 0.5
    temperature: Annotated[
        float, Field(gt=0.0, description="both models' logits are divided by it, for their divergence")
    ] = 2.0

    @property
    def is_on(self) -> bool:
        """Whether a trial has a teacher beside it; with weight 0 it does not pay for one."""
        return self.teacher is not None and self.weight > 0.0

    @model_validator(mode="after")
    def _has_a_teacher(self) -> DistillationConfig:
        if self.teacher is None:
            for name in ("weight", "temperature"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"distillation.{name} = {value:g} is given without a distillation.teacher; name one, "
                        "such as {source: hub, id: gpt2}, or leave it out"
                    )
        elif self.teacher.dropout:
            raise ValueError(
                f"distillation.teacher.dropout = {self.teacher.dropout:g}: a teacher is not trained, and has "
                "no dropout; leave it out"
            )
        return self
