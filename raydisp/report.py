"""The report of a study: one HTML page, made from its Parquet tables and its `study.yaml` alone.

    python -m raydisp.report DIR

The page needs nothing but itself: plotly's JavaScript is in it, and its content security policy forbids
every request. Whatever comes from rows or from the study file is escaped, twice over where it has to be:
plotly reads a subset of HTML in labels, and the page around it reads all of HTML.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import html
import json
import logging
import math
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.offline
import pyarrow as pa
import pyarrow.fs as pafs
import yaml
from pydantic import ValidationError

from raydisp import analysis
from raydisp.analysis import MEASURES, Row
from raydisp.config import Objective
from raydisp.errors import OutputError, RaydispError
from raydisp.layers import LAYER_CHOICES
from raydisp.results import NUM_HISTOGRAM_BINS, Tables, join, read_bytes, read_tables, resolve, write_bytes

logger = logging.getLogger(__name__)

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
    """Objective against weight, and against weight / temperature where both vary."""
    title = "Dose-response"
    doses = [
        dose for dose in analysis.dose_response(trials, objective).to_pylist() if dose["weight"] is not None
    ]
    if not doses:
        return Panel(
            title, f"No figure: no search trial has completed with a weight and a {objective.metric}."
        )
    positive = [dose for dose in doses if dose["weight"] > 0]
    if not positive:
        return Panel(title, "No figure: every completed search trial has weight 0.")
    plots = [_dose_plot("weight", "dispersion weight", positive, trials, objective)]
    relative = [dose for dose in positive if dose["weight_per_temperature"] is not None]
    sentence = (
        f"{_capitalised(MEASURES[objective.metric].label)} of each completed search trial against the weight "
        "of the dispersion loss (no unit, logarithmic axis), by the layers it acts on; the ring is the best "
        f"trial{_dashes(trials, objective)}; {_unit(objective.metric)}."
    )
    if all(len({dose[field] for dose in relative}) > 1 for field in ("weight", "temperature")):
        axis = "weight / temperature"
        plots.append(_dose_plot("weight_per_temperature", axis, relative, trials, objective))
        sentence += (
            " For temperatures of 1 and more the loss depends on little but weight / temperature, so that is "
            "drawn too."
        )
    if len(positive) < len(doses):
        sentence += f" Weight 0 has no place on this axis: {len(doses) - len(positive)} trials are not drawn."
    return Panel(title, sentence + _unseen(trials, objective), plots)


def _dose_plot(column: str, axis: str, doses: list[Row], trials: pa.Table, objective: Objective) -> Plot:
    figure = _figure(f"{axis} (log scale)", MEASURES[objective.metric].axis)
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
    low, high = (low / 1.4, high * 1.4) if high > 2 * low else (low / 4, high * 4)
    _add_baseline(figure, trials, objective, [low, high])
    figure.update_xaxes(type="log", range=[math.log10(low), math.log10(high)], **_log_ticks(low, high))
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


def _profiles(tables: Tables, objective: Objective) -> list[tuple[str, analysis.LayerProfile]]:
    named = [("baseline", analysis.baseline_row(tables.trials))]
    if best := analysis.best_trial(tables.trials, objective):
        named.append((f"best: trial {best['trial']}", best))
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
    value = analysis.value_of(analysis.baseline_row(trials), objective.metric)
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
        lines = [f"trial {number}", f"{metric} {_format(metric, row[metric])}"]
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
    if analysis.value_of(analysis.baseline_row(trials), objective.metric) is None:
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


def _format(metric: str, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{MEASURES[metric].digits}f}"


# --- the page ------------------------------------------------------------------------------------------


def facts(trials: pa.Table, study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run: pairs of a name and a plain text, those that are known."""
    search = analysis.search_trials(trials)
    counts = ", ".join(f"{number} {status}" for status, number in analysis.count_statuses(search).items())
    planned = _get(study, "search.num_trials")
    baseline = analysis.baseline_row(trials)
    of_planned = f" (of {planned} planned)" if planned is not None and planned != search.num_rows else ""
    state = "no baseline yet" if baseline is None else f"baseline {baseline['status']}"
    tokens = sorted({number for number in trials["num_tokens"].to_pylist() if number is not None})
    span = " to ".join(f"{number:,}" for number in dict.fromkeys([tokens[0], tokens[-1]])) if tokens else ""
    pairs = [
        ("model", _model_text(study)),
        ("data", _data_text(study)),
        ("tokens per trial", span),
        ("trials", f"{counts or 'none yet'}{of_planned}; {state}"),
        ("seed", _distinct(trials, "seed")),
        ("device", _distinct(trials, "device")),
        ("when", _when(trials)),
        ("code version", _distinct(trials, "code_version")),
    ]
    return [(name, text) for name, text in pairs if text]


