"""How the trials went: learning curves, and a time line."""

from __future__ import annotations

from collections.abc import Sequence

from raydisp import analysis
from raydisp.analysis import Row
from raydisp.analysis.training import CURVE_MEASURES, MAX_CURVE_POINTS, MAX_CURVES
from raydisp.config.search import Objective
from raydisp.figures.chart import Axis, Chart, Line, Mark, Number, Panel, Plot, Points, log_axis, shortened
from raydisp.figures.style import ACCENT, INK, MUTED, WARN, styles_of
from raydisp.results import STATUSES, Tables

_LABELS = {
    "lm_loss": "training loss (nats per token)",
    "dispersion_loss": "dispersion loss (unweighted, no unit)",
    "distillation_loss": "divergence from the teacher (T² KL, unweighted, nats per token)",
    "grad_norm": "gradient norm (before clipping, no unit)",
    "val_loss": "validation loss (nats per token)",
}
MAX_STARTS = 100
"""Bars that are told apart by a stroke at their start: more would hide them."""
_STATUS_COLOURS = dict(zip(STATUSES, (ACCENT, "#e69f00", WARN, "#cc79a7", MUTED), strict=True))
_KINDS = {
    "other": ("other trials", MUTED, 1.0, "solid", 0.5),
    "pruned": ("pruned", WARN, 1.0, "solid", 0.7),
    "baseline": ("baseline", INK, 2.0, "dash", 1.0),
    "best": ("best", ACCENT, 2.5, "solid", 1.0),
}


def curves_panel(tables: Tables, objective: Objective) -> Panel:
    """Loss, dispersion, gradient norm and validation loss over the tokens of each trial."""
    title = "Learning curves"
    rows = analysis.learning_curves(tables, objective).to_pylist()
    if not rows:
        return Panel(title, "No figure: no trial of the search has rows of steps or evaluations.")
    plots = []
    arms = analysis.search_arms(tables.trials)
    for measure in CURVE_MEASURES:
        own = [row for row in rows if row["measure"] == measure]
        if own:
            values = [row["value"] for row in own]
            # One spike of the gradient would press all the rest onto the axis.
            log = measure == "grad_norm" and min(values) > 0 and max(values) > 10 * min(values)
            label = _LABELS[measure]
            axis = log_axis(label, min(values), max(values)) if log else Axis(label)
            chart = Chart(Axis("tokens seen"), axis, _curves(own, arms))
            title_of_plot = label.split(" (")[0]
            plots.append(Plot(f"curve-{measure.replace('_', '-')}", title_of_plot, chart))
    num_drawn = len({row["trial"] for row in rows})
    num_all = tables.trials["phase"].to_pylist().count("search")
    sentence = (
        "Each line is a trial of the search, against the tokens it has seen; points of the steps are means "
        f"over equal numbers of steps, at most {MAX_CURVE_POINTS} to a line, and the last validation sees "
        "the whole split; units at the axes."
    )
    if any(row["kind"] == "pruned" for row in rows):
        sentence += " A cross ends the line of a pruned trial."
    if len(arms) > 1:
        sentence += " The bold lines are the best of each arm, and end in the arm's symbol."
    if num_all > MAX_CURVES:
        sentence += (
            f" Drawn: {num_drawn} of {num_all:,} trials, the baseline and the best among them, the others "
            "evenly chosen."
        )
    return Panel(title, sentence, plots)


