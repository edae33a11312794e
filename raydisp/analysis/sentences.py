"""What a search found, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from raydisp.analysis.measures import MEASURES, Measure, format_measure, format_value
from raydisp.analysis.rows import (
    Row,
    baseline_row,
    best_trial,
    count_statuses,
    of_arm,
    same_budget,
    scored,
    search_arms,
    search_trials,
    searched_fields,
    trial_field,
    value_of,
)
from raydisp.analysis.search import pareto_front
from raydisp.config.search import Objective

MAX_FRONT_SHOWN = 8
"""Trials of a Pareto front that a sentence names."""


def describe_trial(row: Row, fields: list[str]) -> str:
    """The searched values of a trial: `weight 0.8, temperature 1.2, layers all`."""
    leaves = Counter(name.rsplit(".", 1)[-1] for name in fields)
    parts = []
    for name in fields:
        if row.get(name) is None and trial_field(row, name) is not None:
            continue  # not searched in this trial: its condition did not hold
        leaf = name.rsplit(".", 1)[-1]
        # The short name, unless two searched fields share it.
        parts.append(f"{leaf if leaves[leaf] == 1 else name} {format_value(row.get(name)) or 'null'}")
    return ", ".join(parts)


def summarise(trials: pa.Table, *objectives: Objective) -> tuple[str, ...]:
    """What a search found, in sentences: each objective against the baseline's, and condensation; with
    several objectives their Pareto front first.

    A search tries many arms on one seed and keeps the luckiest, so no sentence calls its best a result. They
    also say what makes two values hard to compare: other fields that were searched, or unequal budgets.
    """
    arms = search_arms(trials)
    if len(arms) > 1:
        return tuple(
            f"{arm}: {_begun(sentence)}"
            for arm in arms
            for sentence in summarise(of_arm(trials, arm), *objectives)
        )
    baseline = baseline_row(trials, objectives[0])
    best = [best_trial(trials, objective) for objective in objectives]
    front = (_front_sentence(trials, objectives, baseline),) if len(objectives) > 1 else ()
    told = [
        _objective_sentence(trials, one, row, baseline) for one, row in zip(objectives, best, strict=True)
    ]
    return (*front, *told, _condensation_sentence(best[0], baseline))


def _begun(sentence: str) -> str:
    """A sentence as it goes on after a colon."""
    return sentence if sentence.startswith("Pareto") else f"{sentence[:1].lower()}{sentence[1:]}"


def _front_sentence(trials: pa.Table, objectives: Sequence[Objective], baseline: Row | None) -> str:
    metrics = [objective.metric for objective in objectives]
    wanted = ", ".join(f"{one.metric} ({one.mode})" for one in objectives)
    front = pareto_front(trials, *objectives).to_pylist()
    if not front:
        return f"No completed search trial has all of {wanted}: there is no Pareto front."
    shown = "; ".join(
        f"trial {row['trial']} ("
        + ", ".join(f"{metric} {format_measure(metric, row[metric])}" for metric in metrics)
        + ")"
        for row in front[:MAX_FRONT_SHOWN]
    )
    more = f"; and {len(front) - MAX_FRONT_SHOWN} more" if len(front) > MAX_FRONT_SHOWN else ""
    ours = [value_of(baseline, metric) for metric in metrics]
    if baseline is None or None in ours or not same_budget(baseline, front[0]):
        against = "the baseline has no values to compare"
    else:
        better = [row["trial"] for row in front if _dominates(row, baseline, objectives)]
        against = "none is better than the baseline without being worse in another of them"
        if better:
            plural = len(better) > 1
            told = ", ".join(map(str, better[:MAX_FRONT_SHOWN]))
            told += f" and {len(better) - MAX_FRONT_SHOWN} more" if len(better) > MAX_FRONT_SHOWN else ""
            against = (
                f"trial{'s' if plural else ''} {told} {'are' if plural else 'is'} better than the baseline "
                "in one of them and no worse in the others"
            )
    return f"Pareto front over {wanted}: {shown}{more}; {against}."


def _objective_sentence(
    trials: pa.Table, objective: Objective, best: Row | None, baseline: Row | None
) -> str:
    metric, mode = objective.metric, objective.mode
    counts = count_statuses(search_trials(trials))
    others = ", ".join(f"{number} {status}" for status, number in counts.items() if status != "completed")
    if best is None:
        return _nothing_found(counts, others, metric)

    measure = MEASURES[metric]
    fields = searched_fields(trials)
    best_value = best[metric]
    number = len(scored(trials, objective))
    sentence = f"Best of {number}" + (f" completed ({others})" if others else "")
    sentence += f": trial {best['trial']} with {metric} {best_value:.{measure.digits}f}"
    if description := describe_trial(best, fields):
        sentence += f" ({description})"

    baseline_value = value_of(baseline, metric)
    if baseline is None or baseline_value is None:
        state = "has not run yet" if baseline is None else f"is {baseline['status']} and has no {metric}"
        return f"{sentence}; the baseline {state}, so nothing can be said about dispersion's effect."

    if not same_budget(best, baseline):
        shown = f"{baseline_value:.{measure.digits}f} after {_tokens(baseline)} tokens"
        return f"{sentence} after {_tokens(best)} tokens; the baseline's {shown} does not compare with it."
    sentence += f", {_difference(best_value, baseline_value, measure)}"
    caveats = []
    if (best_value >= baseline_value) if mode == "min" else (best_value <= baseline_value):
        caveats.append("no trial did better than the baseline")
    # A study that names arms tunes the baseline over what all of them share.
    confounded = [name for name in fields if not name.startswith("dispersion.")]
    if confounded and best["arm"] == "search":
        caveats.append(f"{' and '.join(confounded)} varied too, so the difference is not dispersion's alone")
    if metric != "val_loss" and (loss := value_of(best, "val_loss")) is not None:
        base_loss = value_of(baseline, "val_loss")
        against = "" if base_loss is None else f", {_difference(loss, base_loss, MEASURES['val_loss'])}"
        caveats.append(f"its val_loss is {loss:.{MEASURES['val_loss'].digits}f}{against}")
    caveats.append("one seed, so this is a lead and not a verdict")
    return f"{sentence}; {'; '.join(caveats)}."


def _nothing_found(counts: dict[str, int], others: str, metric: str) -> str:
    if completed := counts.get("completed"):
        all_counts = f"{completed} completed" + (f", {others}" if others else "")
        return f"No completed search trial has a {metric} ({all_counts}): there is no best trial."
    if not counts:
        return "No search trial has ended yet: nothing was found so far."
    return f"No search trial completed ({others}): nothing can be said about dispersion."


def _difference(value: float, baseline: float, measure: Measure) -> str:
    """`0.105 nats below the baseline's 5.235`."""
    unit = {"nats per token": " nats", "": ""}.get(measure.unit, f" {measure.unit}")
    shown = f"the baseline's {baseline:.{measure.digits}f}"
    if value == baseline:
        return f"equal to {shown}"
    difference = abs(value - baseline)
    smallest = 10**-measure.digits
    if difference < smallest:
        return f"within {smallest:.{measure.digits}f}{unit} of {shown}"
    return f"{difference:.{measure.digits}f}{unit} {'below' if value < baseline else 'above'} {shown}"


def _tokens(row: Row) -> str:
    return "an unknown number of" if row["num_tokens"] is None else f"{row['num_tokens']:,}"


def _condensation_sentence(best: Row | None, baseline: Row | None) -> str:
    lead = "Condensation, the mean cosine between tokens over the layers,"
    digits = MEASURES["layer_cosine_mean"].digits
    ours, theirs = value_of(best, "layer_cosine_mean"), value_of(baseline, "layer_cosine_mean")
    in_best = "" if best is None or ours is None else f"{ours:.{digits}f} in trial {best['trial']}"
    in_baseline = "" if theirs is None else f"{theirs:.{digits}f} in the baseline"
    if ours is None or theirs is None:
        if not (in_best or in_baseline):
            return f"{lead} is known neither for a best trial nor for the baseline."
        missing = "the baseline has none" if in_best else "no best trial has one"
        return f"{lead} is {in_best or in_baseline}; {missing} to compare with it."
    if abs(ours - theirs) < 10**-digits:
        judgement = "the two are equally condensed"
    else:
        judgement = f"the trial's layers are {'more dispersed' if ours < theirs else 'more condensed'}"
    return f"{lead} is {in_best} and {in_baseline}: {judgement}."


def _dominates(row: Row, other: Row, objectives: Sequence[Objective]) -> bool:
    pairs = [
        (row[one.metric], other[one.metric]) if one.mode == "min" else (-row[one.metric], -other[one.metric])
        for one in objectives
    ]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)
