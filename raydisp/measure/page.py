"""The page of `raydisp.measure`: the tables of the measured models -> figures and one HTML text.

Style, script and security policy are those of a study's report (`report.page`). What comes from a row is
escaped.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from typing import Any

from raydisp.analysis import LayerProfile
from raydisp.figures.chart import Axis, Chart, Grid, Line, Mark, Panel, Plot, Points, log_ticks
from raydisp.figures.style import MUTED, STYLES
from raydisp.measure.tables import Row
from raydisp.report import page
from raydisp.report.page import cell, head
from raydisp.results import NUM_HISTOGRAM_BINS

Model = tuple[Row, list[Row]]
"""A row of `models` and its rows of `condensation`, by layer."""

DASHES = ("solid", "dash", "dot")

DEPTH_TICKS = tuple((place / 4, f"{place / 4:g}") for place in range(5))

BY_DEPTH = (
    ("cosine", "mean cosine", "cosine_mean", "cosine_stderr"),
    ("centred", "mean cosine, centred", "cosine_centred_mean", "cosine_centred_stderr"),
    (
        "without-first",
        "mean cosine, without token 0",
        "cosine_without_first_mean",
        "cosine_without_first_stderr",
    ),
    ("effective-rank", "effective rank", "effective_rank", "effective_rank_stderr"),
)
"""(name, label, column, column of the standard error) of the measures drawn against depth."""

BY_SIZE = (
    ("spearman", "Spearman rho over depth", "spearman", None),
    ("last-half", "mean cosine of the last half", "last_half_mean", "last_half_stderr"),
)
"""The same of those drawn against the number of parameters, as the paper has them."""

_CLEAR_TREND = 0.5


def render_page(models: Sequence[Model]) -> str:
    """The page of all models, smallest first."""
    panels = build_panels(models)
    leads = [*sentences(models), *cautions(models)]
    return string.Template(page.read_part("measure.html", "raydisp.measure")).substitute(
        begin=page.begin("Condensation"),
        leads="".join(f'<p class="lead">{html.escape(text)}</p>' for text in leads),
        facts="".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd></div>"
            for key, text in facts(models)
        ),
        panels="".join(page.panel_html(panel) for panel in panels),
        table=models_table(models),
        end=page.end(panels),
    )


# --- sentences -------------------------------------------------------------------------------------------


def names(models: Sequence[Model]) -> list[str]:
    """A name for each model; where two are called the same, what identifies them."""
    told = [str(row["name"]) for row, _ in models]
    return [
        name if told.count(name) == 1 else str(row["model"])
        for name, (row, _) in zip(told, models, strict=True)
    ]


def sentences(models: Sequence[Model]) -> list[str]:
    """What was found: of one model its depths, of several the range over their sizes."""
    if not models:
        return ["No model has been measured into this folder yet."]
    if len(models) == 1:
        return [_sentence(names(models)[0], *models[0])]
    known = [
        (row, name)
        for (row, _), name in zip(models, names(models), strict=True)
        if row["spearman"] is not None
    ]
    if len(known) < 2:
        return [f"{len(models)} models; fewer than two of them have a trend over depth."]
    (small, small_name), (large, large_name) = known[0], known[-1]
    return [
        f"From {small_name} ({parameters(small['num_parameters'])}) to {large_name} "
        f"({parameters(large['num_parameters'])}) the Spearman correlation of the mean cosine with depth "
        f"goes from {small['spearman']:+.2f} to {large['spearman']:+.2f}, the mean cosine of the last half "
        f"of the layers from {value_text(small['last_half_mean'])} to {value_text(large['last_half_mean'])}."
    ]


def _sentence(name: str, row: Row, layers: Sequence[Row]) -> str:
    means = [(layer["cosine_mean"], layer["layer"]) for layer in layers if layer["cosine_mean"] is not None]
    if len(means) < len(layers) or row["spearman"] is None:
        return f"{name}: no trend over depth, for want of means that are numbers and differ."
    most, where = max(means)
    return (
        f"{name} {_trend(row['spearman'])}: the mean cosine between the tokens of a text is "
        f"{means[0][0]:.2f} at the embedding output, {most:.2f} at its highest (layer {where}) and "
        f"{means[-1][0]:.2f} after the last layer; Spearman {row['spearman']:+.2f} over {len(layers)} "
        "hidden states."
    )


def _trend(spearman: float) -> str:
    if spearman >= _CLEAR_TREND:
        return "condenses with depth"
    return "disperses with depth" if spearman <= -_CLEAR_TREND else "shows no clear trend over depth"


def cautions(models: Sequence[Model]) -> list[str]:
    """Why models on this page may not compare."""
    found = []
    rows = [row for row, _ in models]
    if len({row["texts_sha256"] for row in rows}) > 1:
        found.append("The models were measured on different texts: their values do not compare directly.")
    if len({row["max_tokens"] for row in rows}) > 1:
        found.append(
            "The models saw different numbers of tokens of a text: their values do not compare directly."
        )
    if len({row["dtype"] for row in rows}) > 1:
        found.append("The models were measured in different number formats.")
    return found


def facts(models: Sequence[Model]) -> list[tuple[str, str]]:
    """On what was measured: pairs of a name and a plain text."""
    rows = [row for row, _ in models]
    pairs = [
        ("models", str(len(rows))),
        ("texts", "; ".join(_distinct(rows, "texts"))),
        ("texts measured", ", ".join(_distinct(rows, "num_texts"))),
        ("left out, too short", ", ".join(text for text in _distinct(rows, "num_left_out") if text != "0")),
        ("tokens of a text", " or ".join(f"up to {text}" for text in _distinct(rows, "max_tokens"))),
        ("device", ", ".join(_distinct(rows, "device"))),
        ("number format", ", ".join(_distinct(rows, "dtype"))),
        ("when", ", ".join(dict.fromkeys(f"{row['ended_at']:%Y-%m-%d}" for row in rows if row["ended_at"]))),
        ("code version", ", ".join(_distinct(rows, "code_version"))),
    ]
    return [(name, text) for name, text in pairs if text]


def _distinct(rows: Sequence[Row], column: str) -> list[str]:
    return [str(value) for value in dict.fromkeys(row[column] for row in rows) if value is not None]


def parameters(number: int | None) -> str:
    """`134.5 M`: a number of parameters for people."""
    if number is None:
        return "unknown size"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def value_text(value: float | None, digits: int = 3) -> str:
    """A measure for people; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


