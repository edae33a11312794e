"""Charts for papers: chart -> PNG and SVG of a column's width, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import textwrap
import warnings
from typing import Any

from raydisp.errors import OutputError
from raydisp.figures.chart import Axis, Band, Chart, Grid, Line, Panel, Plot, Points, Rule, Texts
from raydisp.figures.style import GRID, INK, MUTED, PAPER
from raydisp.storage import join, write_bytes

WIDTH_IN, HEIGHT_IN = 3.4, 2.6
"""A column of a page of two."""
LEGEND_LINE_IN = 0.14
DPI = 300
MAX_FRAMES = 4
"""Pictures of a sequence that lie side by side."""

_MARKERS = {
    "circle": "o",
    "circle-open": "o",
    "square": "s",
    "square-open": "s",
    "triangle-up": "^",
    "diamond": "D",
    "cross": "P",
    "x": "X",
    "star": "*",
    "x-thin-open": "x",
    "line-ns-open": "|",
}
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.hashsalt": "raydisp",  # the same study, the same file
    "figure.constrained_layout.use": True,
}


def check_matplotlib() -> None:
    """Raises: OutputError: matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError(
            "--figures needs the package matplotlib, which is not installed: pip install 'raydisp[figures]'"
        )


def write_figures(panels: list[Panel], folder: str) -> list[str]:
    """Write NAME.png and NAME.svg of every plot into a folder; returns their places.

    Raises:
        OutputError: matplotlib is not installed, or the folder cannot be written.
    """
    check_matplotlib()
    import matplotlib as mpl

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a glyph that no font has is not news
    places = []
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for panel in panels:
            for plot in panel.plots:
                figure = draw(plot)
                for ending, options in (("png", {"dpi": DPI}), ("svg", {"metadata": {"Date": None}})):
                    sink = io.BytesIO()
                    figure.savefig(sink, format=ending, **options)
                    places.append(join(folder, f"{plot.name}.{ending}"))
                    write_bytes(places[-1], sink.getvalue())
    return places


def draw(plot: Plot) -> Any:
    """A matplotlib figure of a plot, of its own and not of pyplot's."""
    from matplotlib.figure import Figure

    chart = plot.chart
    grids = [mark for mark in chart.marks if isinstance(mark, Grid)]
    num_frames = min(len(grids[0].frames), MAX_FRAMES) if grids else 1
    height = max(HEIGHT_IN, 0.9 + 0.22 * plot.rows)
    figure = Figure(figsize=(WIDTH_IN * (1 if num_frames == 1 else 2), height))
    all_axes = figure.subplots(1, num_frames, sharey=True, squeeze=False)[0]
    for number, axes in enumerate(all_axes):
        _draw_axes(axes, chart, number, num_frames)
    if grids:
        colours = all_axes[0].collections[0]
        figure.colorbar(colours, ax=list(all_axes), label=grids[0].label, pad=0.02).outline.set_visible(False)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        widest = max(len(label) for label in labels)
        columns = max(1, min(len(labels), 52 // (widest + 6)))
        # A legend of many lines does not take its room from the drawing.
        figure.set_figheight(height + LEGEND_LINE_IN * (math.ceil(len(labels) / columns) - 1))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _draw_axes(axes: Any, chart: Chart, number: int, num_frames: int) -> None:
    for mark in chart.marks:
        if isinstance(mark, Points):
            _points(axes, mark)
        elif isinstance(mark, Line):
            _line(axes, mark)
        elif isinstance(mark, Texts):
            for x, y, text in zip(mark.x, mark.y, mark.text, strict=True):
                axes.annotate(
                    text,
                    (x, y),
                    xytext=(2, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6,
                    bbox={"fc": PAPER, "ec": "none", "alpha": 0.85, "pad": 0.6},
                )
        elif isinstance(mark, Band):
            span = axes.axvspan if mark.axis == "x" else axes.axhspan
            span(mark.low, mark.high, color=GRID, alpha=0.6, lw=0, zorder=0, label=_label(mark))
        elif isinstance(mark, Rule):
            axes.axvline(mark.x, color=INK, lw=0.9, ls="--", zorder=1)
        else:
            _grid(axes, mark, number, num_frames)
    if num_frames == 1 or number == num_frames // 2:
        axes.set_xlabel("\n".join(textwrap.wrap(chart.x.title, 56)))
    if number == 0:
        axes.set_ylabel("\n".join(textwrap.wrap(chart.y.title, 30)))
    _scale(axes, "x", chart.x)
    _scale(axes, "y", chart.y)


def _scale(axes: Any, name: str, axis: Axis) -> None:
    from matplotlib import ticker

    one = getattr(axes, f"{name}axis")
    if axis.log:
        getattr(axes, f"set_{name}scale")("log")
        one.set_minor_locator(ticker.NullLocator())
    if axis.ends is not None:
        getattr(axes, f"set_{name}lim")(*axis.ends)
    if axis.ticks is not None:
        one.set_ticks([place for place, _ in axis.ticks], [text for _, text in axis.ticks])
    elif not axis.log:
        one.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10], integer=axis.whole))
        one.set_major_formatter(ticker.FuncFormatter(_tick_text))
    axes.grid(axis.grid, axis=name)


