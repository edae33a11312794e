"""What a figure is before anyone draws it: axes and marks, in plain numbers and plain texts.

`interactive` draws a chart for the page and `paper` for print: both show the same numbers. Texts are as they
come from rows or from the study file; whoever draws escapes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from raydisp.figures.style import INK, MUTED

Number = float | int | None
Ticks = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis."""

    title: str
    """With the unit in brackets where there is one."""
    log: bool = False
    ends: tuple[float, float] | None = None
    """In data units, on a log axis too; None: whatever the marks need."""
    ticks: Ticks | None = None
    """(place, text); None: whatever the drawing thinks fit."""
    whole: bool = False
    """Only whole numbers are ticks."""
    grid: bool = True


@dataclasses.dataclass(frozen=True)
class Points:
    """Symbols, each with an interval if it has one."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    colour: str = MUTED
    symbol: str = "circle"
    size: float = 9
    opacity: float = 1.0
    hover: Sequence[str] = ()
    x_ends: Sequence[tuple[Number, Number]] = ()
    """The interval of each point in x; (None, None) where it has none."""
    y_ends: Sequence[tuple[Number, Number]] = ()
    legend: bool = True


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through points; None in both parts it."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    colour: str = INK
    width: float = 2
    dash: str = "solid"
    """solid | dash | dot"""
    steps: bool = False
    """Horizontal to the next point, then up or down."""
    symbol: str = ""
    opacity: float = 1.0
    hover: Sequence[str] = ()
    template: str = ""
    """Format of y at the pointer, such as `.3f`; empty: the line tells nothing there."""
    legend: bool = True


@dataclasses.dataclass(frozen=True)
class Band:
    """A range of one axis over the whole length of the other."""

    name: str
    axis: str
    """x | y: the axis whose values it bounds."""
    low: float
    high: float
    legend: bool = True


@dataclasses.dataclass(frozen=True)
class Rule:
    """A dashed line across the drawing at a value of x."""

    x: float


@dataclasses.dataclass(frozen=True)
class Texts:
    """Short labels beside places."""

    x: Sequence[float]
    y: Sequence[float]
    text: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values of a plane as colours."""

    x: Sequence[float]
    y: Sequence[float]
    frames: Sequence[tuple[str, Sequence[Sequence[Number]]]]
    """(label, z[y][x]): one picture, or several to slide through, of which the last is shown first."""
    label: str
    """What the colours mean."""
    low: float | None = None
    high: float | None = None
    contours: bool = False
    reverse: bool = False
    """The bright end of the colours is the low one."""
    x_name: str = "x"
    y_name: str = "y"


Mark = Points | Line | Band | Rule | Texts | Grid


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing: marks, the first below the others."""

    x: Axis
    y: Axis
    marks: Sequence[Mark]


@dataclasses.dataclass(frozen=True)
class Plot:
    """One drawing of a panel."""

    name: str
    """Unique on the page; letters, digits and '-'."""
    title: str
    """Plain text above the drawing; empty where the panel has no other."""
    chart: Chart
    rows: int = 0
    """Lines of text along y that the drawing must have room for; 0: the usual height will do."""
    columns: int = 0
    """Labels side by side that it must have room for, in a box that scrolls where there is less; 0: any width
    will do."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """A question, its drawings, and one or more sentences that say what they show.

    Without drawings the sentence says why there are none.
    """

    title: str
    sentence: str
    plots: list[Plot] = dataclasses.field(default_factory=list)


def log_axis(title: str, low: float, high: float) -> Axis:
    """A log axis with a little air; much of it around a single value, so that it has more than one tick."""
    low, high = (low / 1.4, high * 1.4) if high > 2 * low else (low / 4, high * 4)
    return Axis(f"{title} (log scale)", log=True, ends=(low, high), ticks=log_ticks(low, high))


def linear_axis(title: str, low: float, high: float) -> Axis:
    """A linear axis with a little air, around a single value too."""
    air = 0.05 * (high - low) or abs(low) or 1.0
    return Axis(title, ends=(low - air, high + air))


def log_ticks(low: float, high: float) -> Ticks:
    """Ticks of a log axis: bare digits between the powers of ten, as drawn by default, read as values."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [float(f"{step}e{decade}") for decade in decades[::every] for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= 8:
            break
    return tuple((value, f"{value:g}") for value in inside)


def point_size(number: int) -> float:
    """Hundreds of points would hide each other."""
    return 9 if number <= 100 else 6


def point_opacity(number: int) -> float:
    """As `point_size`."""
    return 1.0 if number <= 100 else 0.7


def shortened(text: str, most: int = 24) -> str:
    """A name that leaves a legend or an axis room for others."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