# --- figures ---------------------------------------------------------------------------------------------


def build_panels(models: Sequence[Model]) -> list[Panel]:
    """The figures, in the order of the page."""
    return [heat_map_panel(models), averaged_panel(models), depth_panel(models), size_panel(models)]


def profile(layers: Sequence[Row], column: str = "histogram") -> LayerProfile:
    """Condensation of a model by layer, as the report's figures take it."""
    return LayerProfile(
        trial=0,
        step=0,
        layer=[row["layer"] for row in layers],
        cosine_mean=[row["cosine_mean"] for row in layers],
        histogram=[row[column] for row in layers],
    )


def scale_top(profiles: Sequence[LayerProfile]) -> float | None:
    """Where the colour scale of heat maps ends, one for all: 99.5 % of what is drawn lies below.

    The last bin, which holds each token with itself, and single bins that hold nearly everything would else
    darken all the rest.
    """
    values = sorted(
        value for one in profiles for layer in one.density() if layer for value in layer[:-1] if value > 0
    )
    return values[int(0.995 * (len(values) - 1))] if values else None


def lowest_cosine(profiles: Sequence[LayerProfile]) -> float:
    """Where heat maps begin: below this no layer has as much as a thousandth of its pairs."""
    lowest = NUM_HISTOGRAM_BINS - 1
    for one in profiles:
        for layer in one.density():
            total = 0.0
            for place, value in enumerate(layer or ()):
                total += value * 2 / NUM_HISTOGRAM_BINS
                if total > 1e-3:
                    lowest = min(lowest, place)
                    break
    return -1 + 2 * lowest / NUM_HISTOGRAM_BINS


def bin_centres() -> list[float]:
    """Cosines in the middle of the histogram's bins."""
    return [-1 + (place + 0.5) * 2 / NUM_HISTOGRAM_BINS for place in range(NUM_HISTOGRAM_BINS)]


