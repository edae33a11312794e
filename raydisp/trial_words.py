"""What the plan of a study says of one of its trials: model, training, evaluations, methods."""

from __future__ import annotations

from raydisp.config import StudyConfig
from raydisp.config.model import HubModel, ModelConfig, ScratchModel
from raydisp.layers import resolve_layers
from raydisp.models import ModelSummary
from raydisp.schedules import WeightSchedule
from raydisp.search.stopping import evaluation_tokens, full_tokens


def describe_model(model: ModelConfig, sizes: ModelSummary | None) -> str:
    """Where a model comes from, and how large it is, if that is known."""
    if isinstance(model, ScratchModel):
        origin = f"{model.family} from scratch"
    else:
        origin = f"{model.id} from the hub" if isinstance(model, HubModel) else model.path
    if sizes is None:
        return f"{origin}, its size not known yet"
    return (
        f"{origin}: {sizes.num_parameters:,} parameters, {sizes.num_layers} layers, "
        f"{sizes.hidden_size} features, vocabulary {sizes.vocab_size:,}"
    )


def describe_teacher(study: StudyConfig, sizes: ModelSummary | None) -> list[str]:
    """The model that is distilled from, where there is one."""
    settings = study.distillation
    if settings.teacher is None:
        return []
    copy = "a whole copy on every worker"
    if sizes is not None:
        copy += f", {rounded(4 * sizes.num_parameters)}B in float32"
    return [
        describe_model(settings.teacher, sizes),
        f"distillation: weight {settings.weight:g}, temperature {settings.temperature:g}; {copy}",
    ]


def describe_training(study: StudyConfig) -> str:
    """Steps, tokens and what they are done with."""
    train = study.train
    return (
        f"{study.num_steps:,} steps x {train.global_batch_tokens:,} tokens "
        f"({study.sequences_per_step} sequences) = {full_tokens(study):,} tokens per trial; peak "
        f"learning rate {train.learning_rate:g}, {train.strategy}, precision {train.precision}"
    )


def describe_evaluations(study: StudyConfig) -> str:
    """When a trial is evaluated, and on how much."""
    when = ["before the first step"]
    if study.evaluate.every_tokens is not None:
        when.append(f"every {evaluation_tokens(study):,} tokens")
    if steps := study.log_spaced_steps:
        shown = ", ".join(map(str, steps[:4])) + (", ..." if len(steps) > 4 else "")
        when.append(f"after {count(len(steps), 'log-spaced step')} ({shown})")
    most = study.evaluate.max_tokens
    told = "the whole split" if most is None else f"{most:,} tokens"
    return f"{', '.join(when)}, on {told}; at the end on the whole split"


def num_evaluations(study: StudyConfig) -> int:
    """Of a trial that is not stopped."""
    between = study.steps_between(study.evaluate.every_tokens) or study.num_steps
    log_spaced = sum(step % between != 0 for step in study.log_spaced_steps)
    return 2 + (study.num_steps - 1) // between + log_spaced


def describe_dispersion(study: StudyConfig, sizes: ModelSummary | None) -> str:
    """The dispersion term where the search does not vary it."""
    settings = study.dispersion
    layers = str(settings.layers)
    if sizes is not None:
        layers += f" ({', '.join(map(str, resolve_layers(settings.layers, sizes.num_layers)))})"
    text = (
        f"{settings.variant}, weight {settings.weight:g}, temperature {settings.temperature:g}, layers "
        f"{layers}, clamp {settings.clamp:g}"
    )
    schedule = WeightSchedule(
        study.num_steps,
        settings.schedule,
        warmup_frac=settings.warmup_frac,
        start_frac=settings.start_frac,
    )
    return f"{text}; {schedule.describe()}" if settings.schedule != "constant" else text


def describe_embeddings(study: StudyConfig) -> list[str]:
    """The methods that are compared with dispersion, where the study file itself switches them on."""
    noisy, forgetting = study.noisy_embedding, study.active_forgetting
    lines = []
    if noisy.alpha:
        lines.append(f"noise of alpha {noisy.alpha:g} on the input embeddings while training")
    if forgetting.every_steps is not None:
        lines.append(
            f"input embeddings drawn anew every {forgetting.every_steps:,} steps, "
            f"{count((study.num_steps - 1) // forgetting.every_steps, 'time')} in all; their peak "
            f"learning rate {forgetting.learning_rate:g}"
        )
    return lines


def count(number: int, noun: str) -> str:
    """`1 trial`, `1,200 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """`950`, `1.3 M`: three digits of a large number."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} G"
