"""Dose-response: every objective against the weight of the dispersion loss, and against its temperature."""

from __future__ import annotations

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES, Row
from raydisp.analysis.search import MIN_SURFACE_POINTS, SURFACE_STEPS
from raydisp.config.search import Objective
from raydisp.figures import words
from raydisp.figures.chart import (
    Axis,
    Band,
    Chart,
    Grid,
    Mark,
    Panel,
    Plot,
    Points,
    linear_axis,
    log_axis,
    point_opacity,
    point_size,
    shortened,
)
from raydisp.figures.history import baseline_line
from raydisp.figures.style import INK, OTHER_STYLE, STYLES
from raydisp.layers import LAYER_CHOICES


def dose_panel(trials: pa.Table, objective: Objective, *, first: bool = True) -> Panel:
    """An objective against weight, and against weight / temperature where both vary.

    Weights of 0 and below have no logarithm: where there are any, the axis is linear.

    Args:
        first: it is the study's first objective; the plots of others have the metric in their names.
    """
    metric = objective.metric
    title = "Dose-response" if first else f"Dose-response of {metric}"
    doses = _doses(trials, objective)
    if not doses:
        return Panel(title, f"No figure: no search trial has completed with a weight and a {metric}.")
    if all(dose["weight"] == 0 for dose in doses):
        return Panel(title, "No figure: every completed search trial has weight 0.")
    # An arm without dispersion is no dose of it: its weight was not searched.
    treated = {dose["arm"] for dose in doses if dose["weight"] != 0}
    drawn = [dose for dose in doses if dose["arm"] in treated]
    log = all(dose["weight"] > 0 for dose in drawn)
    stem = "dose" if first else f"dose-{metric.replace('_', '-')}"
    confirmed = analysis.confirmed_doses(trials, objective).to_pylist()
    plots = [_dose_plot(stem, "weight", "dispersion weight", drawn, confirmed, trials, objective, log=log)]
    relative = [dose for dose in drawn if dose["weight_per_temperature"] is not None]
    sentence = (
        f"{words.capitalised(MEASURES[metric].label)} of each completed search trial against the weight "
        f"of the dispersion loss (no unit, {'logarithmic' if log else 'linear'} axis), by the layers it acts "
        f"on; the ring is the best of them{words.dashes(trials, objective)}; {words.unit(metric)}."
    )
    if all(len({dose[field] for dose in relative}) > 1 for field in ("weight", "temperature")):
        axis = "weight / temperature"
        plots.append(
            _dose_plot(stem, "weight_per_temperature", axis, relative, confirmed, trials, objective, log=log)
        )
        sentence += (
            " For temperatures of 1 and more the loss depends on little but weight / temperature, so that is "
            "drawn too."
        )
    sentence += _confirmed_words(confirmed)
    if left := sorted({dose["arm"] for dose in doses} - treated):
        sentence += f" Without dispersion, so not drawn: {', '.join(left)}."
    return Panel(title, sentence + words.unseen(trials, objective), plots)


def _doses(trials: pa.Table, objective: Objective) -> list[Row]:
    rows = analysis.dose_response(trials, objective).to_pylist()
    return [row for row in rows if row["weight"] is not None]


def _confirmed_words(confirmed: list[Row]) -> str:
    told = ""
    baseline = [row for row in confirmed if row["arm"] == "baseline" and row["num_seeds"] > 1]
    if baseline:
        told += f" The band is the baseline over {baseline[0]['num_seeds']} fresh seeds, lowest to highest."
    if any(row["arm"] != "baseline" and row["weight"] for row in confirmed):
        told += " Stars are the arms that were confirmed: means over fresh seeds with their 95 % intervals."
    return told


def _dose_plot(
    stem: str,
    column: str,
    title: str,
    doses: list[Row],
    confirmed: list[Row],
    trials: pa.Table,
    objective: Objective,
    *,
    log: bool,
) -> Plot:
    confirmed_arms = [
        row
        for row in confirmed
        if row["arm"] != "baseline"
        and row["weight"]
        and row[column] is not None
        and (row[column] > 0 or not log)
    ]
    places = [dose[column] for dose in doses] + [row[column] for row in confirmed_arms]
    axis = (log_axis if log else linear_axis)(title, min(places), max(places))
    marks: list[Mark] = [
        Band("baseline's seeds", "y", row["lowest"], row["highest"])
        for row in confirmed
        if row["arm"] == "baseline" and row["num_seeds"] > 1
    ]
    for name, (colour, symbol), group in _by_layers(doses):
        marks.append(
            Points(
                shortened(name),  # the text at the pointer has all of it
                [dose[column] for dose in group],
                [dose["value"] for dose in group],
                colour=colour,
                symbol=symbol,
                size=point_size(len(doses)),
                opacity=point_opacity(len(doses)),
                hover=words.hover_texts(trials, [dose["trial"] for dose in group], objective),
            )
        )
    best = (min if objective.mode == "min" else max)(doses, key=lambda dose: dose["value"])
    name = f"best: trial {best['trial']}"
    marks.append(Points(name, [best[column]], [best["value"]], colour=INK, symbol="circle-open", size=17))
    if confirmed_arms:
        digits = MEASURES[objective.metric].digits
        marks.append(
            Points(
                "confirmed",
                [row[column] for row in confirmed_arms],
                [row["mean"] for row in confirmed_arms],
                colour=INK,
                symbol="star",
                size=13,
                y_ends=[(row["low_95"], row["high_95"]) for row in confirmed_arms],
                hover=[
                    f"{row['arm']}, {row['num_seeds']} seeds: {row['mean']:.{digits}f}"
                    for row in confirmed_arms
                ],
            )
        )
    assert axis.ends is not None
    marks += baseline_line(trials, objective, axis.ends)
    chart = Chart(axis, Axis(MEASURES[objective.metric].axis), marks)
    return Plot(f"{stem}-{column.replace('_', '-')}", f"against {title}", chart)