def _curves(rows: list[Row], arms: Sequence[str]) -> list[Mark]:
    """Lines of each kind of trial; of several arms the best has a line, a colour and an end of its own.

    Args:
        rows: of `analysis.learning_curves`, of one measure.
        arms: of the search but the baseline.
    """
    styles = styles_of(arms)
    marks: list[Mark] = []
    for kind, (name, colour, width, dash, opacity) in _KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        groups = [(name, colour, "x", own)]
        if kind == "best" and len(arms) > 1:
            groups = [
                (f"best: {shortened(arm)}", *styles[arm], [row for row in own if row["arm"] == arm])
                for arm in arms
            ]
        for label, ink, symbol, group in groups:
            paths: dict[int, list[Row]] = {}
            for row in group:
                paths.setdefault(row["trial"], []).append(row)
            if not paths:
                continue
            x: list[Number] = []
            y: list[Number] = []
            hover: list[str] = []
            for trial, path in paths.items():
                x += [*(row["num_tokens"] for row in path), None]
                y += [*(_rounded(row) for row in path), None]
                hover += [f"trial {trial}, {path[0]['arm']}"] * len(path) + [""]
            dotted = all(len(path) < 12 for path in paths.values()) and kind != "other"
            marks.append(
                Line(
                    label,
                    x,
                    y,
                    colour=ink,
                    width=width,
                    dash=dash,
                    opacity=opacity,
                    symbol="circle" if dotted else "",
                    hover=hover,
                )
            )
            if kind == "pruned" or len(groups) > 1:
                ends = [path[-1] for path in paths.values()]
                marks.append(
                    Points(
                        "stopped here" if kind == "pruned" else f"end of {label}",
                        [row["num_tokens"] for row in ends],
                        [_rounded(row) for row in ends],
                        colour=ink,
                        symbol=symbol,
                        size=8,
                        legend=False,
                    )
                )
    return marks


def _rounded(row: Row) -> float:
    return float(f"{row['value']:.6g}")


def time_line_panel(tables: Tables) -> Panel:
    """When each attempt ran, on which host."""
    title = "Time line"
    rows = analysis.time_line(tables.attempts).to_pylist()
    if not rows:
        return Panel(title, "No figure: no attempt has both a start and an end.")
    lanes = sorted({(row["hostname"], row["lane"]) for row in rows})
    places = {lane: -float(number) for number, lane in enumerate(lanes)}
    longest = max(row["end_s"] for row in rows)
    size, unit = next(
        ((size, unit) for size, unit in ((3600, "hours"), (60, "minutes")) if longest >= 2 * size), (1, "s")
    )
    marks: list[Mark] = []
    known = [status for status in STATUSES if any(row["status"] == status for row in rows)]
    for status, colour in _STATUS_COLOURS.items():
        own = [row for row in rows if row["status"] == status]
        if status not in known:
            continue
        x: list[Number] = []
        y: list[Number] = []
        hover: list[str] = []
        for row in own:
            place = places[row["hostname"], row["lane"]]
            text = (
                f"trial {row['trial']}, {row['arm']}, attempt {row['attempt']}: {status}\n"
                f"{(row['end_s'] - row['start_s']):.0f} s on {row['hostname']}"
            )
            x += [row["start_s"] / size, row["end_s"] / size, None]
            y += [place, place, None]
            hover += [text, text, ""]
        marks.append(Line(status, x, y, colour=colour, width=9, hover=hover))
        if len(rows) <= MAX_STARTS:
            marks.append(
                Points("start", x[::3], y[::3], colour=INK, symbol="line-ns-open", size=11, legend=False)
            )
    hosts = list(dict.fromkeys(host for host, _ in lanes))
    ticks = tuple((places[host, 0], shortened(host, 20)) for host in hosts)
    chart = Chart(
        Axis(f"{unit} since the study began", ends=(-0.01 * longest / size, 1.01 * longest / size)),
        Axis("", ends=(-len(lanes) + 0.4, 0.6), ticks=ticks, grid=False),
        marks,
    )
    unended = tables.attempts.num_rows - len(rows)
    sentence = (
        f"Each bar is an attempt of a trial, from its start to its end, by host ({len(hosts)}; one line for "
        f"each that ran at the same time); {unit}."
    )
    if unended:
        sentence += f" Not drawn, for want of a start or an end: {unended}."
    return Panel(title, sentence, [Plot("time-line", "", chart, rows=len(lanes) + 4)])
