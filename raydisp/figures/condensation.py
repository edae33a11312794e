"""Condensation: how the cosines between tokens are spread by depth, over training, and against the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp import analysis
from raydisp.analysis import MEASURES, LayerProfile
from raydisp.config.search import Objective
from raydisp.figures import words
from raydisp.figures.chart import (
    Axis,
    Chart,
    Grid,
    Line,
    Mark,
    Panel,
    Plot,
    Points,
    linear_axis,
    log_ticks,
    point_opacity,
    point_size,
    shortened,
)
from raydisp.figures.style import ACCENT, DEPTH_COLOURS, INK, MUTED, blend, styles_of
from raydisp.results import NUM_HISTOGRAM_BINS, Tables


def profile_panel(tables: Tables, objective: Objective) -> Panel:
    """Mean cosine against layer number for the baseline and the best trial."""
    title = "Condensation by layer"
    profiles = [
        (name, profile)
        for name, trial in _shown(tables, objective)
        if (profile := analysis.layer_profile(tables.layers, trial))
    ]
    if not profiles:
        return Panel(title, "No figure: neither the baseline nor a best trial has a measure of condensation.")
    marks = [
        Line(
            name,
            profile.layer,
            profile.cosine_mean,
            colour=MUTED if name == "baseline" else ACCENT,
            dash="dash" if name == "baseline" else "solid",
            symbol="square" if name == "baseline" else "circle",
            template=".3f",
        )
        for name, profile in profiles
    ]
    most = max(profile.layer[-1] for _, profile in profiles)
    every = max(1, math.ceil(most / 12))
    ticks = tuple((float(layer), str(layer)) for layer in range(0, most + 1, every))
    chart = Chart(
        Axis("layer (0 is the embedding output)", ends=(-0.3, most + 0.3), ticks=ticks),
        Axis("mean cosine between tokens"),
        marks,
    )
    sentence = (
        "Mean cosine between the tokens of a sequence (no unit; 1: all point the same way) after each layer, "
        "at the last evaluation; the last layer is taken after the final norm."
    )
    return Panel(title, sentence + _absent([name for name, _ in profiles]), [Plot("profile", "", chart)])


def heat_map_panel(tables: Tables, objective: Objective) -> Panel:
    """The field's picture of condensation: how the cosines between tokens are spread, by depth."""
    title = "Spread of cosines by depth"
    found: list[tuple[str, list[tuple[LayerProfile, list[Any]]]]] = []
    for name, trial in _shown(tables, objective):
        frames = [(one, one.density()) for one in analysis.layer_profiles(tables.layers, trial)]
        frames = [(one, density) for one, density in frames if any(density)]
        if frames:
            found.append((name, frames))
    if not found:
        return Panel(title, "No figure: neither the baseline nor a best trial has a histogram of cosines.")
    layers = [layer for _, frames in found for _, density in frames for layer in density if layer is not None]
    # One colour scale and one range for all, or the pictures would not compare. The last bin holds each token
    # with itself, which in short sequences would outshine everything else: it does not set the scale.
    last = [layer for _, frames in found for layer in frames[-1][1] if layer is not None]
    top = max(max(layer[:-1]) for layer in last) or None
    width = 2 / NUM_HISTOGRAM_BINS
    first = min(next(i for i, x in enumerate(layer) if x) for layer in layers)
    nothing: list[float | None] = [None] * NUM_HISTOGRAM_BINS
    plots = []
    for place, (name, frames) in enumerate(found):
        pictures = []
        for one, density in frames:
            # Four digits are more than a colour shows, and a quarter of the bytes.
            columns = [[float(f"{x:.4g}") for x in layer] if layer else nothing for layer in density]
            pictures.append((_tokens(one), [list(row) for row in zip(*columns, strict=True)][first:]))
        centres = [-1 + (i + 0.5) * width for i in range(first, NUM_HISTOGRAM_BINS)]
        grid = Grid(
            frames[-1][0].depth_frac,
            centres,
            pictures,
            "density",
            low=0,
            high=top,
            x_name="depth",
            y_name="cosine",
        )
        chart = Chart(
            Axis(
                "depth (fraction of the layers)",
                ticks=((0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1")),
                grid=False,
            ),
            Axis("cosine between tokens", ends=(-1 + first * width, 1), grid=False),
            [grid],
        )
        plots.append(Plot(f"heat-map-{place}", name, chart))
    when = (
        "at the last evaluation (the slider goes back to earlier ones)"
        if any(len(frames) > 1 for _, frames in found)
        else "at the last evaluation"
    )
    sentence = (
        "Density of the cosine over all pairs of tokens of a sequence (share of pairs per unit of cosine, "
        f"one colour scale) against depth (0: embedding output, 1: after the final norm), {when}; a bright "
        "band that climbs is condensation, the line at 1 is each token with itself."
    )
    return Panel(title, sentence + _absent([name for name, _ in found]), plots)


def _tokens(profile: LayerProfile) -> str:
    return f"step {profile.step}" if profile.num_tokens is None else short_tokens(profile.num_tokens)


def short_tokens(number: int) -> str:
    """`51 k`, `1.2 M`: tokens where there is room for little."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def trend_panel(tables: Tables, objective: Objective) -> Panel:
    """Mean cosine of each layer over training, for the baseline and the best trial.

    The tokens are on a log axis where a trial was evaluated at log-spaced ones. Its initial weights, at 0
    tokens, stand at the left end of it.
    """
    title = "Condensation over training"
    plots = []
    shown = _shown(tables, objective)
    trends = [(name, analysis.layer_trend(tables.layers, trial).to_pylist()) for name, trial in shown]
    trends = [(name, rows) for name, rows in trends if len({row["num_tokens"] for row in rows}) > 1]
    # One range for both, or the pictures would not compare.
    values = [row["cosine_mean"] for _, rows in trends for row in rows if row["cosine_mean"] is not None]
    axis = Axis("mean cosine between tokens")
    if values:
        axis = linear_axis(axis.title, min(values), max(values))
    seen = sorted({row["num_tokens"] for _, rows in trends for row in rows})
    logarithmic = len(seen) > 2 and _log_spaced(tables, [trial for _, trial in shown])
    along, places = _log_tokens(seen) if logarithmic else (Axis("tokens seen"), {})
    for place, (name, rows) in enumerate(trends):
        numbers = sorted({row["layer"] for row in rows})
        told = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
        marks: list[Mark] = []
        for number in numbers:
            own = [row for row in rows if row["layer"] == number]
            marks.append(
                Line(
                    f"layer {number}",
                    [places.get(row["num_tokens"], row["num_tokens"]) for row in own],
                    [row["cosine_mean"] for row in own],
                    colour=blend(DEPTH_COLOURS, number / max(numbers[-1], 1)),
                    symbol="circle",
                    hover=[_hover(row) for row in own] if logarithmic else (),
                    template="" if logarithmic else ".3f",
                    legend=number in told,
                )
            )
        chart = Chart(along, axis, marks)
        plots.append(Plot(f"trend-{place}", name, chart))
    if not plots:
        return Panel(
            title, "No figure: neither the baseline nor a best trial was measured twice while it trained."
        )
    sentence = (
        "Mean cosine between the tokens of a sequence (no unit) of every layer at each evaluation, against "
        "the tokens seen; from violet, the embedding output, to yellow-green, the last layer."
    )
    if places:
        sentence += " Leftmost, at 0: the initial weights."
    return Panel(title, sentence + _absent([name for name, _ in trends]), plots)


def _log_spaced(tables: Tables, trials: Sequence[int]) -> bool:
    """Whether any of these trials was evaluated at log-spaced tokens."""
    rows = tables.trials.filter(pc.is_in(tables.trials["trial"], pa.array(trials, pa.int32())))
    configs = (json.loads(text) for text in rows["config_json"].to_pylist() if text is not None)
    return any(config.get("evaluate", {}).get("num_log_spaced") is not None for config in configs)


def _log_tokens(tokens: Sequence[int]) -> tuple[Axis, dict[int, float]]:
    """A log axis of tokens, and where on it stands what has no logarithm: {0: place}.

    Args:
        tokens: sorted, at least two of them above 0.
    """
    title, last = "tokens seen (log scale)", tokens[-1]
    first = next(number for number in tokens if number > 0)
    ticks = tuple((value, short_tokens(int(value))) for value, _ in log_ticks(first, last))
    if tokens[0] > 0:
        return Axis(title, log=True, ends=(first / 1.4, last * 1.4), ticks=ticks), {}
    # A tenth of the width before the first, and half a decade at least: it is not one of the tokens there.
    start = first / max(10**0.5, (last / first) ** 0.1)
    return Axis(title, log=True, ends=(start / 1.4, last * 1.4), ticks=((start, "0"), *ticks)), {0: start}


def _hover(row: dict[str, Any]) -> str:
    when = f"{row['num_tokens']:,} tokens" if row["num_tokens"] else "initial weights"
    cosine = "not defined" if row["cosine_mean"] is None else f"{row['cosine_mean']:.3f}"
    return f"layer {row['layer']}, {when}: {cosine}"


def against_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Condensation against the loss, one point per run."""
    title = "Condensation and loss"
    metric = objective.metric
    if metric in ("layer_cosine_mean", "spearman", "kendall"):
        objective = Objective(metric="val_loss", mode="min")
        metric = objective.metric
    rows = analysis.condensation_runs(trials, objective).to_pylist()
    if len(rows) < 2:
        return Panel(title, "No figure: fewer than two runs of equal tokens have both.")
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: (arm == "baseline", arm))
    styles = styles_of(arm for arm in arms if arm != "baseline")
    marks = []
    digits = MEASURES[metric].digits
    for phase in ("search", "confirm"):
        for arm in arms:
            own = [row for row in rows if (row["phase"], row["arm"]) == (phase, arm)]
            if not own:
                continue
            colour, symbol = (INK, "square") if arm == "baseline" else styles[arm]
            marks.append(
                Points(
                    shortened(arm) + (", confirmed" if phase == "confirm" else ""),
                    [row["layer_cosine_mean"] for row in own],
                    [row["value"] for row in own],
                    colour=colour,
                    symbol=symbol if phase == "search" else f"{symbol}-open",
                    size=point_size(len(rows)),
                    opacity=point_opacity(len(rows)) if phase == "search" else 1.0,
                    hover=[
                        f"trial {row['trial']}, {row['arm']}, seed {row['seed']}\n"
                        f"mean cosine {row['layer_cosine_mean']:.3f}\n{metric} {row['value']:.{digits}f}"
                        for row in own
                    ],
                )
            )
    chart = Chart(
        Axis(f"{MEASURES['layer_cosine_mean'].label} (1: all tokens alike)"),
        Axis(MEASURES[metric].axis),
        marks,
    )
    confirmed = any(row["phase"] == "confirm" for row in rows)
    sentence = (
        f"Each point is a completed run: its mean cosine between tokens over the layers (no unit) and its "
        f"{MEASURES[metric].label} ({words.unit(metric)}), at equal tokens"
        + ("; open symbols are runs of the confirm phase." if confirmed else ".")
    )
    return Panel(title, sentence, [Plot("condensation-loss", "", chart)])


def _shown(tables: Tables, objective: Objective) -> list[tuple[str, int]]:
    """The baseline and the best trial by name."""
    named = []
    if baseline := analysis.baseline_row(tables.trials, objective):
        named.append(("baseline", baseline["trial"]))
    if best := analysis.best_trial(tables.trials, objective):
        arm = "" if best["arm"] == "search" else f" ({best['arm']})"
        named.append((f"best: trial {best['trial']}{arm}", best["trial"]))
    return named if tables.layers.num_rows else []


def _absent(names: Sequence[str]) -> str:
    if len(names) == 2:
        return ""
    return f" Only the {names[0].split(':')[0]} is drawn: the other has no measure."
