"""From the results' tables to what a report or a summary shows: tables in, tables and sentences out.

Nothing here reads or writes files. Missing stays null: a value that a trial does not have, or that is not
finite, is never compared and never becomes 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydisp.results import NUM_HISTOGRAM_BINS, STATUSES, TRIAL_COLUMNS
from raydisp.search_config import Objective

Row = dict[str, Any]
"""One row of `trials`: column name -> Python value, None where it is null."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a numeric column of `trials` is written for people."""

    label: str
    unit: str
    """Empty where the quantity has none."""
    digits: int
    """Decimals that are worth printing."""

    @property
    def axis(self) -> str:
        """Title of an axis: `validation loss (nats per token)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


MEASURES: dict[str, Measure] = {
    "val_loss": Measure("validation loss", "nats per token", 3),
    "val_perplexity": Measure("validation perplexity", "", 1),
    "val_bits_per_byte": Measure("validation loss", "bits per byte", 4),
    "test_loss": Measure("test loss", "nats per token", 4),
    "test_perplexity": Measure("test perplexity", "", 1),
    "train_loss": Measure("training loss", "nats per token", 3),
    "layer_cosine_mean": Measure("mean cosine over the layers", "", 3),
    "spearman": Measure("Spearman rho of cosine against layer", "", 2),
    "kendall": Measure("Kendall tau-b of cosine against layer", "", 2),
    "tokens_per_s": Measure("training speed", "tokens per second", 0),
    "train_s": Measure("training time", "s", 1),
    "peak_memory_bytes": Measure("peak memory", "bytes", 0),
}

MAX_FRONT_SHOWN = 8
"""Trials of a Pareto front that a sentence names."""

DOSE_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("weight", pa.float64()),
        ("temperature", pa.float64()),
        ("weight_per_temperature", pa.float64()),
        ("layers", pa.string()),
        ("value", pa.float64()),
    ]
)

HISTORY_SCHEMA = pa.schema([("trial", pa.int32()), ("value", pa.float64()), ("best", pa.float64())])


# --- rows ----------------------------------------------------------------------------------------------


def searched_fields(trials: pa.Table) -> list[str]:
    """Dotted names of the fields that the study searches, in the order of its file."""
    return [name for name in trials.column_names if name not in TRIAL_COLUMNS]


def search_trials(trials: pa.Table) -> pa.Table:
    """The rows that the search suggested, whatever became of them; the baseline is not among them."""
    in_search = pc.equal(trials["phase"], "search")
    return trials.filter(pc.and_(in_search, pc.not_equal(trials["arm"], "baseline")))


def baseline_row(trials: pa.Table, objective: Objective) -> Row | None:
    """The baseline's row of the search phase, the best where it is searched too; one without a value, of any
    status, where none has one; None where there is none yet."""
    in_search = pc.equal(trials["phase"], "search")
    rows = trials.filter(pc.and_(in_search, pc.equal(trials["arm"], "baseline"))).to_pylist()
    sign = 1.0 if objective.mode == "min" else -1.0
    scored = [(sign * value, row) for row in rows if (value := value_of(row, objective.metric)) is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else next(iter(rows), None)


def search_arms(trials: pa.Table) -> list[str]:
    """Names of the arms of the search but the baseline, in the order of their first trials."""
    return list(dict.fromkeys(search_trials(trials).sort_by("trial")["arm"].to_pylist()))


def of_arm(trials: pa.Table, arm: str) -> pa.Table:
    """The rows of one arm and of the baseline."""
    return trials.filter(pc.is_in(trials["arm"], pa.array([arm, "baseline"], pa.string())))


def value_of(row: Row | None, metric: str) -> float | None:
    """A metric of a completed trial; None where it is missing, not finite, or the trial did not complete."""
    if row is None or row["status"] != "completed":
        return None
    value = row.get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def same_budget(row: Row, other: Row) -> bool:
    """Whether two trials saw the same number of tokens; only then do their values compare."""
    return row["num_tokens"] is not None and bool(row["num_tokens"] == other["num_tokens"])


def count_statuses(trials: pa.Table) -> dict[str, int]:
    """Status -> number of rows, in the order of `results.STATUSES`; statuses without a row are left out."""
    counts = Counter(trials["status"].to_pylist())
    known = {status: counts.pop(status) for status in STATUSES if status in counts}
    return known | {str(status): number for status, number in counts.items()}


def best_trial(trials: pa.Table, objective: Objective) -> Row | None:
    """The completed search trial with the best objective; the first of equals; None where there is none."""
    scored = _scored(trials, objective)
    if not scored:
        return None
    return min(scored, key=lambda item: item[1] if objective.mode == "min" else -item[1])[0]


def _scored(trials: pa.Table, objective: Objective) -> list[tuple[Row, float]]:
    rows = search_trials(trials).sort_by("trial").to_pylist()
    pairs = [(row, value_of(row, objective.metric)) for row in rows]
    return [(row, value) for row, value in pairs if value is not None]


def pareto_front(trials: pa.Table, *objectives: Objective) -> pa.Table:
    """The completed search trials of which no other is at least as good in all objectives and better in one.

    Only trials of the same number of tokens compare: those of the most tokens, where they differ.

    Returns:
        One row per trial of the front, best first by the first objective: study, phase, trial, attempt,
        num_tokens, and a column per objective.
    """
    needed = dict.fromkeys(["study", "phase", "trial", "attempt", "num_tokens", "status"])
    table = search_trials(trials).select([*needed | dict.fromkeys(one.metric for one in objectives)])
    rows = [row for row in table.sort_by("trial").to_pylist() if row["num_tokens"] is not None]
    rows = [row for row in rows if all(value_of(row, one.metric) is not None for one in objectives)]
    most = max((row["num_tokens"] for row in rows), default=0)
    rows = [row for row in rows if row["num_tokens"] == most]
    signs = [1.0 if one.mode == "min" else -1.0 for one in objectives]
    points = [
        tuple(row[one.metric] * sign for one, sign in zip(objectives, signs, strict=True)) for row in rows
    ]
    # In this order no point betters one before it, and the first objective of those before is as good: only
    # the others must be compared, with the distinct points of the front so far.
    front = np.empty((len(rows), len(objectives) - 1))
    kept: list[Row] = []
    last, number = None, 0
    for index in sorted(range(len(rows)), key=points.__getitem__):
        point = points[index]
        if point != last:
            if (front[:number] <= np.array(point[1:])).all(axis=1).any():
                continue
            front[number] = point[1:]
            last, number = point, number + 1
        kept.append(rows[index])
    columns = ("study", "phase", "trial", "attempt", "num_tokens")
    schema = pa.schema(
        [
            *[(name, TRIAL_COLUMNS[name]) for name in columns],
            *[(one.metric, pa.float64()) for one in objectives],
        ]
    )
    picked = [{name: row[name] for name in schema.names} for row in kept]
    return pa.Table.from_pylist(picked, schema=schema)


def _dominates(row: Row, other: Row, objectives: Sequence[Objective]) -> bool:
    pairs = [
        (row[one.metric], other[one.metric]) if one.mode == "min" else (-row[one.metric], -other[one.metric])
        for one in objectives
    ]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def trial_field(row: Row, name: str) -> Any:
    """A field of a trial by its dotted name, searched or not; None where the row does not tell."""
    if row.get(name) is not None:
        return row[name]
    try:
        node = json.loads(row.get("config_json") or "null")
    except ValueError:
        return None
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


# --- tables --------------------------------------------------------------------------------------------


def search_history(trials: pa.Table, objective: Objective) -> pa.Table:
    """Objective of the completed search trials by trial number, and the best so far (HISTORY_SCHEMA)."""
    better = min if objective.mode == "min" else max
    rows: list[Row] = []
    for row, value in _scored(trials, objective):
        best = better(rows[-1]["best"], value) if rows else value
        rows.append({"trial": row["trial"], "value": value, "best": best})
    return pa.Table.from_pylist(rows, schema=HISTORY_SCHEMA)


def dose_response(trials: pa.Table, objective: Objective) -> pa.Table:
    """Objective of the completed search trials beside the dose that each got (DOSE_SCHEMA).

    For temperatures of 1 or more the loss is nearly linear in the distances, and only weight / temperature
    can be told apart: hence the third column. Fields that are not searched come from the trial's own
    configuration. A list of layers is written as JSON.
    """
    rows: list[Row] = []
    for row, value in _scored(trials, objective):
        weight = _number(trial_field(row, "dispersion.weight"))
        temperature = _number(trial_field(row, "dispersion.temperature"))
        layers = trial_field(row, "dispersion.layers")
        relative = weight / temperature if weight is not None and temperature else None
        rows.append(
            {
                "trial": row["trial"],
                "weight": weight,
                "temperature": temperature,
                "weight_per_temperature": relative,
                "layers": layers if layers is None or isinstance(layers, str) else json.dumps(layers),
                "value": value,
            }
        )
    return pa.Table.from_pylist(rows, schema=DOSE_SCHEMA)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """Condensation of one trial at one evaluation, layer by layer, from the embedding output up."""

    trial: int
    step: int
    layer: list[int]
    cosine_mean: list[float | None]
    histogram: list[list[int] | None]
    """Counts of pairwise cosines in NUM_HISTOGRAM_BINS equal bins on [-1, 1]."""

    @property
    def depth_frac(self) -> list[float]:
        """Layer number over the last layer's: 0 is the embedding output, 1 is after the final norm."""
        return [number / max(self.layer[-1], 1) for number in self.layer]

    def density(self) -> list[list[float] | None]:
        """Per layer, the share of token pairs per unit of cosine; each layer integrates to 1 over [-1, 1]."""
        bin_width = 2 / NUM_HISTOGRAM_BINS
        return [
            [count / (total * bin_width) for count in counts] if counts and (total := sum(counts)) else None
            for counts in self.histogram
        ]


def layer_profile(layers: pa.Table, trial: int) -> LayerProfile | None:
    """Condensation of a trial at its last evaluation; None where it was never measured."""
    rows = layers.filter(pc.equal(layers["trial"], trial))
    if rows.num_rows == 0:
        return None
    step = pc.max(rows["step"])
    rows = rows.filter(pc.equal(rows["step"], step)).sort_by("layer")
    return LayerProfile(
        trial=trial,
        step=step.as_py(),
        layer=rows["layer"].to_pylist(),
        cosine_mean=rows["cosine_mean"].to_pylist(),
        histogram=rows["histogram"].to_pylist(),
    )


# --- sentences -----------------------------------------------------------------------------------------


def format_value(value: float | int | bool | str | None) -> str:
    """A field's value for people: three significant digits, thousands kept whole; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        # 'g' alone turns 12345.0 into 1.23e+04, which nobody reads gladly.
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)


def format_measure(metric: str, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{MEASURES[metric].digits}f}"


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
            f"{arm}: {sentence[:1].lower()}{sentence[1:]}"
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
    number = len(_scored(trials, objective))
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