def heat_map_panel(models: Sequence[Model]) -> Panel:
    """The field's picture of condensation, one per model."""
    title = "Spread of cosines by depth"
    plots = _heat_maps(models, "histogram", "heat-map")
    if not plots:
        return Panel(title, "No figure: no model has a histogram of cosines.")
    return Panel(
        title,
        "Density of the cosine over all pairs of tokens of a text (share of pairs per unit of cosine, one "
        "colour scale, whose top is where 99.5 % of the densities lie below) against depth (0: embedding "
        "output, 1: after the final norm); the line is the mean. A bright band that climbs is "
        "condensation, the line at 1 is each token with itself.",
        plots,
    )


def averaged_panel(models: Sequence[Model]) -> Panel:
    """The same as the paper draws it."""
    title = "The same, averaged over texts first"
    plots = _heat_maps(models, "averaged_histogram", "averaged-heat-map")
    if not plots:
        return Panel(title, "No figure: the averaged cosine matrices would not have fitted into memory.")
    return Panel(
        title,
        "The cosine matrices are averaged over the texts before their entries are counted, as the paper's "
        "figures have it: averaging narrows the band, the more so the more texts there are. For comparison "
        "with the paper.",
        plots,
    )


def _heat_maps(models: Sequence[Model], column: str, prefix: str) -> list[Plot]:
    found = [
        (name, profile(layers, column))
        for name, (_, layers) in zip(names(models), models, strict=True)
        if any(row[column] and sum(row[column]) for row in layers)
    ]
    if not found:
        return []
    profiles = [one for _, one in found]
    top, lowest = scale_top(profiles), lowest_cosine(profiles)
    return [
        Plot(f"{prefix}-{number}", name, _heat_map(one, top, lowest))
        for number, (name, one) in enumerate(found)
    ]


def _heat_map(one: LayerProfile, top: float | None, lowest: float) -> Chart:
    nothing: list[float | None] = [None] * NUM_HISTOGRAM_BINS
    columns = [layer or nothing for layer in one.density()]
    return Chart(
        Axis("depth (fraction of the layers)", ticks=DEPTH_TICKS, grid=False),
        Axis("cosine between tokens", ends=(lowest, 1.0), grid=False),
        [
            Grid(
                one.depth_frac,
                bin_centres(),
                [("", [list(row) for row in zip(*columns, strict=True)])],
                label="density",
                low=0.0,
                high=top,
                x_name="depth",
                y_name="cosine",
            ),
            # Not INK: on the page's dark side that changes, and the map stays as it is.
            Line(
                "mean",
                one.depth_frac,
                one.cosine_mean,
                colour="#ffffff",
                dash="dot",
                template=".3f",
                legend=False,
            ),
        ],
    )


