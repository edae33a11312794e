"""Figures of a study: tables -> charts, each with a sentence that says what it shows.

A figure that lacks its data is left out, and its sentence says why. Each room of this package has one idea;
`interactive` and `paper` draw what the others made.
"""

from __future__ import annotations

from collections.abc import Sequence

from raydisp.config.search import Objective
from raydisp.figures.benchmarks import benchmark_panel
from raydisp.figures.chart import Chart, Panel, Plot
from raydisp.figures.condensation import against_panel, heat_map_panel, profile_panel, trend_panel
from raydisp.figures.dose import dose_panel, surface_panel
from raydisp.figures.fields import importance_panel, parallel_panel
from raydisp.figures.front import front_panel
from raydisp.figures.history import history_panel
from raydisp.figures.training import curves_panel, time_line_panel
from raydisp.figures.verdict import cost_panel, verdict_panel
from raydisp.results import Tables

__all__ = ["Chart", "Panel", "Plot", "benchmark_panel", "build_panels", "verdict_panel"]


def build_panels(tables: Tables, objectives: Sequence[Objective]) -> list[Panel]:
    """The figures of a study but the verdict's, in the order of the page."""
    trials, first = tables.trials, objectives[0]
    return [
        history_panel(trials, first),
        *(dose_panel(trials, one, first=one is first) for one in objectives),
        surface_panel(trials, first),
        *([front_panel(trials, tuple(objectives))] if len(objectives) > 1 else []),
        profile_panel(tables, first),
        heat_map_panel(tables, first),
        trend_panel(tables, first),
        against_panel(trials, first),
        parallel_panel(trials, first),
        importance_panel(trials, first),
        curves_panel(tables, first),
        cost_panel(trials),
        time_line_panel(tables),
    ]
