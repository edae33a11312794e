"""Several studies side by side: their verdicts, their best against their own baselines, their baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES, Row
from raydisp.config.search import Objective
from raydisp.figures.chart import Axis, Band, Chart, Line, Panel, Plot, Points, Rule, shortened
from raydisp.figures.style import ACCENT, styles_of
from raydisp.results import Tables


def verdicts_panel(judged: Mapping[str, Sequence[Row]]) -> Panel:
    """The arms of all confirm phases: mean paired differences with their intervals.

    Args:
        judged: study -> rows of `verdict.verdicts`.
    """
    title = "Verdicts"
    units: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for study, rows in judged.items():
        for row in rows:
            if row["num_pairs"]:
                units.setdefault((row["primary_outcome"], row["unit"]), []).append((study, row))
    plots = []
    for number, ((outcome, unit), pairs) in enumerate(units.items()):
        places = [0.0 - place for place in range(len(pairs))]
        label = MEASURES[outcome].label if outcome in MEASURES else outcome
        bounds = {row["smallest_effect"] for _, row in pairs}
        bands = [Band("", "x", -bound, bound, legend=False) for bound in bounds] if len(bounds) == 1 else []
        chart = Chart(
            Axis(f"{label}, arm minus baseline ({unit})"),
            _names_axis([(study, row["arm"]) for study, row in pairs]),
            [
                *bands,
                Rule(0),
                Points(
                    "mean and 95 % interval",
                    [row["difference"] for _, row in pairs],
                    places,
                    colour=ACCENT,
                    symbol="square",
                    size=10,
                    x_ends=[(row["low_95"], row["high_95"]) for _, row in pairs],
                    hover=[f"{study}: {row['sentence']}" for study, row in pairs],
                    legend=False,
                ),
            ],
        )
        plots.append(Plot(f"verdicts-{number}", label, chart, rows=2 * len(pairs)))
    if not plots:
        return Panel(title, "No figure: no study has a confirm phase with a complete pair of runs.")
    sentence = (
        "Each square is an arm's mean paired difference from its own study's baseline over fresh seeds, with "
        "its 95 % interval (left of 0 is better; units at the axis)."
    )
    if any(len({row["smallest_effect"] for _, row in pairs}) == 1 for pairs in units.values()):
        sentence += " The band is what would not matter."
    return Panel(title, sentence, plots)


def gain_panel(compared: pa.Table) -> Panel:
    """The best of each arm against its own baseline.

    Args:
        compared: what `report.comparison.compare` made of the studies.
    """
    title = "Best of each search"
    rows = [row for row in compared.to_pylist() if row["difference"] is not None]
    if not rows:
        return Panel(title, "No figure: no study has a best trial and a baseline of equal tokens.")
    plots = []
    for number, metric in enumerate(dict.fromkeys(row["metric"] for row in rows)):
        own = [row for row in rows if row["metric"] == metric]
        digits = MEASURES[metric].digits
        unit = MEASURES[metric].unit or "no unit"
        chart = Chart(
            Axis(f"{MEASURES[metric].label}, best minus baseline ({unit})"),
            _names_axis([(row["study"], row["arm"]) for row in own]),
            [
                Rule(0),
                Points(
                    "best",
                    [row["difference"] for row in own],
                    [0.0 - place for place in range(len(own))],
                    colour=ACCENT,
                    symbol="diamond",
                    size=10,
                    hover=[
                        f"trial {row['best_trial']}: {row['difference']:+.{digits}f}\n{row['description']}"
                        for row in own
                    ],
                    legend=False,
                ),
            ],
        )
        plots.append(Plot(f"gain-{number}", metric, chart, rows=2 * len(own)))
    sentence = (
        "Each diamond is the best search trial of an arm minus its own study's baseline, at equal tokens "
        "(units at the axis); the best of many on one seed is lucky: a lead and no verdict."
    )
    return Panel(title, sentence, plots)


def profiles_panel(studies: Sequence[tuple[str, Tables, Objective]]) -> Panel:
    """Condensation of every study's baseline and best, by depth."""
    title = "Condensation by depth"
    styles = styles_of(name for name, _, _ in studies)
    marks = []
    for name, tables, objective in studies:
        colour, symbol = styles[name]
        rows = [
            ("baseline", analysis.baseline_row(tables.trials, objective)),
            ("best", analysis.best_trial(tables.trials, objective)),
        ]
        for what, row in rows:
            if row is None or tables.layers.num_rows == 0:
                continue
            if profile := analysis.layer_profile(tables.layers, row["trial"]):
                marks.append(
                    Line(
                        f"{shortened(name)}, {what}",
                        profile.depth_frac,
                        profile.cosine_mean,
                        colour=colour,
                        dash="dash" if what == "baseline" else "solid",
                        symbol=symbol,
                        template=".3f",
                    )
                )
    if not marks:
        return Panel(title, "No figure: no study has a measure of condensation.")
    chart = Chart(Axis("depth (fraction of the layers)"), Axis("mean cosine between tokens"), marks)
    sentence = (
        "Mean cosine between the tokens of a sequence (no unit) against depth (0: embedding output, 1: after "
        "the final norm) at the last evaluation, of each study's baseline (dashed) and best trial."
    )
    return Panel(title, sentence, [Plot("profiles", "", chart)])


def _names_axis(names: Sequence[tuple[str, str]]) -> Axis:
    """Rows named by their study and arm."""
    ticks = tuple(
        (0.0 - place, f"{shortened(study, 20)}: {shortened(arm, 16)}")
        for place, (study, arm) in enumerate(names)
    )
    return Axis("", ends=(-len(names) + 0.4, 0.6), ticks=ticks, grid=False)
