"""One vocabulary for a student and its teacher: whose it is, and whether they share it."""

from __future__ import annotations

from raydisp import models
from raydisp.config import TrialConfig
from raydisp.config.model import ScratchModel
from raydisp.errors import ConfigError


def teachers_vocab_size(trial: TrialConfig, revision: str | None = None) -> int | None:
    """Embedding rows of a model from scratch that has its teacher's vocabulary; None: it has no teacher's.

    Args:
        revision: of the teacher, as `models.resolve_revision` found it; None resolves it anew.
    Raises:
        ModelError: the teacher is not there.
    """
    teacher = trial.distillation.teacher
    if teacher is None or not isinstance(trial.model, ScratchModel):
        return None
    return models.vocabulary_size(teacher, revision)


def check_shared_vocabulary(trial: TrialConfig) -> None:
    """Refuse a teacher whose predictions are over other tokens than the student's.

    Raises:
        ConfigError: the vocabularies differ.
        ModelError: a model or its tokenizer is not there.
    """
    model, teacher = trial.model, trial.distillation.teacher
    if teacher is None:
        return
    if isinstance(model, ScratchModel):
        theirs = models.vocabulary_size(teacher)
        # The default is what a file says that says nothing.
        if model.vocab_size not in (theirs, ScratchModel.model_fields["vocab_size"].default):
            raise ConfigError(
                f"model.vocab_size = {model.vocab_size} is not the {theirs} of {models.named(teacher)}; a "
                "student from scratch has its teacher's vocabulary and tokenizer: leave model.vocab_size out"
            )
        return
    mine, theirs_by_token = (models.load_tokenizer(one).get_vocab() for one in (model, teacher))
    if mine != theirs_by_token:
        shared = len(mine.items() & theirs_by_token.items())
        raise ConfigError(
            f"{models.named(model)} and {models.named(teacher)} have different vocabularies: {len(mine):,} "
            f"and {len(theirs_by_token):,} tokens, {shared:,} of them the same by the same number, so that "
            "their predictions do not compare. Name a teacher of the model's own family, or a model from "
            "scratch, which takes its teacher's tokenizer"
        )