def _get(study: Mapping[str, Any], dotted: str) -> Any:
    node: Any = study
    for part in dotted.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _model_text(study: Mapping[str, Any]) -> str:
    model = _get(study, "model")
    if not isinstance(model, Mapping):
        return ""
    if model.get("source") == "scratch":
        return (
            f"{model.get('family')} from scratch: {model.get('num_layers')} layers, "
            f"hidden size {model.get('hidden_size')}, {model.get('num_heads')} heads"
        )
    name = model.get("id") or model.get("path") or model.get("source")
    return f"{name} (revision {model['revision']})" if model.get("revision") else str(name)


def _data_text(study: Mapping[str, Any]) -> str:
    data = _get(study, "data")
    if not isinstance(data, Mapping):
        return ""
    paths = data.get("paths")
    parts = paths if isinstance(paths, list) else [data.get("path") or data.get("source"), data.get("name")]
    context = data.get("context_length")
    shown = ", ".join(str(part) for part in parts if part is not None)
    return f"{shown}; context of {context} tokens" if context else shown


def _distinct(trials: pa.Table, column: str) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(trials[column].to_pylist()) if value is not None)


def _when(trials: pa.Table) -> str:
    started = [time for time in trials["started_at"].to_pylist() if time is not None]
    ended = [time for time in trials["ended_at"].to_pylist() if time is not None]
    if not started or not ended:
        return ""
    first, last = min(started).astimezone(datetime.UTC), max(ended).astimezone(datetime.UTC)
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def results_table(trials: pa.Table, objective: Objective) -> str:
    """The table of all trials as HTML, everything in it escaped; sorted by the page's script."""
    metric = objective.metric
    best, baseline = analysis.best_trial(trials, objective), analysis.baseline_row(trials)
    fields = analysis.searched_fields(trials)
    shown = ["val_loss", "val_bits_per_byte", "layer_cosine_mean", "spearman"]
    measures = list(dict.fromkeys([metric, *shown]))
    rows = trials.to_pylist()

    heads = [_head("trial", number=True), _head("arm"), _head("status")]
    heads += [_head(name, number=_is_number(trials, name)) for name in fields]
    heads += [_head(metric, MEASURES[metric].unit, number=True), _head("against baseline", number=True)]
    heads += [_head(name, MEASURES[name].unit, number=True) for name in measures[1:]]
    heads += [_head("num_tokens", number=True), _head("train_s", "seconds", number=True)]

    body = []
    for row in rows:
        is_best = best is not None and row["trial"] == best["trial"]
        arm = html.escape(str(row["arm"])) + (' <span class="tag">best</span>' if is_best else "")
        cells = [_cell(str(row["trial"]), row["trial"]), f"<td>{arm}</td>", _status_cell(row)]
        cells += [
            _cell(analysis.format_value(row[name]), row[name] if _is_number(trials, name) else None)
            for name in fields
        ]
        for name in measures:
            cells.append(_cell(_format(name, row[name]), row[name], number=True))
            if name == metric:
                difference = _against_baseline(row, baseline, metric)
                text = "" if difference is None else f"{difference:+.{MEASURES[metric].digits}f}"
                cells.append(_cell(text, difference, number=True))
        tokens, seconds = row["num_tokens"], row["train_s"]
        cells.append(_cell("" if tokens is None else f"{tokens:,}", tokens, number=True))
        cells.append(_cell("" if seconds is None else f"{seconds:.1f}", seconds, number=True))
        marks = " ".join(
            name for name, on in (("best", is_best), ("baseline", row["arm"] == "baseline")) if on
        )
        body.append(f'<tr class="{marks}">{"".join(cells)}</tr>')
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _is_number(trials: pa.Table, name: str) -> bool:
    kind = trials.schema.field(name).type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _against_baseline(row: Row, baseline: Row | None, metric: str) -> float | None:
    value, reference = analysis.value_of(row, metric), analysis.value_of(baseline, metric)
    if baseline is None or value is None or reference is None or row["trial"] == baseline["trial"]:
        return None
    return value - reference if analysis.same_budget(row, baseline) else None


def _head(name: str, unit: str = "", *, number: bool = False) -> str:
    label = html.escape(name).replace(".", ".<wbr>").replace("_", '_<wbr class="fine">')
    small = f"<small>{html.escape(unit)}</small>" if unit else ""
    kind = ' class="number"' if number else ""
    button = f'<button type="button"><span>{label}</span>{small}</button>'
    return f'<th scope="col" aria-sort="none"{kind}>{button}</th>'


