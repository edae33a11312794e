"""Several objectives: the trials in pairs of them, and the front of all."""

from __future__ import annotations

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES
from raydisp.config.search import Objective
from raydisp.figures import words
from raydisp.figures.chart import (
    Axis,
    Chart,
    Mark,
    Panel,
    Plot,
    Points,
    point_size,
)
from raydisp.figures.style import ACCENT, INK, MUTED


def front_panel(trials: pa.Table, objectives: tuple[Objective, ...]) -> Panel:
    """The trials in pairs of objectives, with the front of all of them."""
    title = "Pareto front"
    if len(objectives) < 2:
        return Panel(title, "No figure: the study has one objective.")
    front = analysis.pareto_front(trials, *objectives).to_pylist()
    if not front:
        return Panel(title, "No figure: no completed search trial has all of the objectives.")
    tokens = front[0]["num_tokens"]
    on_front = {row["trial"] for row in front}
    first = objectives[0]
    plots = []
    for place, other in enumerate(objectives[1:]):
        rows = [
            row
            for row in analysis.search_trials(trials).to_pylist()
            if row["num_tokens"] == tokens
            and analysis.value_of(row, first.metric) is not None
            and analysis.value_of(row, other.metric) is not None
        ]
        marks: list[Mark] = []
        for name, group, (colour, symbol) in (
            ("trial", [row for row in rows if row["trial"] not in on_front], (MUTED, "circle")),
            ("Pareto front", [row for row in rows if row["trial"] in on_front], (ACCENT, "diamond")),
        ):
            if group:
                marks.append(
                    Points(
                        name,
                        [row[first.metric] for row in group],
                        [row[other.metric] for row in group],
                        colour=colour,
                        symbol=symbol,
                        size=point_size(len(rows)),
                        hover=words.hover_texts(trials, [row["trial"] for row in group], first),
                    )
                )
        baseline = analysis.baseline_row(trials, first)
        ours = [analysis.value_of(baseline, one.metric) for one in (first, other)]
        if baseline is not None and None not in ours and baseline["num_tokens"] == tokens:
            marks.append(Points("baseline", [ours[0]], [ours[1]], colour=INK, symbol="square-open", size=11))
        chart = Chart(Axis(MEASURES[first.metric].axis), Axis(MEASURES[other.metric].axis), marks)
        plots.append(Plot(f"front-{place}", f"{first.metric} and {other.metric}", chart))
    aims = ", ".join(f"{one.metric} ({words.better(one)} is better)" for one in objectives)
    sentence = (
        "Each point is a completed search trial, the diamonds are those that no other betters in all of "
        f"{aims}; at {tokens:,} tokens, units at the axes."
    )
    return Panel(title, sentence, plots)