def styles(number: int) -> list[tuple[str, str, str]]:
    """(colour, symbol, dash) of each of so many models: no two are alike up to 18."""
    return [
        (*STYLES[place % len(STYLES)], DASHES[place // len(STYLES) % len(DASHES)]) for place in range(number)
    ]


def depth_panel(models: Sequence[Model]) -> Panel:
    """Layer means of all models against depth, and what else a layer has one number of."""
    title = "Condensation by depth"
    if not models:
        return Panel(title, "No figure: no model is there.")
    plots = []
    for short, label, column, stderr in BY_DEPTH:
        lines = [
            Line(
                name,
                [row["depth_frac"] for row in layers],
                [row[column] for row in layers],
                colour=colour,
                dash=dash,
                symbol=symbol,
                hover=[_hover(name, row, column, stderr) for row in layers],
            )
            for name, (_, layers), (colour, symbol, dash) in zip(
                names(models), models, styles(len(models)), strict=True
            )
        ]
        chart = Chart(Axis("depth (fraction of the layers)", ticks=DEPTH_TICKS), Axis(label), lines)
        plots.append(Plot(f"depth-{short}", label, chart))
    return Panel(
        title,
        "Means over the texts (cosines have no unit; 1: all tokens point the same way). Centred: after "
        "subtracting the mean vector of each text, so blind to an offset that its tokens share. Token 0 is "
        "left out in the third because it is often an attention sink. The effective rank counts the "
        "directions that the tokens of a text take, at most their number or the hidden size. A single "
        "token of enormous norm takes over the centred mean and the effective rank; a jump in both tells "
        "of one.",
        plots,
    )


def _hover(name: str, row: Row, column: str, stderr: str) -> str:
    error = "" if row[stderr] is None else f" ± {row[stderr]:.4g}"
    return f"{name}, layer {row['layer']}: {value_text(row[column])}{error}"


def size_panel(models: Sequence[Model]) -> Panel:
    """Over model size, on a log axis: does the trend turn round in large models?"""
    title = "Condensation over model size"
    placed = [
        (name, row, style)
        for name, (row, _), style in zip(names(models), models, styles(len(models)), strict=True)
        if row["num_parameters"]
    ]
    if len({row["num_parameters"] for _, row, _ in placed}) < 2:
        return Panel(
            title,
            "No figure: it takes two models of different size. Measure more of a family into this folder.",
        )
    sizes = [row["num_parameters"] for _, row, _ in placed]
    low, high = min(sizes) / 1.4, max(sizes) * 1.4
    ticks = tuple((value, parameters(round(value))) for value, _ in log_ticks(low, high))
    plots = []
    for short, label, column, stderr in BY_SIZE:
        drawn = [(name, row, style) for name, row, style in placed if row[column] is not None]
        marks: list[Mark] = [
            Line(
                "by size",
                [row["num_parameters"] for _, row, _ in drawn],
                [row[column] for _, row, _ in drawn],
                colour=MUTED,
                width=1,
                legend=False,
            )
        ]
        if short == "spearman":
            marks.append(
                Line("none", [low, high], [0.0, 0.0], colour=MUTED, width=1, dash="dot", legend=False)
            )
        for name, row, (colour, symbol, _) in drawn:
            value, error = row[column], row[stderr] if stderr else None
            marks.append(
                Points(
                    name,
                    [row["num_parameters"]],
                    [value],
                    colour=colour,
                    symbol=symbol,
                    size=10,
                    hover=[f"{name} ({parameters(row['num_parameters'])}): {value_text(value)}"],
                    y_ends=[] if error is None else [(value - error, value + error)],
                )
            )
        # The whole range of a correlation: a difference in its third digit would else look like a collapse.
        y = Axis(label, ends=(-1.08, 1.08) if short == "spearman" else None)
        x = Axis("parameters (log scale)", log=True, ends=(low, high), ticks=ticks)
        plots.append(Plot(f"size-{short}", label, Chart(x, y, marks)))
    return Panel(
        title,
        "Left: the Spearman correlation of the layer means with the layer number (near +1: the model "
        "condenses with depth; below 0: it disperses). Right: the mean cosine of the last half of the "
        "hidden states, with its standard error over texts. Both against the number of parameters; the "
        "grey line joins models by size.",
        plots,
    )


# --- the table -------------------------------------------------------------------------------------------


def models_table(models: Sequence[Model]) -> str:
    """The table of all models as HTML, everything in it escaped; sorted by the page's script."""
    heads = [head("model")]
    measures: list[tuple[str, str]] = [
        ("spearman", "Spearman"),
        ("kendall", "Kendall"),
        *((f"last_{count}_mean", f"last {count}") for count in range(1, 6)),
        ("last_half_mean", "last half"),
        ("last_half_stderr", "±"),
    ]
    heads += [head(label, number=True) for label in ("parameters", "layers", "hidden size")]
    heads += [head(label, number=True) for _, label in measures]
    heads += [head(label, number=True) for label in ("texts", "tokens")]
    heads += [head("time", "seconds", number=True)]
    body = []
    for name, (row, _) in zip(names(models), models, strict=True):
        cells = [cell(name)]
        cells.append(cell(parameters(row["num_parameters"]), row["num_parameters"], number=True))
        cells += [
            cell(_whole(row[column]), row[column], number=True) for column in ("num_layers", "hidden_size")
        ]
        cells += [cell(value_text(row[column]), row[column], number=True) for column, _ in measures]
        cells += [
            cell(_whole(row[column]), row[column], number=True) for column in ("num_texts", "num_tokens")
        ]
        cells.append(cell(value_text(row["measure_s"], 1), row["measure_s"], number=True))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _whole(value: Any) -> str:
    return "" if value is None else f"{value:,}"
