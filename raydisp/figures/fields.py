"""The searched fields: side by side with the objective, and what each of them was worth."""

from __future__ import annotations

import pyarrow as pa

from raydisp import analysis
from raydisp.analysis import Row
from raydisp.analysis.importance import (
    FANOVA,
    MAX_RESAMPLED,
    MIN_TRIALS,
    PED_ANOVA,
    TARGET_QUANTILE,
    has_fanova,
)
from raydisp.config.search import Objective
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
    shortened,
)
from raydisp.figures.style import ACCENT, MUTED, WARN


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
    shown = [Plot("parallel", "", Chart(across, up, marks), columns=len(names))]
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
    drawn: set[str] = set()
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
        plots.append(Plot(f"importance-{place}", arm, _shares(rows), rows=2 * len(_names(rows))))
        drawn |= {row["evaluator"] for row in rows}
    if not plots:
        return Panel(title, f"No figure: {'; '.join(reasons) or 'no search trial has completed'}.")
    metric = objective.metric
    sentence = (
        f"How much each searched field decided whether a trial is among the best {100 * TARGET_QUANTILE:g} % "
        f"by {metric} (PED-ANOVA"
    )
    if FANOVA in drawn:
        sentence += f", squares), and how far {metric} varies with it alone over all trials (fANOVA, circles"
    sentence += (
        "; shares of the sum, no unit), at equal tokens; the bars are 90 % intervals over resamples of the"
    )
    sentence += f" trials{f' (of {MAX_RESAMPLED} each)' if capped else ''}, and say nothing of other seeds."
    if not has_fanova():
        sentence += (
            " Optuna's fANOVA is drawn beside it where scikit-learn is (pip install 'raydisp[importance]')."
        )
    if reasons:
        sentence += f" Not drawn: {'; '.join(reasons)}."
    return Panel(title, sentence, plots)


def _names(rows: list[Row]) -> list[str]:
    """The fields, the most important by PED-ANOVA first."""
    return list(dict.fromkeys(row["name"] for row in rows))


def _shares(rows: list[Row]) -> Chart:
    """Shares with their intervals, a line for each field.

    Args:
        rows: of `analysis.importance`.
    """
    spots = {name: -float(number) for number, name in enumerate(_names(rows))}
    both = len({row["evaluator"] for row in rows}) > 1
    marks: list[Mark] = []
    for evaluator, colour, symbol, shift in (
        (PED_ANOVA, ACCENT, "square", 0.13 if both else 0.0),
        (FANOVA, WARN, "circle", -0.13),
    ):
        own = [row for row in rows if row["evaluator"] == evaluator]
        if own:
            marks.append(
                Points(
                    evaluator,
                    [row["importance"] for row in own],
                    [spots[row["name"]] + shift for row in own],
                    colour=colour,
                    symbol=symbol,
                    size=10,
                    x_ends=[(row["low_90"], row["high_90"]) for row in own],
                    hover=[f"{row['name']}: {row['importance']:.3f} ({evaluator})" for row in own],
                    legend=both,
                )
            )
    ticks = tuple((spot, shortened(name, 28)) for name, spot in spots.items())
    return Chart(
        Axis("share of the importance", ends=(-0.02, 1.02)),
        Axis("", ends=(-len(spots) + 0.4, 0.6), ticks=ticks, grid=False),
        marks,
    )
