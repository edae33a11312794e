"""Figures of a study: tables -> plotly figures, each with a sentence that says what it shows.

A figure that lacks its data is left out, and its sentence says why. Plotly reads a subset of HTML in labels,
so whatever comes from rows or from the study file is escaped for it here.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa

from raydisp import analysis, verdict
from raydisp.analysis import MEASURES, Row
from raydisp.layers import LAYER_CHOICES
from raydisp.results import NUM_HISTOGRAM_BINS, Tables
from raydisp.search_config import Objective

# --- colours -------------------------------------------------------------------------------------------

# Figures have the colours of the light page; in the dark, the page's script exchanges them.
INK, MUTED, GRID, ACCENT = "#1f2328", "#636c76", "#dfe3e8", "#0072b2"
DARK_COLOURS = {INK: "#e6edf3", MUTED: "#9aa4af", GRID: "#30363d", ACCENT: "#56b4e9", "#56b4e9": "#a8d8f5"}

# Okabe and Ito's colour-blind safe palette, with a symbol each so that nothing hangs on colour alone.
LAYER_STYLES = [
    ("#0072b2", "circle"),
    ("#d55e00", "square"),
    ("#009e73", "triangle-up"),
    ("#cc79a7", "diamond"),
    ("#e69f00", "cross"),
    ("#56b4e9", "x"),
]
OTHER_LAYERS = ("#636c76", "star")


@dataclasses.dataclass(frozen=True)
class Plot:
    """One drawing of a panel."""

    name: str
    """Unique on the page; letters, digits and '-'."""
    title: str
    """Plain text above the drawing; empty where the panel has no other."""
    figure: go.Figure


@dataclasses.dataclass(frozen=True)
class Panel:
    """A question, its drawings, and one or more sentences that say what they show.

    Without drawings the sentence says why there are none.
    """

    title: str
    sentence: str
    plots: list[Plot] = dataclasses.field(default_factory=list)


# --- figures -------------------------------------------------------------------------------------------


def build_panels(tables: Tables, objective: Objective) -> list[Panel]:
    """The figures of a study, in the order of the page."""
    trials = tables.trials
    return [
        history_panel(trials, objective),
        dose_panel(trials, objective),
        profile_panel(tables, objective),
        heat_map_panel(tables, objective),
    ]


def history_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Objective by trial, the best so far, and the baseline."""
    title = "Search history"
    history = analysis.search_history(trials, objective).to_pydict()
    metric = objective.metric
    if not history["trial"]:
        return Panel(title, f"No figure: no search trial has completed with a {metric}.")
    figure = _figure("trial", MEASURES[metric].axis)
    figure.add_scatter(
        name="trial",
        x=history["trial"],
        y=history["value"],
        mode="markers",
        marker={"color": MUTED} | _point_size(len(history["trial"])),
        hovertext=_hover_texts(trials, history["trial"], objective),
        hoverinfo="text",
    )
    figure.add_scatter(
        name="best so far",
        x=history["trial"],
        y=history["best"],
        mode="lines",
        line={"color": ACCENT, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    ends = [min(history["trial"]) - 0.5, max(history["trial"]) + 0.5]
    _add_baseline(figure, trials, objective, ends)
    figure.update_xaxes(range=ends, tickformat="d")
    if len(history["trial"]) <= 12:
        figure.update_xaxes(tickvals=history["trial"])
    sentence = (
        "Each point is a completed search trial, the line is the best so far "
        f"({_better(objective)} is better){_dashes(trials, objective)}; {_unit(metric)}."
    )
    return Panel(title, sentence + _unseen(trials, objective), [Plot("history", "", figure)])


def dose_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Objective against weight, and against weight / temperature where both vary.

    Weights below 0 have no logarithm: where there are any, the axis is linear, and 0 has a place on it.
    """
    title = "Dose-response"
    doses = [
        dose for dose in analysis.dose_response(trials, objective).to_pylist() if dose["weight"] is not None
    ]
    if not doses:
        return Panel(
            title, f"No figure: no search trial has completed with a weight and a {objective.metric}."
        )
    if all(dose["weight"] == 0 for dose in doses):
        return Panel(title, "No figure: every completed search trial has weight 0.")
    log = all(dose["weight"] >= 0 for dose in doses)
    drawn = [dose for dose in doses if dose["weight"] > 0 or not log]
    plots = [_dose_plot("weight", "dispersion weight", drawn, trials, objective, log=log)]
    relative = [dose for dose in drawn if dose["weight_per_temperature"] is not None]
    sentence = (
        f"{_capitalised(MEASURES[objective.metric].label)} of each completed search trial against the weight "
        f"of the dispersion loss (no unit, {'logarithmic' if log else 'linear'} axis), by the layers it acts "
        f"on; the ring is the best trial{_dashes(trials, objective)}; {_unit(objective.metric)}."
    )
    if all(len({dose[field] for dose in relative}) > 1 for field in ("weight", "temperature")):
        axis = "weight / temperature"
        plots.append(_dose_plot("weight_per_temperature", axis, relative, trials, objective, log=log))
        sentence += (
            " For temperatures of 1 and more the loss depends on little but weight / temperature, so that is "
            "drawn too."
        )
    if len(drawn) < len(doses):
        sentence += f" Weight 0 has no place on this axis: {len(doses) - len(drawn)} trials are not drawn."
    return Panel(title, sentence + _unseen(trials, objective), plots)


def _dose_plot(
    column: str, axis: str, doses: list[Row], trials: pa.Table, objective: Objective, *, log: bool
) -> Plot:
    figure = _figure(f"{axis} (log scale)" if log else axis, MEASURES[objective.metric].axis)
    for name, (colour, symbol), group in _by_layers(doses):
        figure.add_scatter(
            # A long list of layers would leave the legend no room; the hover text has all of it.
            name=_plotly_text(name if len(name) <= 24 else f"{name[:23]}…"),
            x=[dose[column] for dose in group],
            y=[dose["value"] for dose in group],
            mode="markers",
            marker={"color": colour, "symbol": symbol} | _point_size(len(doses)),
            hovertext=_hover_texts(trials, [dose["trial"] for dose in group], objective),
            hoverinfo="text",
        )
    best = analysis.best_trial(trials, objective)
    ringed = [dose for dose in doses if best is not None and dose["trial"] == best["trial"]]
    for dose in ringed:
        figure.add_scatter(
            name=f"best: trial {dose['trial']}",
            x=[dose[column]],
            y=[dose["value"]],
            mode="markers",
            marker={"symbol": "circle-open", "color": INK, "size": 17, "line": {"width": 1.5}},
            hoverinfo="skip",
        )
    low, high = min(dose[column] for dose in doses), max(dose[column] for dose in doses)
    # A little air; much of it around a single dose, so that the axis has more than one tick.
    if log:
        low, high = (low / 1.4, high * 1.4) if high > 2 * low else (low / 4, high * 4)
        figure.update_xaxes(type="log", range=[math.log10(low), math.log10(high)], **_log_ticks(low, high))
    else:
        air = 0.05 * (high - low) or abs(low)
        low, high = low - air, high + air
        figure.update_xaxes(range=[low, high])
    _add_baseline(figure, trials, objective, [low, high])
    return Plot(f"dose-{column.replace('_', '-')}", f"against {axis}", figure)


def _by_layers(doses: list[Row]) -> list[tuple[str, tuple[str, str], list[Row]]]:
    """Doses grouped by layer choice with a style each; choices beyond the styles share the last."""
    choices = {dose["layers"] or "layers not known" for dose in doses}
    known = [choice for choice in LAYER_CHOICES if choice in choices]
    ordered = known + sorted(choices - set(known))
    named = ordered if len(ordered) <= len(LAYER_STYLES) else ordered[: len(LAYER_STYLES) - 1]
    groups: dict[str, list[Row]] = {}
    for dose in doses:
        choice = dose["layers"] or "layers not known"
        groups.setdefault(choice if choice in named else "other choices", []).append(dose)
    # The usual four keep their colours whichever of them a study searches.
    usual = dict(zip(LAYER_CHOICES, LAYER_STYLES, strict=False))
    spare = iter(
        LAYER_STYLES[len(usual) :] + [style for choice, style in usual.items() if choice not in known]
    )
    styles = {choice: usual[choice] if choice in usual else next(spare) for choice in named}
    return [
        (name, styles.get(name, OTHER_LAYERS), groups[name])
        for name in [*named, "other choices"]
        if name in groups
    ]


def profile_panel(tables: Tables, objective: Objective) -> Panel:
    """Mean cosine against layer number for the baseline and the best trial."""
    title = "Condensation by layer"
    profiles = _profiles(tables, objective)
    if not profiles:
        return Panel(title, "No figure: neither the baseline nor a best trial has a measure of condensation.")
    figure = _figure("layer (0 is the embedding output)", "mean cosine between tokens")
    for name, profile in profiles:
        of_baseline = name == "baseline"
        figure.add_scatter(
            name=_plotly_text(name),
            x=profile.layer,
            y=profile.cosine_mean,
            mode="lines+markers",
            line={
                "color": MUTED if of_baseline else ACCENT,
                "width": 2,
                "dash": "dash" if of_baseline else "solid",
            },
            marker={"symbol": "square" if of_baseline else "circle", "size": 7},
            hovertemplate="layer %{x}: %{y:.3f}",
        )
    most = max(profile.layer[-1] for _, profile in profiles)
    figure.update_xaxes(range=[-0.3, most + 0.3], tickformat="d", dtick=max(1, math.ceil(most / 12)))
    sentence = (
        "Mean cosine between the tokens of a sequence (no unit; 1: all point the same way) after each layer, "
        "at the last evaluation; the last layer is taken after the final norm."
    )
    return Panel(title, sentence + _absent(profiles), [Plot("profile", "", figure)])


def heat_map_panel(tables: Tables, objective: Objective) -> Panel:
    """The field's picture of condensation: how the cosines between tokens are spread, by depth."""
    title = "Spread of cosines by depth"
    profiles = [(name, profile) for name, profile in _profiles(tables, objective) if any(profile.density())]
    if not profiles:
        return Panel(title, "No figure: neither the baseline nor a best trial has a histogram of cosines.")
    densities = [[layer for layer in profile.density() if layer is not None] for _, profile in profiles]
    # One colour scale and one range for all, or the pictures would not compare. The last bin holds each token
    # with itself, which in short sequences would outshine everything else: it does not set the scale.
    top = max(max(layer[:-1]) for layers in densities for layer in layers) or None
    width = 2 / NUM_HISTOGRAM_BINS
    first = min(next(i for i, x in enumerate(layer) if x) for layers in densities for layer in layers)
    nothing: list[float | None] = [None] * NUM_HISTOGRAM_BINS
    plots: list[Plot] = []
    for name, profile in profiles:
        figure = _figure("depth (fraction of the layers)", "cosine between tokens")
        columns = [layer or nothing for layer in profile.density()]
        figure.add_heatmap(
            x=profile.depth_frac,
            y=[-1 + (i + 0.5) * width for i in range(NUM_HISTOGRAM_BINS)],
            z=[list(row) for row in zip(*columns, strict=True)],
            zmin=0,
            zmax=top,
            colorscale="Viridis",
            colorbar={
                "title": {"text": "density", "side": "right", "font": {"size": 13}},
                "thickness": 10,
                "outlinewidth": 0,
                "nticks": 5,
            },
            hovertemplate="depth %{x:.2f}, cosine %{y:.2f}: %{z:.2f}<extra></extra>",
        )
        figure.update_yaxes(range=[-1 + first * width, 1], showgrid=False, zeroline=False)
        figure.update_xaxes(showgrid=False, tickvals=[0, 0.25, 0.5, 0.75, 1])
        plots.append(Plot(f"heat-map-{len(plots)}", name, figure))
    sentence = (
        "Density of the cosine over all pairs of tokens of a sequence (share of pairs per unit of cosine, "
        "one colour scale) against depth (0: embedding output, 1: after the final norm), at the last "
        "evaluation; a bright band that climbs is condensation, the line at 1 is each token with itself."
    )
    return Panel(title, sentence + _absent(profiles), plots)


def verdict_panel(verdicts: pa.Table, trials: pa.Table) -> Panel:
    """The confirm phase: the paired differences behind each arm's verdict.

    Args:
        verdicts: what `verdict.verdicts` made of these trials.
    """
    title = "Paired differences"
    rows = verdicts.to_pylist()
    if not any(row["num_pairs"] for row in rows):
        return Panel(title, "No figure: the confirm phase has no complete pair of runs.")
    bare = [row["arm"] for row in rows if row["num_pairs"] == 0]
    unsure = [row["arm"] for row in rows if row["num_pairs"] == 1]
    first = rows[0]
    sentence = (
        f"Each point is one seed's {_measure_label(first)}, arm minus baseline ({first['unit']}; left of 0 "
        "is better), the square with its bar the mean with its 95 % interval, the band what would not "
        f"matter: ±{analysis.format_value(first['smallest_effect'])}."
    )
    if unsure:
        sentence += f" Without an interval, for want of a second pair: {', '.join(unsure)}."
    if bare:
        sentence += f" Not drawn, for want of a complete pair: {', '.join(bare)}."
    return Panel(title, sentence, [Plot("verdict", "", verdict_figure(verdicts, trials))])


def verdict_figure(verdicts: pa.Table, trials: pa.Table) -> go.Figure:
    """A forest plot: per arm the seeds' paired differences, their mean and its 95 % interval; the line of no
    difference, and the band of differences that would not matter.

    Args:
        verdicts: what `verdict.verdicts` made of these trials.
    Raises:
        VerdictError: the trials have no confirm phase that can be judged.
    """
    rows = [row for row in verdicts.to_pylist() if row["num_pairs"]]
    differences = verdict.paired_differences(trials)
    unit = rows[0]["unit"] if rows else ""
    figure = _figure(f"{_measure_label(rows[0]) if rows else ''}, arm minus baseline ({unit})", "")
    bound = rows[0]["smallest_effect"] if rows else 0.0
    figure.add_vrect(x0=-bound, x1=bound, fillcolor=GRID, opacity=0.6, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": INK, "width": 1.5, "dash": "dash"})
    # Numbers, not names, are the places of the arms: so points can lie beside their mean.
    places = [0.0 - number for number in range(len(rows))]
    points = [
        (value, place - 0.15, f"{row['arm']}, seed {seed}: {value:+.4f}")
        for row, place in zip(rows, places, strict=True)
        for seed, value in differences[row["arm"]].items()
    ]
    figure.add_scatter(
        name="one seed",
        x=[value for value, _, _ in points],
        y=[place for _, place, _ in points],
        mode="markers",
        marker={"color": MUTED, "symbol": "circle-open"} | _point_size(len(points)),
        hovertext=[_plotly_text(text) for _, _, text in points],
        hoverinfo="text",
    )
    figure.add_scatter(
        name="mean and 95 % interval",
        x=[row["difference"] for row in rows],
        y=places,
        mode="markers",
        marker={"color": ACCENT, "symbol": "square", "size": 10},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_length(row["high_95"], row["difference"]) for row in rows],
            "arrayminus": [_length(row["difference"], row["low_95"]) for row in rows],
            "color": ACCENT,
            "thickness": 2,
        },
        hovertext=[_plotly_text(row["sentence"]) for row in rows],
        hoverinfo="text",
    )
    names = [_plotly_text(row["arm"]) for row in rows]
    figure.update_yaxes(tickvals=places, ticktext=names, range=[-len(rows) + 0.4, 0.6], showgrid=False)
    return figure


def _measure_label(row: Row) -> str:
    outcome = str(row["primary_outcome"])
    return MEASURES[outcome].label if outcome in MEASURES else outcome


def _length(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start


def _profiles(tables: Tables, objective: Objective) -> list[tuple[str, analysis.LayerProfile]]:
    named = [("baseline", analysis.baseline_row(tables.trials, objective))]
    if best := analysis.best_trial(tables.trials, objective):
        arm = "" if best["arm"] == "search" else f" ({best['arm']})"
        named.append((f"best: trial {best['trial']}{arm}", best))
    pairs = [(name, row and analysis.layer_profile(tables.layers, row["trial"])) for name, row in named]
    return [(name, profile) for name, profile in pairs if profile]


def _absent(profiles: Sequence[tuple[str, Any]]) -> str:
    if len(profiles) == 2:
        return ""
    return f" Only the {profiles[0][0].split(':')[0]} is drawn: the other has no measure."


def _figure(x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the report's style: no title, legend above the drawing, light colours."""
    axis = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": MUTED,
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 13}},
    }
    style = go.layout.Template(
        layout={
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": ACCENT},
        }
    )
    return go.Figure(
        layout={
            "template": style,
            "xaxis": {"title": {"text": x_title}},
            "yaxis": {"title": {"text": y_title}},
            "showlegend": True,
        }
    )


