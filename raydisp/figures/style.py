"""Colours and symbols of the figures, safe for colour-blind readers; no colour alone tells things apart."""

from __future__ import annotations

from collections.abc import Iterable

# Figures have the colours of the light page; in the dark, the page's script exchanges them.
INK, MUTED, GRID, ACCENT, WARN = "#1f2328", "#636c76", "#dfe3e8", "#0072b2", "#d55e00"
PAPER = "#fefefe"
"""Behind labels that lie on lines; not the white that stays white in the dark."""
DARK_COLOURS = {
    INK: "#e6edf3",
    MUTED: "#9aa4af",
    GRID: "#30363d",
    ACCENT: "#56b4e9",
    "#56b4e9": "#a8d8f5",
    PAPER: "#0f1318",
}

# Okabe and Ito's palette, with a symbol each so that nothing hangs on colour alone.
STYLES = [
    (ACCENT, "circle"),
    (WARN, "square"),
    ("#009e73", "triangle-up"),
    ("#cc79a7", "diamond"),
    ("#e69f00", "cross"),
    ("#56b4e9", "x"),
]
OTHER_STYLE = (MUTED, "star")

# From the embedding output to the last layer; readable on white and on black.
DEPTH_COLOURS = ("#8a4fb0", "#4a6fc0", "#2a8ca0", "#2fa968", "#a8b022")


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name -> colour and symbol; names beyond the palette share the last style."""
    return {name: STYLES[i] if i < len(STYLES) else OTHER_STYLE for i, name in enumerate(names)}


def blend(colours: tuple[str, ...], place: float) -> str:
    """The colour at a place from 0 to 1 of a scale of colours."""
    at = min(max(place, 0.0), 1.0) * (len(colours) - 1)
    left = min(int(at), len(colours) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours[left : left + 2]]
    mixed = [round(a + (b - a) * (at - left)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
