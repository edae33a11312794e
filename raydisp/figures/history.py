"""The search as it went: its history, its front, its fields side by side and what each of them was worth."""

from __future__ import annotations

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import MEASURES
from raydisp.analysis.importance import MAX_RESAMPLED, MIN_TRIALS, TARGET_QUANTILE
from raydisp.figures import words
from raydisp.figures.chart import (
    Axis,
    Chart,
    Line,
    Mark,
    Number,
    Panel,
    Plot,
    Points,
    Texts,
    point_opacity,
    point_size,
    shortened,
)
from raydisp.figures.style import ACCENT, INK, MUTED, styles_of
from raydisp.search_config import Objective


def history_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Objective by trial, the best so far of each arm, and the baseline."""
    title = "Search history"
    rows = analysis.search_history(trials, objective).to_pylist()
    metric = objective.metric
    if not rows:
        return Panel(title, f"No figure: no search trial has completed with a {metric}.")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    styles = styles_of(arms)
    marks: list[Mark] = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        numbers = [row["trial"] for row in own]
        alone = len(arms) == 1
        colour, symbol = (MUTED, "circle") if alone else styles[arm]
        marks.append(
            Points(
                name="trial" if alone else shortened(arm),
                x=numbers,
                y=[row["value"] for row in own],
                colour=colour,
                symbol=symbol,
                size=point_size(len(rows)),
                opacity=point_opacity(len(rows)),
                hover=words.hover_texts(trials, numbers, objective),
            )
        )
        marks.append(
            Line(
                name="best so far" if alone else f"best so far: {shortened(arm)}",
                x=numbers,
                y=[row["best"] for row in own],
                colour=ACCENT if alone else colour,
                steps=True,
                legend=alone,
            )
        )
    ends = (rows[0]["trial"] - 0.5, rows[-1]["trial"] + 0.5)
    marks += baseline_line(
        trials, objective, ends, name="baseline's best" if "baseline" in arms else "baseline"
    )
    ticks = tuple((row["trial"], str(row["trial"])) for row in rows) if len(rows) <= 12 else None
    sentence = (
        "Each point is a completed search trial, the line is the best so far"
        + (" of its arm" if len(arms) > 1 else "")
        + f" ({words.better(objective)} is better){words.dashes(trials, objective)}; {words.unit(metric)}."
    )
    axes = Axis("trial", ends=ends, ticks=ticks, whole=True), Axis(MEASURES[metric].axis)
    return Panel(
        title, sentence + words.unseen(trials, objective), [Plot("history", "", Chart(*axes, marks))]
    )


def baseline_line(
    trials: pa.Table, objective: Objective, ends: tuple[float, float], *, name: str = "baseline"
) -> list[Mark]:
    """The baseline as a dashed line between two places of x; nothing where it does not compare."""
    value = analysis.compared_baseline(trials, objective)
    if value is None:
        return []
    digits = f".{MEASURES[objective.metric].digits}f"
    return [Line(name, list(ends), [value, value], width=1.5, dash="dash", template=digits)]


def parallel_panel(trials: pa.Table, objective: Objective) -> Panel:
    """Every trial as a line over the searched fields and the objective."""
    title = "Fields side by side"
    places, labels = analysis.parallel_coordinates(trials, objective)
    names = list(dict.fromkeys(labels["name"].to_pylist()))
    if len(names) < 3:
        return Panel(title, "No figure: fewer than two searched fields varied over comparable trials.")
    by_name = {name: number for number, name in enumerate(names)}
    paths: dict[int, list[Number]] = {}
    for row in places.to_pylist():
        paths.setdefault(row["trial"], [None] * len(names))[by_name[row["name"]]] = row["place"]
    values = dict(
        zip(
            *[
                [row[key] for row in places.to_pylist() if row["name"] == objective.metric]
                for key in ("trial", "place")
            ],
            strict=True,
        )
    )
    sign = 1 if objective.mode == "min" else -1
    ordered = sorted(paths, key=lambda trial: (sign * values[trial], trial))
    best = set(ordered[: max(1, len(ordered) // 10)])
    marks: list[Mark] = [
        Line("axes", *_joined([([n, n], [0, 1]) for n in range(len(names))]), width=1, legend=False)
    ]
    for name, group, look in (
        (
            "other trials",
            [t for t in paths if t not in best],
            (MUTED, 1.0, 0.5 if len(paths) <= 100 else 0.3),
        ),
        (
            "best tenth" if len(best) > 1 else "best trial",
            [t for t in paths if t in best],
            (ACCENT, 2.0, 0.9),
        ),
    ):
        if group:
            x, y = _joined([_known(paths[trial]) for trial in group])
            colour, width, opacity = look
            marks.append(Line(name, x, y, colour=colour, width=width, opacity=opacity))
    told = labels.to_pylist()
    marks.append(
        Texts(
            [by_name[row["name"]] + 0.02 for row in told],
            [row["place"] for row in told],
            [shortened(row["text"], 14) for row in told],
        )
    )
    ticks = tuple((float(number), _leaf(name, names)) for number, name in enumerate(names))
    across = Axis("", ends=(-0.15, len(names) - 1 + 0.6), ticks=ticks, grid=False)
    up = Axis("", ends=(-0.06, 1.06), ticks=(), grid=False)
    sentence = (
        f"Each line is a completed search trial over the fields that were searched and its "
        f"{objective.metric} ({words.unit(objective.metric)}); the bold ones are the best tenth, and a line "
        "passes by a field that its trial did not have; numbers that span more than a factor of 20 are "
        "placed by their logarithm."
    )
    shown = [Plot("parallel", "", Chart(across, up, marks))]
    return Panel(title, sentence + words.unseen(trials, objective), shown)


def _known(path: list[Number]) -> tuple[list[int], list[Number]]:
    """The axes that a trial has a place on, and the places."""
    numbers = [number for number, place in enumerate(path) if place is not None]
    return numbers, [path[number] for number in numbers]


def _joined(paths: list[tuple[list[int], list[Number]]]) -> tuple[list[Number], list[Number]]:
    """Several lines as one, parted by None."""
    x: list[Number] = []
    y: list[Number] = []
    for one_x, one_y in paths:
        x += [*one_x, None]
        y += [*one_y, None]
    return x, y


def _leaf(name: str, names: list[str]) -> str:
    """The last part of a dotted name, unless another field shares it."""
    leaf = name.rsplit(".", 1)[-1]
    shared = sum(other.rsplit(".", 1)[-1] == leaf for other in names) > 1
    return shortened(name if shared else leaf, 20)


def importance_panel(trials: pa.Table, objective: Objective) -> Panel:
    """What each searched field was worth, arm by arm."""
    title = "Importance of the fields"
    plots: list[Plot] = []
    reasons: list[str] = []
    capped = False
    arms = analysis.search_arms(trials)
    for place, arm in enumerate(arms):
        own = analysis.of_arm(trials, arm)
        rows = analysis.importance(own, objective).to_pylist()
        if not rows:
            number = len(analysis.scored(own, objective))
            who = f"{arm}: " if len(arms) > 1 else ""
            few = f"{number} comparable trials, fewer than {MIN_TRIALS}"
            reasons.append(who + (few if number < MIN_TRIALS else "fewer than two searched fields varied"))
            continue
        capped = capped or rows[0]["num_trials"] > MAX_RESAMPLED
        spots = [-float(number) for number in range(len(rows))]
        chart = Chart(
            Axis("share of the importance", ends=(-0.02, 1.02)),
            Axis(
                "",
                ends=(-len(rows) + 0.4, 0.6),
                ticks=tuple(
                    (spot, shortened(row["name"], 28)) for spot, row in zip(spots, rows, strict=True)
                ),
                grid=False,
            ),
            [
                Points(
                    "share, with a 90 % interval",
                    [row["importance"] for row in rows],
                    spots,
                    colour=ACCENT,
                    symbol="square",
                    size=10,
                    x_ends=[(row["low_90"], row["high_90"]) for row in rows],
                    hover=[f"{row['name']}: {row['importance']:.3f}" for row in rows],
                    legend=False,
                )
            ],
        )
        plots.append(Plot(f"importance-{place}", arm, chart, rows=2 * len(rows)))
    if not plots:
        return Panel(title, f"No figure: {'; '.join(reasons) or 'no search trial has completed'}.")
    sentence = (
        f"How much each searched field decided whether a trial is among the best {100 * TARGET_QUANTILE:g} % "
        f"by {objective.metric} (PED-ANOVA; shares of the sum, no unit), at equal tokens; the bars are 90 % "
        "intervals over resamples of the trials"
        + (f" (of {MAX_RESAMPLED} each)" if capped else "")
        + ", and say nothing of other seeds."
    )
    if reasons:
        sentence += f" Not drawn: {'; '.join(reasons)}."
    return Panel(title, sentence, plots)


def front_panel(trials: pa.Table, objectives: tuple[Objective, ...]) -> Panel:
    """The trials in pairs of objectives, with the front of all of them."""
    title = "Pareto front"
    if len(objectives) < 2:
        return Panel(title, "No figure: the study has one objective.")
    front = analysis.pareto_front(trials, *objectives).to_pylist()
    if not front:
        return Panel(title, "No figure: no completed search trial has all of the objectives.")
    tokens = front[0]["num_tokens"]
    on_front = {row["trial"] for row in front}
    first = objectives[0]
    plots = []
    for place, other in enumerate(objectives[1:]):
        rows = [
            row
            for row in analysis.search_trials(trials).to_pylist()
            if row["num_tokens"] == tokens
            and analysis.value_of(row, first.metric) is not None
            and analysis.value_of(row, other.metric) is not None
        ]
        marks: list[Mark] = []
        for name, group, (colour, symbol) in (
            ("trial", [row for row in rows if row["trial"] not in on_front], (MUTED, "circle")),
            ("Pareto front", [row for row in rows if row["trial"] in on_front], (ACCENT, "diamond")),
        ):
            if group:
                marks.append(
                    Points(
                        name,
                        [row[first.metric] for row in group],
                        [row[other.metric] for row in group],
                        colour=colour,
                        symbol=symbol,
                        size=point_size(len(rows)),
                        hover=words.hover_texts(trials, [row["trial"] for row in group], first),
                    )
                )
        baseline = analysis.baseline_row(trials, first)
        ours = [analysis.value_of(baseline, one.metric) for one in (first, other)]
        if baseline is not None and None not in ours and baseline["num_tokens"] == tokens:
            marks.append(Points("baseline", [ours[0]], [ours[1]], colour=INK, symbol="square-open", size=11))
        chart = Chart(Axis(MEASURES[first.metric].axis), Axis(MEASURES[other.metric].axis), marks)
        plots.append(Plot(f"front-{place}", f"{first.metric} and {other.metric}", chart))
    aims = ", ".join(f"{one.metric} ({words.better(one)} is better)" for one in objectives)
    sentence = (
        "Each point is a completed search trial, the diamonds are those that no other betters in all of "
        f"{aims}; at {tokens:,} tokens, units at the axes."
    )
    return Panel(title, sentence, plots)
