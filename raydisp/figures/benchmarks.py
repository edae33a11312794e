"""What the arms of a confirm phase do to benchmarks, with both errors: over seeds, and over items."""

from __future__ import annotations

from collections.abc import Sequence

from raydisp.analysis import Row
from raydisp.figures.chart import Axis, Chart, Panel, Plot, Points, Rule, shortened
from raydisp.figures.style import ACCENT, MUTED

NORMAL_95 = 1.96


def benchmark_panel(rows: Sequence[Row]) -> Panel | None:
    """Differences of accuracies; None where there is none. Perplexities have scales of their own: a table's.

    Args:
        rows: of `raydisp.tasks.effects.benchmarks`.
    """
    drawn = [row for row in rows if _is_share(row)]
    if not drawn:
        return None
    sentence = (
        "Arm minus baseline in percentage points (right of 0 is better), of the models at the end of each "
        "pair of confirm runs. Above, the mean over seeds with its 95 % interval: how trainings vary, on "
        "these items. Below, the same with ± 1.96 standard errors over items, paired item by item: how other "
        "items would vary it. Described, not tested."
    )
    left_out = [row["benchmark"] for row in rows if not _is_share(row)]
    if left_out:
        sentence += f" Not drawn, as no share of items: {', '.join(dict.fromkeys(left_out))}."
    return Panel("Benchmarks", sentence, [Plot("benchmarks", "", _forest(drawn), rows=2 * len(drawn))])


def _is_share(row: Row) -> bool:
    """Whether a value is a share of items answered well."""
    means = (row["arm_mean"], row["baseline_mean"])
    return bool(row["higher_is_better"]) and all(mean is not None and 0 <= mean <= 1 for mean in means)


def _forest(rows: Sequence[Row]) -> Chart:
    places = [0.0 - number for number in range(len(rows))]
    names = [f"{row['benchmark']}, {shortened(row['arm'], 16)}" for row in rows]
    over_items = [
        (row, place - 0.25)
        for row, place in zip(rows, places, strict=True)
        if row["items_stderr"] is not None
    ]
    return Chart(
        Axis("arm minus baseline (percentage points)"),
        Axis("", ends=(-len(rows) + 0.4, 0.6), ticks=tuple(zip(places, names, strict=True)), grid=False),
        [
            Rule(0),
            Points(
                "over items",
                [100 * row["difference"] for row, _ in over_items],
                [place for _, place in over_items],
                colour=MUTED,
                symbol="circle-open",
                size=7,
                x_ends=[_around(row) for row, _ in over_items],
                hover=[_told(row) for row, _ in over_items],
            ),
            Points(
                "over seeds",
                [100 * row["difference"] for row in rows],
                places,
                colour=ACCENT,
                symbol="square",
                size=9,
                x_ends=[_interval(row) for row in rows],
                hover=[_told(row) for row in rows],
            ),
        ],
    )


def _around(row: Row) -> tuple[float, float]:
    half = NORMAL_95 * row["items_stderr"]
    return 100 * (row["difference"] - half), 100 * (row["difference"] + half)


def _interval(row: Row) -> tuple[float | None, float | None]:
    low, high = row["low_95"], row["high_95"]
    return (None, None) if low is None else (100 * low, 100 * high)


def _told(row: Row) -> str:
    text = f"{row['benchmark']}, {row['arm']}: {100 * row['difference']:+.2f} points ({row['metric']})"
    return text if row["num_items"] is None else f"{text}, {row['num_items']:,} items"