def _by_layers(doses: list[Row]) -> list[tuple[str, tuple[str, str], list[Row]]]:
    """Doses grouped by layer choice with a style each; choices beyond the styles share the last."""
    choices = {dose["layers"] or "layers not known" for dose in doses}
    known = [choice for choice in LAYER_CHOICES if choice in choices]
    ordered = known + sorted(choices - set(known))
    named = ordered if len(ordered) <= len(STYLES) else ordered[: len(STYLES) - 1]
    groups: dict[str, list[Row]] = {}
    for dose in doses:
        choice = dose["layers"] or "layers not known"
        groups.setdefault(choice if choice in named else "other choices", []).append(dose)
    # The usual four keep their colours whichever of them a study searches.
    usual = dict(zip(LAYER_CHOICES, STYLES, strict=False))
    spare = iter(STYLES[len(usual) :] + [style for choice, style in usual.items() if choice not in known])
    styles = {choice: usual[choice] if choice in usual else next(spare) for choice in named}
    return [
        (name, styles.get(name, OTHER_STYLE), groups[name])
        for name in [*named, "other choices"]
        if name in groups
    ]


def surface_panel(trials: pa.Table, objective: Objective) -> Panel:
    """The objective over weight and temperature, where enough trials lie between."""
    title = "Weight and temperature"
    surface = analysis.dose_surface(trials, objective)
    doses = [
        dose
        for dose in _doses(trials, objective)
        if dose["weight"] > 0 and dose["temperature"] is not None and dose["temperature"] > 0
    ]
    if surface.num_rows == 0:
        number = len({(dose["weight"], dose["temperature"]) for dose in doses})
        return Panel(
            title,
            f"No figure: it needs {MIN_SURFACE_POINTS} comparable trials at different weights and "
            f"temperatures above 0, not all on a line; there are {number}.",
        )
    columns = surface.to_pydict()
    weights, temperatures = columns["weight"][::SURFACE_STEPS], columns["temperature"][:SURFACE_STEPS]
    values = columns["value"]
    z = [[values[i * SURFACE_STEPS + j] for i in range(SURFACE_STEPS)] for j in range(SURFACE_STEPS)]
    best = (min if objective.mode == "min" else max)(doses, key=lambda dose: dose["value"])
    marks: list[Mark] = [
        Grid(
            weights,
            temperatures,
            [("", z)],
            MEASURES[objective.metric].axis,
            contours=True,
            reverse=objective.mode == "min",
            x_name="weight",
            y_name="temperature",
        ),
        Points(
            "trial",
            [dose["weight"] for dose in doses],
            [dose["temperature"] for dose in doses],
            colour="#ffffff",
            size=point_size(len(doses)) + 1,
            legend=False,
        ),
        Points(
            "trial",
            [dose["weight"] for dose in doses],
            [dose["temperature"] for dose in doses],
            colour="#111111",
            size=point_size(len(doses)) - 2,
            hover=words.hover_texts(trials, [dose["trial"] for dose in doses], objective),
        ),
    ]
    name = f"best: trial {best['trial']}"
    marks.append(
        Points(name, [best["weight"]], [best["temperature"]], colour=INK, symbol="circle-open", size=17)
    )
    chart = Chart(
        log_axis("dispersion weight", min(weights), max(weights)),
        log_axis("temperature", min(temperatures), max(temperatures)),
        marks,
    )
    varied = len({dose["layers"] for dose in doses}) > 1
    sentence = (
        f"{words.capitalised(MEASURES[objective.metric].label)} over weight and temperature (both without a "
        f"unit), linear between the trials, the points, and blank outside them; bright is better; "
        f"{words.unit(objective.metric)}."
        + (
            " The trials also differ in their layers or other fields, which this view passes over."
            if varied
            else ""
        )
    )
    return Panel(title, sentence + words.unseen(trials, objective), [Plot("surface", "", chart)])
