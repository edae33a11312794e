"""Charts for the page: chart -> plotly figure.

Plotly reads a subset of HTML in texts, so every text of a chart is escaped for it here.
"""

from __future__ import annotations

import html
import math
from typing import Any

import plotly.graph_objects as go

from raydisp.figures.chart import Axis, Band, Chart, Grid, Line, Number, Points, Rule, Texts
from raydisp.figures.style import ACCENT, GRID, INK, MUTED, PAPER


def draw(chart: Chart) -> go.Figure:
    """The figure in the report's style: no title, legend above the drawing, light colours."""
    figure = go.Figure(layout=_layout(chart))
    for mark in chart.marks:
        if isinstance(mark, Points):
            figure.add_scatter(**_points(mark))
        elif isinstance(mark, Line):
            figure.add_scatter(**_line(mark))
        elif isinstance(mark, Texts):
            _add_texts(figure, mark, chart)
        elif isinstance(mark, Band):
            _add_band(figure, mark)
        elif isinstance(mark, Rule):
            figure.add_vline(x=mark.x, line={"color": INK, "width": 1.5, "dash": "dash"})
        else:
            _add_grid(figure, mark, chart)
    return figure


def escaped(text: str) -> str:
    """A text as plotly shows it unchanged: it reads tags and &lt; &gt; &amp;, but not &quot;."""
    return html.escape(" ".join(text.split()), quote=False)


def _hover(text: str) -> str:
    return "<br>".join(escaped(line) for line in text.split("\n"))


def _layout(chart: Chart) -> dict[str, Any]:
    style = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": MUTED,
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 13}},
    }
    template = go.layout.Template(
        layout={
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
            "xaxis": style,
            "yaxis": style,
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": ACCENT},
        }
    )
    return {
        "template": template,
        "xaxis": _axis(chart.x),
        "yaxis": _axis(chart.y),
        "showlegend": any(getattr(mark, "legend", False) for mark in chart.marks),
    }


def _axis(axis: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": escaped(axis.title)}}
    if axis.log:
        made["type"] = "log"
    if axis.ends is not None:
        made["range"] = [math.log10(end) for end in axis.ends] if axis.log else list(axis.ends)
    if axis.ticks is not None:
        made["tickvals"] = [place for place, _ in axis.ticks]
        made["ticktext"] = [escaped(text) for _, text in axis.ticks]
    if axis.whole:
        made["tickformat"] = "d"
    if not axis.grid:
        made["showgrid"] = False
    return made


def _points(mark: Points) -> dict[str, Any]:
    marker: dict[str, Any] = {"color": mark.colour, "symbol": mark.symbol, "size": mark.size}
    if mark.opacity < 1:
        marker["opacity"] = mark.opacity
    if mark.symbol.endswith("-open"):
        marker["line"] = {"width": 1.5}
    made: dict[str, Any] = {"x": mark.x, "y": mark.y, "mode": "markers", "marker": marker}
    for name, ends, middle in (("error_x", mark.x_ends, mark.x), ("error_y", mark.y_ends, mark.y)):
        if ends:
            made[name] = {
                "type": "data",
                "symmetric": False,
                "array": [_length(high, at) for (_, high), at in zip(ends, middle, strict=True)],
                "arrayminus": [_length(at, low) for (low, _), at in zip(ends, middle, strict=True)],
                "color": mark.colour,
                "thickness": 2,
            }
    return made | _told(mark)


def _line(mark: Line) -> dict[str, Any]:
    line = {"color": mark.colour, "width": mark.width, "dash": mark.dash}
    if mark.steps:
        line["shape"] = "hv"
    made: dict[str, Any] = {"x": mark.x, "y": mark.y, "mode": "lines", "line": line}
    if mark.opacity < 1:
        made["opacity"] = mark.opacity
    if mark.symbol:
        made |= {"mode": "lines+markers", "marker": {"symbol": mark.symbol, "size": 7, "color": mark.colour}}
    told = _told(mark)
    if mark.template:
        told = {"name": told["name"], "hovertemplate": f"%{{x}}: %{{y:{mark.template}}}"}
    return made | told | ({} if mark.legend else {"showlegend": False})


def _told(mark: Points | Line) -> dict[str, Any]:
    told: dict[str, Any] = {"name": escaped(mark.name), "hoverinfo": "skip"}
    if mark.hover:
        told |= {"hovertext": [_hover(text) for text in mark.hover], "hoverinfo": "text"}
    return told if mark.legend else told | {"showlegend": False}


def _add_texts(figure: go.Figure, mark: Texts, chart: Chart) -> None:
    # Annotations and no trace: these may have a ground, without which lines cross out what they run under.
    look = {
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "middle",
        "font": {"size": 11, "color": INK},
        "bgcolor": PAPER,
        "opacity": 0.85,
        "borderpad": 1,
    }
    # Their places on a log axis are exponents, unlike those of marks.
    places = [
        [math.log10(place) for place in along] if axis.log else along
        for along, axis in ((mark.x, chart.x), (mark.y, chart.y))
    ]
    for x, y, text in zip(*places, mark.text, strict=True):
        figure.add_annotation(x=x, y=y, text=escaped(text), **look)


def _add_band(figure: go.Figure, mark: Band) -> None:
    look = {"fillcolor": GRID, "opacity": 0.6, "line_width": 0, "layer": "below"}
    if mark.legend:
        look |= {"name": escaped(mark.name), "showlegend": True}
    if mark.axis == "x":
        figure.add_vrect(x0=mark.low, x1=mark.high, **look)
    else:
        figure.add_hrect(y0=mark.low, y1=mark.high, **look)


def _add_grid(figure: go.Figure, mark: Grid, chart: Chart) -> None:
    look: dict[str, Any] = {
        "x": mark.x,
        "y": mark.y,
        "colorscale": "Viridis",
        "reversescale": mark.reverse,
        "colorbar": {
            "title": {"text": escaped(mark.label), "side": "right", "font": {"size": 13}},
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
        },
        "hovertemplate": f"{mark.x_name} %{{x:.3g}}, {mark.y_name} %{{y:.3g}}: %{{z:.3f}}<extra></extra>",
    }
    for number, (_, z) in enumerate(mark.frames):
        shown = {"z": z, "visible": number == len(mark.frames) - 1}
        if mark.contours:
            figure.add_contour(**look, **shown, ncontours=12, line={"width": 0}, connectgaps=False)
        else:
            figure.add_heatmap(**look, **shown, zmin=mark.low, zmax=mark.high)
    if len(mark.frames) > 1:
        _add_slider(figure, mark, before=len(figure.data) - len(mark.frames))


def _add_slider(figure: go.Figure, mark: Grid, *, before: int) -> None:
    steps = []
    for number, (label, _) in enumerate(mark.frames):
        shown = [True] * before + [other == number for other in range(len(mark.frames))]
        steps.append({"label": escaped(label), "method": "restyle", "args": [{"visible": shown}]})
    figure.update_layout(
        sliders=[
            {
                "active": len(steps) - 1,
                "steps": steps,
                "currentvalue": {"prefix": "after ", "font": {"size": 13, "color": INK}},
                "pad": {"t": 48, "b": 4},
                "font": {"size": 11, "color": MUTED},
                "ticklen": 3,
                "tickcolor": MUTED,
                "bgcolor": GRID,
                "bordercolor": MUTED,
                "activebgcolor": ACCENT,
            }
        ]
    )


def _length(end: Number, start: Number) -> float | None:
    return None if end is None or start is None else end - start