def _add_baseline(figure: go.Figure, trials: pa.Table, objective: Objective, ends: list[float]) -> None:
    value = analysis.value_of(analysis.baseline_row(trials, objective), objective.metric)
    if value is not None:
        figure.add_scatter(
            name="baseline",
            x=ends,
            y=[value, value],
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "dash"},
            hovertemplate="%{y:." + str(MEASURES[objective.metric].digits) + "f}",
        )


def _point_size(number: int) -> dict[str, float]:
    # Hundreds of points would hide each other.
    return {"size": 9} if number <= 100 else {"size": 6, "opacity": 0.7}


def _log_ticks(low: float, high: float) -> dict[str, list[Any]]:
    # plotly's own labels between the powers of ten are bare digits ("2", "5"), which read as values.
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [float(f"{step}e{decade}") for decade in decades[::every] for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= 8:
            break
    return {"tickvals": inside, "ticktext": [f"{value:g}" for value in inside]}


def _hover_texts(trials: pa.Table, numbers: list[int], objective: Objective) -> list[str]:
    rows = {row["trial"]: row for row in trials.to_pylist()}
    fields, metric = analysis.searched_fields(trials), objective.metric
    texts = []
    for number in numbers:
        row = rows[number]
        lines = [f"trial {number}", f"{metric} {analysis.format_measure(metric, row[metric])}"]
        lines += [f"{name} {analysis.format_value(row[name])}" for name in fields]
        texts.append("<br>".join(_plotly_text(line) for line in lines))
    return texts


def _plotly_text(text: str) -> str:
    # plotly reads tags and &lt; &gt; &amp; in text, but shows &quot; as it stands.
    return html.escape(" ".join(text.split()), quote=False)


def _capitalised(text: str) -> str:
    # str.capitalize would make "spearman rho" of "Spearman rho", and "kendall tau-b".
    return text[:1].upper() + text[1:]


def _better(objective: Objective) -> str:
    return "lower" if objective.mode == "min" else "higher"


def _unit(metric: str) -> str:
    return f"in {MEASURES[metric].unit}" if MEASURES[metric].unit else "no unit"


def _dashes(trials: pa.Table, objective: Objective) -> str:
    if analysis.value_of(analysis.baseline_row(trials, objective), objective.metric) is None:
        return ""
    return ", the dashed line is the baseline (no dispersion)"


def _unseen(trials: pa.Table, objective: Objective) -> str:
    """What a figure of the search leaves out or puts side by side although it does not compare."""
    rows = analysis.search_trials(trials).to_pylist()
    seen = [row for row in rows if analysis.value_of(row, objective.metric) is not None]
    note = ""
    if missing := len(rows) - len(seen):
        note += f" Not drawn, for want of a value: {missing} of {len(rows)} trials."
    if len({row["num_tokens"] for row in seen}) > 1:
        note += " The trials saw different numbers of tokens, so their values do not compare directly."
    return note


# The page of `raydisp.measure` draws in the same style.
empty_figure, plotly_text, log_ticks = _figure, _plotly_text, _log_ticks
