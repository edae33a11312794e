"""Words that the figures share: what an objective is called, what was not drawn, what is at the pointer."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES
from raydisp.config.search import Objective


def capitalised(text: str) -> str:
    """`str.capitalize` would make "spearman rho" of "Spearman rho", and "kendall tau-b"."""
    return text[:1].upper() + text[1:]


def better(objective: Objective) -> str:
    """`lower`, or `higher`."""
    return "lower" if objective.mode == "min" else "higher"


def unit(metric: str) -> str:
    """`in nats per token`, or `no unit`."""
    return f"in {MEASURES[metric].unit}" if MEASURES[metric].unit else "no unit"


def dashes(trials: pa.Table, objective: Objective) -> str:
    """Names the dashed line of the baseline, where there is one."""
    if analysis.compared_baseline(trials, objective) is None:
        return ""
    return ", the dashed line is the baseline (no dispersion)"


def unseen(trials: pa.Table, objective: Objective) -> str:
    """What a figure of the search leaves out: trials without a value, and those of another budget."""
    rows = analysis.search_trials(trials).to_pylist()
    seen = [row for row in rows if analysis.value_of(row, objective.metric) is not None]
    note = ""
    if missing := len(rows) - len(seen):
        note += f" Not drawn, for want of a value: {missing} of {len(rows)} trials."
    if others := len(seen) - len(analysis.scored(trials, objective)):
        tokens = analysis.compared_tokens(trials, objective)
        note += (
            f" Not drawn, since they saw different numbers of tokens and do not compare: {others} of "
            f"{len(rows)} trials; all that are drawn saw {tokens:,}."
        )
    baseline = analysis.value_of(analysis.baseline_row(trials, objective), objective.metric)
    if baseline is not None and analysis.compared_baseline(trials, objective) is None:
        note += " The baseline saw another number of tokens and is not drawn."
    return note


def hover_texts(trials: pa.Table, numbers: Sequence[int], objective: Objective) -> list[str]:
    """Per trial: its number, arm, value and searched fields, a line each."""
    fields, metric = analysis.searched_fields(trials), objective.metric
    columns = list(dict.fromkeys(["trial", "arm", metric, *fields]))
    rows = {row["trial"]: row for row in trials.select(columns).to_pylist()}
    several = len(analysis.search_arms(trials)) > 1
    texts = []
    for number in numbers:
        row = rows[number]
        lines = [f"trial {number}" + (f", {row['arm']}" if several else "")]
        lines.append(f"{metric} {analysis.format_measure(metric, row[metric])}")
        lines += [f"{name} {analysis.format_value(row[name])}" for name in fields if row[name] is not None]
        texts.append("\n".join(" ".join(line.split()) for line in lines))
    return texts