def _cell(text: str, value: float | None = None, *, number: bool = False) -> str:
    key = "" if value is None or not math.isfinite(value) else f' data-value="{value!r}"'
    kind = ' class="number"' if number or value is not None else ""
    return f"<td{kind}{key}>{html.escape(text)}</td>"


def _status_cell(row: Row) -> str:
    status = html.escape(str(row["status"]))
    text = ": ".join(part for part in (row["error_type"], row["error_message"]) if part)
    if not text:
        return f"<td>{status}</td>"
    if len(text) <= 120 and "\n" not in text:
        return f'<td class="error">{status}<small>{html.escape(text)}</small></td>'
    start = html.escape(text.splitlines()[0][:100])
    return (
        f'<td class="error">{status}<details><summary>{start} …</summary>'
        f"<pre>{html.escape(text)}</pre></details></td>"
    )


def render(tables: Tables, study: Mapping[str, Any]) -> str:
    """The page.

    Args:
        study: the resolved study file; what it lacks is left out of the page.
    """
    trials, objective = tables.trials, _objective(study)
    names = dict.fromkeys([*trials["study"].to_pylist(), _get(study, "name")])
    name = next((str(name) for name in names if name), "study")
    sentences = analysis.summarise(trials, objective)
    panels = build_panels(tables, objective)
    drawn = [f'"{plot.name}": {plot.figure.to_json()}' for panel in panels for plot in panel.plots]
    return string.Template(_PAGE).substitute(
        name=html.escape(name),
        lead=html.escape(sentences[0]),
        second=html.escape(sentences[1]),
        facts="".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd></div>"
            for key, text in facts(trials, study)
        ),
        panels="".join(_panel_html(panel) for panel in panels),
        table=results_table(trials, objective),
        plotly=plotly.offline.get_plotlyjs(),
        dark=_script_json(json.dumps(DARK_COLOURS)),
        figures=_script_json(f"{{{', '.join(drawn)}}}"),
        style=_STYLE,
        script=_SCRIPT,
    )


def _objective(study: Mapping[str, Any]) -> Objective:
    try:
        return Objective.model_validate(_get(study, "search.objective") or {})
    except ValidationError:
        logger.warning("study.yaml: search.objective is not understood; the report takes val_loss, min")
        return Objective()


def _panel_html(panel: Panel) -> str:
    title = html.escape(panel.title)
    drawings = "".join(
        "<div>"
        + (f"<h3>{html.escape(plot.title)}</h3>" if len(panel.plots) > 1 else "")
        + f'<div class="plot" id="{plot.name}" role="img" aria-label="{title}"></div></div>'
        for plot in panel.plots
    )
    return (
        f'<section><h2>{title}</h2><figure><div class="drawings">{drawings}</div>'
        f"<figcaption>{html.escape(panel.sentence)}</figcaption></figure></section>"
    )


def _script_json(text: str) -> str:
    """JSON that a script element can hold: outside strings none of these characters occur in JSON."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# --- entry points --------------------------------------------------------------------------------------


def build_report(study_dir: str) -> str:
    """Write `report.html` into a results folder, whole or not at all, and return its place.

    Args:
        study_dir: the folder of one study, a local path or a URI that `pyarrow.fs` knows.
    Raises:
        OutputError: there is no such folder, it holds no results, or it cannot be read or written.
    """
    try:
        filesystem, path = resolve(study_dir)
        kind = filesystem.get_file_info(path).type
        tables = read_tables(study_dir) if kind == pafs.FileType.Directory else None
        study = _read_study(study_dir) if tables else {}
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{study_dir} cannot be read: {' '.join(str(error).split())}") from None
    if kind == pafs.FileType.NotFound:
        raise OutputError(f"{study_dir} does not exist; name the results folder of a study")
    if tables is None:
        raise OutputError(f"{study_dir} is a file; name the results folder of a study")
    if tables.trials.num_rows == 0:
        raise OutputError(
            f"{study_dir} holds no results: there is no trial in {join(study_dir, 'trials')}; "
            "name the results folder of one study"
        )
    place = join(study_dir, "report.html")
    write_bytes(place, render(tables, study).encode())
    return place


def _read_study(study_dir: str) -> Mapping[str, Any]:
    try:
        study = yaml.safe_load(read_bytes(join(study_dir, "study.yaml")))
    except FileNotFoundError:
        logger.warning("%s has no study.yaml; the report takes val_loss, min, as objective", study_dir)
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s/study.yaml cannot be read (%s); the report does without", study_dir, error)
        return {}
    return study if isinstance(study, Mapping) else {}


def main(argv: Iterable[str] | None = None) -> int:
    """Command line: write the report of a results folder. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.report", description="Make report.html from the results of a study."
    )
    parser.add_argument("dir", metavar="DIR", help="results folder of a study, local or s3://, gs://")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        print(build_report(arguments.dir))
    except RaydispError as error:
        print(f"raydisp.report: {error}", file=sys.stderr)
        return 2
    return 0


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #636c76; --line: #dfe3e8; --paper: #ffffff;
  --shade: #f5f7f9; --accent: #0072b2; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9aa4af; --line: #30363d; --paper: #0f1318; --shade: #171c23;
    --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .25rem; color: var(--muted); }