def _tick_text(value: float, _: int) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.6g}"


def _points(axes: Any, mark: Points) -> None:
    x, y = _numbers(mark.x), _numbers(mark.y)
    is_open = mark.symbol.endswith("-open")
    look = {
        "ls": "none",
        "marker": _MARKERS.get(mark.symbol, "o"),
        "ms": mark.size * 0.5,
        "mfc": "none" if is_open else mark.colour,
        "mec": mark.colour,
        "mew": 0.8 if is_open else 0,
        "alpha": mark.opacity,
        "zorder": 3,
    }
    axes.plot(x, y, label=_label(mark), **look)
    for ends, along in ((mark.x_ends, "x"), (mark.y_ends, "y")):
        for at_x, at_y, (low, high) in zip(x, y, ends, strict=False):
            if low is not None and high is not None:
                line = ([low, high], [at_y, at_y]) if along == "x" else ([at_x, at_x], [low, high])
                axes.plot(*line, color=mark.colour, lw=1, zorder=3)


def _line(axes: Any, mark: Line) -> None:
    axes.plot(
        _numbers(mark.x),
        _numbers(mark.y),
        color=mark.colour,
        lw=mark.width * 0.6,
        ls={"solid": "-", "dash": "--", "dot": ":"}[mark.dash],
        drawstyle="steps-post" if mark.steps else "default",
        marker=_MARKERS.get(mark.symbol, ""),
        ms=3.5,
        alpha=mark.opacity,
        solid_capstyle="butt",
        label=_label(mark),
        zorder=2,
    )


def _grid(axes: Any, mark: Grid, number: int, num_frames: int) -> None:
    chosen = (
        len(mark.frames) - 1 - (len(mark.frames) - 1) * (num_frames - 1 - number) // max(num_frames - 1, 1)
    )
    label, z = mark.frames[chosen]
    values = [_numbers(row) for row in z]
    colours = "viridis_r" if mark.reverse else "viridis"
    if mark.contours:
        axes.contourf(mark.x, mark.y, values, levels=12, cmap=colours, zorder=1)
    else:
        axes.pcolormesh(mark.x, mark.y, values, vmin=mark.low, vmax=mark.high, cmap=colours, rasterized=True)
    if num_frames > 1:
        axes.set_title(label, fontsize=7)


def _numbers(values: Any) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _label(mark: Points | Line | Band) -> str:
    # matplotlib leaves out of the legend what begins with an underscore.
    return " ".join(mark.name.split()).lstrip("_") if mark.legend else "_"
