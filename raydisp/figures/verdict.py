"""The confirm phase: the paired differences behind the verdict, and what each arm costs."""

from __future__ import annotations

import statistics

import pyarrow as pa

from raydisp import analysis, verdict
from raydisp.analysis import MEASURES, Row
from raydisp.figures.chart import (
    Axis,
    Band,
    Chart,
    Panel,
    Plot,
    Points,
    Rule,
    point_opacity,
    point_size,
    shortened,
)
from raydisp.figures.style import ACCENT, MUTED


def verdict_panel(verdicts: pa.Table, trials: pa.Table) -> Panel:
    """The confirm phase: the paired differences behind each arm's verdict.

    Args:
        verdicts: what `verdict.verdicts` made of these trials.
    Raises:
        VerdictError: the trials have no confirm phase that can be judged.
    """
    title = "Paired differences"
    rows = verdicts.to_pylist()
    if not any(row["num_pairs"] for row in rows):
        return Panel(title, "No figure: the confirm phase has no complete pair of runs.")
    bare = [row["arm"] for row in rows if row["num_pairs"] == 0]
    unsure = [row["arm"] for row in rows if row["num_pairs"] == 1]
    first = rows[0]
    sentence = (
        f"Each point is one seed's {_measure_label(first)}, arm minus baseline ({first['unit']}; left of 0 "
        "is better), the square with its bar the mean with its 95 % interval, the band what would not "
        f"matter: ±{analysis.format_value(first['smallest_effect'])}."
    )
    if unsure:
        sentence += f" Without an interval, for want of a second pair: {', '.join(unsure)}."
    if bare:
        sentence += f" Not drawn, for want of a complete pair: {', '.join(bare)}."
    drawn = [row for row in rows if row["num_pairs"]]
    chart = forest(drawn, verdict.paired_differences(trials))
    return Panel(title, sentence, [Plot("verdict", "", chart, rows=3 * len(drawn))])


def forest(rows: list[Row], differences: dict[str, dict[int, float]]) -> Chart:
    """A forest plot: per arm the seeds' paired differences, their mean and its 95 % interval; the line of no
    difference, and the band of differences that would not matter.

    Args:
        rows: of `verdict.verdicts`, those with a pair.
        differences: arm -> seed -> arm minus baseline.
    """
    bound = rows[0]["smallest_effect"]
    # Numbers, not names, are the places of the arms: so points can lie beside their mean.
    places = [0.0 - number for number in range(len(rows))]
    points = [
        (value, place - 0.15, f"{row['arm']}, seed {seed}: {value:+.4f}")
        for row, place in zip(rows, places, strict=True)
        for seed, value in differences[row["arm"]].items()
    ]
    return Chart(
        Axis(f"{_measure_label(rows[0])}, arm minus baseline ({rows[0]['unit']})"),
        Axis(
            "",
            ends=(-len(rows) + 0.4, 0.6),
            ticks=tuple((place, row["arm"]) for place, row in zip(places, rows, strict=True)),
            grid=False,
        ),
        [
            Band("would not matter", "x", -bound, bound, legend=False),
            Rule(0),
            Points(
                "one seed",
                [value for value, _, _ in points],
                [place for _, place, _ in points],
                colour=MUTED,
                symbol="circle-open",
                size=point_size(len(points)),
                opacity=point_opacity(len(points)),
                hover=[text for _, _, text in points],
            ),
            Points(
                "mean and 95 % interval",
                [row["difference"] for row in rows],
                places,
                colour=ACCENT,
                symbol="square",
                size=10,
                x_ends=[(row["low_95"], row["high_95"]) for row in rows],
                hover=[row["sentence"] for row in rows],
            ),
        ],
    )


def cost_panel(trials: pa.Table) -> Panel:
    """Training time and peak memory of the runs of each arm."""
    title = "Cost of the arms"
    rows = analysis.costs(trials).to_pylist()
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    if len(arms) < 2:
        return Panel(title, "No figure: fewer than two arms have a completed run with its training time.")
    plots = []
    for column, label, size in (
        ("train_s", "training time (s)", 1.0),
        ("peak_memory_bytes", "peak memory of one worker (MiB)", 2.0**20),
    ):
        named = [
            (arm, values)
            for arm in arms
            if (
                values := [
                    row[column] / size for row in rows if row["arm"] == arm and row[column] is not None
                ]
            )
        ]
        if not named:
            continue
        places = [0.0 - number for number in range(len(named))]
        points = [
            (value, place - 0.15)
            for (_, values), place in zip(named, places, strict=True)
            for value in values
        ]
        medians = [statistics.median(values) for _, values in named]
        chart = Chart(
            Axis(label),
            Axis(
                "",
                ends=(-len(named) + 0.4, 0.6),
                ticks=tuple((place, shortened(arm)) for place, (arm, _) in zip(places, named, strict=True)),
                grid=False,
            ),
            [
                Points(
                    "one run",
                    [value for value, _ in points],
                    [place for _, place in points],
                    colour=MUTED,
                    symbol="circle-open",
                    size=point_size(len(points)),
                    opacity=point_opacity(len(points)),
                ),
                Points(
                    "median",
                    medians,
                    places,
                    colour=ACCENT,
                    symbol="square",
                    size=10,
                    hover=[f"{arm}: {median:.4g}" for (arm, _), median in zip(named, medians, strict=True)],
                ),
            ],
        )
        name = f"cost-{column.split('_')[0] if column != 'peak_memory_bytes' else 'memory'}"
        plots.append(Plot(name, label.split(" (")[0], chart, rows=3 * len(named)))
    phase = "confirm phase" if rows[0]["phase"] == "confirm" else "search"
    sentence = (
        f"Training time in s and peak memory of one worker in MiB of each completed run of the {phase}, at "
        "equal tokens, with the arm's median; runs that shared a machine slowed each other down."
    )
    return Panel(title, sentence, plots)


def _measure_label(row: Row) -> str:
    outcome = str(row["primary_outcome"])
    return MEASURES[outcome].label if outcome in MEASURES else outcome
