"""The figures of `raydisp.measure` as PNG files, for papers: one column wide, colour-blind safe.

matplotlib draws them; it is loaded when they are asked for. Sizes are in inches of a two-column page.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raydisp import measure_page, measure_tables
from raydisp.errors import OutputError
from raydisp.measure_page import Model

WIDTH_IN, HEIGHT_IN, DPI = 3.4, 2.6, 220
_FONT_SIZE = 8
# plotly's symbols and dashes, as matplotlib calls them.
_MARKERS = {"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "cross": "P", "x": "X"}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MUTED = "#636c76"
_LEGEND_MODELS = 8


def check_matplotlib() -> None:
    """Raise an OutputError unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("--figures needs matplotlib: pip install raydisp[benchmarks]")


def draw_all(models: Sequence[Model]) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) of every figure that the models have data for.

    heat-map-<model>.png, averaged-heat-map-<model>.png, depth.png; with several sizes also size.png.
    """
    for prefix, column in (("heat-map", "histogram"), ("averaged-heat-map", "averaged_histogram")):
        drawn = [one for one in models if any(row[column] for row in one[1])]
        profiles = [measure_page.profile(layers, column) for _, layers in drawn]
        top, lowest = measure_page.scale_top(profiles), measure_page.lowest_cosine(profiles)
        for name, (row, layers) in zip(measure_page.names(drawn), drawn, strict=True):
            stem = measure_tables.file_name(row["name"], row["model"], row["source"]).removesuffix(".parquet")
            yield f"{prefix}-{stem}.png", _heat_map(name, layers, column, top, lowest)
    if models:
        yield "depth.png", _depth(models)
    if len({row["num_parameters"] for row, _ in models if row["num_parameters"]}) > 1:
        yield "size.png", _size(models)


def _heat_map(
    name: str, layers: Sequence[measure_tables.Row], column: str, top: float | None, lowest: float
) -> bytes:
    profile = measure_page.profile(layers, column)
    figure, (axes,) = _figure(1)
    empty = [np.nan] * len(measure_page.bin_centres())
    density = np.array([layer or empty for layer in profile.density()]).T
    mesh = axes.pcolormesh(
        *_edges(profile.depth_frac), density, vmin=0, vmax=top, cmap="viridis", rasterized=True
    )
    means = [np.nan if mean is None else mean for mean in profile.cosine_mean]
    axes.plot(profile.depth_frac, means, color="black", linewidth=1.7)  # an edge for the white line
    axes.plot(profile.depth_frac, means, color="white", linewidth=0.9, linestyle="--", label="layer mean")
    axes.set(xlim=(0, 1), ylim=(lowest, 1), xlabel="depth (fraction of the layers)")
    axes.set_ylabel("cosine between tokens")
    axes.set_title(_plain(name), fontsize=_FONT_SIZE)
    legend = axes.legend(loc="lower right", framealpha=0, fontsize=_FONT_SIZE - 1)
    for text in legend.get_texts():
        text.set_color("white")
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label("density", fontsize=_FONT_SIZE)
    bar.ax.tick_params(labelsize=_FONT_SIZE - 1)
    bar.outline.set_visible(False)
    return _png(figure)


def _edges(depth_frac: Sequence[float]) -> tuple[Any, Any]:
    """Edges of the cells: a layer reaches half-way to its neighbours."""
    depths = np.array(depth_frac)
    inner = (depths[1:] + depths[:-1]) / 2
    ends = [depths[0] - 0.5, depths[0] + 0.5] if len(depths) == 1 else [depths[0], depths[-1]]
    return np.concatenate([[ends[0]], inner, [ends[1]]]), np.linspace(
        -1, 1, len(measure_page.bin_centres()) + 1
    )


def _depth(models: Sequence[Model]) -> bytes:
    figure, (left, right) = _figure(2)
    for axes, (_, label, column, _) in ((left, measure_page.BY_DEPTH[0]), (right, measure_page.BY_DEPTH[1])):
        for name, (_, layers), (colour, symbol, dash) in zip(
            measure_page.names(models), models, measure_page.styles(len(models)), strict=True
        ):
            axes.plot(
                [row["depth_frac"] for row in layers],
                [np.nan if row[column] is None else row[column] for row in layers],
                color=colour,
                marker=_MARKERS[symbol],
                linestyle=_DASHES[dash],
                markersize=2.5,
                linewidth=1.2,
                label=_plain(name),
            )
        axes.set(xlabel="depth (fraction of the layers)", ylabel=label)
    _legend(figure, left, len(models))
    return _png(figure)


def _size(models: Sequence[Model]) -> bytes:
    figure, panes = _figure(2)
    styles = measure_page.styles(len(models))
    for axes, (_, label, column, stderr) in zip(panes, measure_page.BY_SIZE, strict=True):
        drawn = [
            (name, row, style)
            for name, (row, _), style in zip(measure_page.names(models), models, styles, strict=True)
            if row["num_parameters"] and row[column] is not None
        ]
        sizes = [row["num_parameters"] for _, row, _ in drawn]
        axes.plot(sizes, [row[column] for _, row, _ in drawn], color=_MUTED, linewidth=0.8, zorder=1)
        for name, row, (colour, symbol, _) in drawn:
            axes.errorbar(
                row["num_parameters"],
                row[column],
                yerr=row[stderr] if stderr else None,
                color=colour,
                marker=_MARKERS[symbol],
                linestyle="none",
                markersize=5,
                capsize=2,
                label=_plain(name),
            )
        axes.set_xscale("log")
        axes.set(xlabel="parameters", ylabel=label)
    panes[0].set_ylim(-1.08, 1.08)  # or a difference in the third digit would look like a collapse
    panes[0].axhline(0, color=_MUTED, linewidth=0.6, linestyle=":")
    _legend(figure, panes[0], len(models))
    return _png(figure)


def _figure(num_axes: int) -> tuple[Any, list[Any]]:
    # Not pyplot: it would pick a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN * num_axes, HEIGHT_IN), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panes = list(figure.subplots(1, num_axes, squeeze=False)[0])
    for axes in panes:
        axes.tick_params(labelsize=_FONT_SIZE - 1)
        axes.xaxis.label.set_size(_FONT_SIZE)
        axes.yaxis.label.set_size(_FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panes


def _legend(figure: Any, axes: Any, number: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(number, 4)
    # A legend of dozens would leave the drawing no room; then the page tells which is which.
    if number <= _LEGEND_MODELS:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=_FONT_SIZE - 1
        )


def _plain(name: str) -> str:
    # matplotlib reads formulas between dollar signs, and takes a legend's label that begins with _ for none.
    text = " ".join(name.split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
