"""The search as it went: every trial, and the best so far of each arm."""

from __future__ import annotations

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES
from raydisp.config.search import Objective
from raydisp.figures import words
from raydisp.figures.chart import (
    Axis,
    Chart,
    Line,
    Mark,
    Panel,
    Plot,
    Points,
    point_opacity,
    point_size,
    shortened,
)
from raydisp.figures.style import ACCENT, MUTED, styles_of


def history_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Objective by trial, the best so far of each arm, and the baseline."""
    title = "Search history"
    rows = analysis.search_history(trials, objective).to_pylist()
    metric = objective.metric
    if not rows:
        return Panel(title, f"No figure: no search trial has completed with a {metric}.")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    styles = styles_of(arms)
    marks: list[Mark] = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        numbers = [row["trial"] for row in own]
        alone = len(arms) == 1
        colour, symbol = (MUTED, "circle") if alone else styles[arm]
        marks.append(
            Points(
                name="trial" if alone else shortened(arm),
                x=numbers,
                y=[row["value"] for row in own],
                colour=colour,
                symbol=symbol,
                size=point_size(len(rows)),
                opacity=point_opacity(len(rows)),
                hover=words.hover_texts(trials, numbers, objective),
            )
        )
        marks.append(
            Line(
                name="best so far" if alone else f"best so far: {shortened(arm)}",
                x=numbers,
                y=[row["best"] for row in own],
                colour=ACCENT if alone else colour,
                steps=True,
                legend=alone,
            )
        )
    ends = (rows[0]["trial"] - 0.5, rows[-1]["trial"] + 0.5)
    marks += baseline_line(
        trials, objective, ends, name="baseline's best" if "baseline" in arms else "baseline"
    )
    ticks = tuple((row["trial"], str(row["trial"])) for row in rows) if len(rows) <= 12 else None
    sentence = (
        "Each point is a completed search trial, the line is the best so far"
        + (" of its arm" if len(arms) > 1 else "")
        + f" ({words.better(objective)} is better){words.dashes(trials, objective)}; {words.unit(metric)}."
    )
    axes = Axis("trial", ends=ends, ticks=ticks, whole=True), Axis(MEASURES[metric].axis)
    return Panel(
        title, sentence + words.unseen(trials, objective), [Plot("history", "", Chart(*axes, marks))]
    )


def baseline_line(
    trials: pa.Table, objective: Objective, ends: tuple[float, float], *, name: str = "baseline"
) -> list[Mark]:
    """The baseline as a dashed line between two places of x; nothing where it does not compare."""
    value = analysis.compared_baseline(trials, objective)
    if value is None:
        return []
    digits = f".{MEASURES[objective.metric].digits}f"
    return [Line(name, list(ends), [value, value], width=1.5, dash="dash", template=digits)]