.kicker { margin: 0; color: var(--muted); font-size: .85rem; }
.lead { font-size: 1.1rem; margin: 0 0 .6rem; padding-left: 1rem; border-left: 3px solid var(--accent); }
.lead + .lead { margin-bottom: 1.75rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem 1.5rem;
  margin: 0; padding: 1rem 0; border: solid var(--line); border-width: 1px 0; font-size: .9rem; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption, .note { color: var(--muted); font-size: .9rem; max-width: 46rem; margin-top: .25rem; }
.drawings { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.drawings > div { min-width: 0; }
.plot { height: 23rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { vertical-align: bottom; background: var(--shade); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
th button:hover { text-decoration: underline; }
th[aria-sort=ascending] span::after { content: " \\2191"; color: var(--accent); }
th[aria-sort=descending] span::after { content: " \\2193"; color: var(--accent); }
small, summary { color: var(--muted); font-size: .9em; font-weight: 400; }
small { display: block; }
th small { white-space: nowrap; }
td { white-space: nowrap; }
.number { text-align: right; }
tr.best td { background: color-mix(in srgb, var(--accent) 10%, transparent); }
tr.baseline td { background: var(--shade); }
.tag { color: var(--accent); font-weight: 600; }
.error { min-width: 15rem; white-space: normal; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media print {
  main { padding: 0; }
  section { break-inside: avoid; }
  section.table { break-inside: auto; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: .6rem; }
  th, td { padding: .2rem .25rem; }
  th, th small { white-space: normal; }
  .error { min-width: 8rem; }
}
@media screen { .fine { display: none; } }
@media screen and (min-width: 65rem) {
  /* The table may be wider than the text. */
  section.table { width: min(80rem, 100vw - 5rem); margin-left: 50%; transform: translateX(-50%); }
}
:root.printing main { width: 44rem; padding: 0; }
:root.printing .plot { height: 18rem; }
"""

_SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const darkColours = JSON.parse(document.getElementById("dark").textContent);
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
// Only the button that saves a picture: a longer bar would lie over the legends.
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]],
  displayModeBar: matchMedia("(hover: none)").matches ? false : "hover" };

function draw(dark, onPaper) {
  for (const [id, figure] of Object.entries(figures)) {
    const themed = JSON.parse(JSON.stringify(figure), (key, value) =>
      dark && /color$/.test(key) && darkColours[value] || value);
    // A finger that moves over a figure scrolls the page; a mouse zooms.
    if (matchMedia("(pointer: coarse)").matches) themed.layout.dragmode = false;
    // Resizing to the window comes too late for the printer: give the size outright.
    const place = document.getElementById(id);
    if (onPaper) Object.assign(themed.layout, { width: place.clientWidth, height: place.clientHeight });
    Plotly.react(place, themed.data, themed.layout, config);
  }
}
draw(prefersDark.matches, false);
prefersDark.addEventListener("change", () => draw(prefersDark.matches, false));

// Paper is white and narrower than the window: draw again for it before the pages are laid out.
function forPaper(on) {
  document.documentElement.classList.toggle("printing", on);
  draw(!on && prefersDark.matches, on);
}
addEventListener("beforeprint", () => forPaper(true));
addEventListener("afterprint", () => forPaper(false));

// Click on a header sorts by it, once more turns the order; empty cells stay last.
const heads = [...document.querySelectorAll("th")];
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}));
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name · raydisp</title>
<style>$style</style>
</head>
<body>
<main>
<p class="kicker">raydisp study</p>
<h1>$name</h1>
<p class="lead">$lead</p>
<p class="lead">$second</p>
<dl>$facts</dl>
<noscript><p class="note">The figures need JavaScript; the table does not.</p></noscript>
$panels
<section class="table">
<h2>Trials</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Trials">$table</div>
<p class="note">Every trial of the study; a click on a header sorts by it. Losses are cross-entropy over the
whole validation split; an empty cell is a value that the trial does not have.</p>
</section>
<footer>Made by raydisp from the Parquet files and the study.yaml beside it, and from nothing else.</footer>
</main>
<script type="application/json" id="figures">$figures</script>
<script type="application/json" id="dark">$dark</script>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
