"""How often the verdict errs, and whether plans keep what they promise: simulated studies, in seconds.

    python benchmarks/verdicts.py                      # 10,000 studies a case, as a Markdown table
    python benchmarks/verdicts.py --studies 100000     # more of them
    python benchmarks/verdicts.py --json verdicts.json # and the numbers

Every study is judged by `raydisp.paired.judge`, the function that judges real ones, with as many seeds as its
number of arms needs. Differences have mean 0 (or the true effect that a case says) and standard deviation 1.
The exit status is 1 if a promised figure is missed; what is not promised is reported as it comes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from raydisp import paired

NUM_ARMS = (1, 2, 3, 4)
Draw = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A share of studies (or of arms in them) that was counted."""

    question: str
    differences: str
    num_arms: int
    num_seeds: int
    share: float
    low: float
    """95 % interval of the share (Clopper and Pearson)."""
    high: float
    promised_low: float | None = None
    promised_high: float | None = None
    is_bound: bool = False
    """The promise is a bound on the true share: it is missed where the whole interval lies outside."""

    @property
    def is_kept(self) -> bool | None:
        """None where nothing was promised."""
        if self.promised_low is None or self.promised_high is None:
            return None
        if self.is_bound:
            return self.low <= self.promised_high and self.high >= self.promised_low
        return self.promised_low <= self.share <= self.promised_high


# --- differences with mean 0 and standard deviation 1 --------------------------------------------------


def normal(draw: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return draw.normal(size=shape)


def shared_baseline(draw: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """As in a real study: each arm less the same baseline, so that two arms correlate by 0.5."""
    studies, _, seeds = shape
    return (draw.normal(size=shape) - draw.normal(size=(studies, 1, seeds))) / math.sqrt(2)


def skewed(draw: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Exponential: skewness 2."""
    return draw.exponential(size=shape) - 1


def heavy_tailed(draw: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Student t with 3 degrees of freedom, whose variance is 3."""
    return draw.standard_t(3, size=shape) / math.sqrt(3)


def skewed_runs(draw: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Runs, not differences, are skewed; the baseline is shared."""
    studies, _, seeds = shape
    return (draw.exponential(size=shape) - draw.exponential(size=(studies, 1, seeds))) / math.sqrt(2)


DIFFERENCES: dict[str, Draw] = {
    "normal": normal,
    "normal, shared baseline": shared_baseline,
    "skewed runs, shared baseline": skewed_runs,
    "heavy tails (t, 3 degrees of freedom)": heavy_tailed,
    "skewed (exponential)": skewed,
}


# --- figures -------------------------------------------------------------------------------------------


def measure(num_studies: int, seed: int = 0) -> Iterator[Figure]:
    """All figures, each of so many studies.

    Args:
        seed: of the draws; the figures follow from it and num_studies.
    """
    draw = np.random.default_rng(seed)
    for name in DIFFERENCES:
        yield from false_effects(draw, name, num_studies)
    for name in DIFFERENCES:
        yield from powers(draw, name, num_studies)
    for name in DIFFERENCES:
        yield from coverages(draw, name, num_studies)
    yield from false_absences(draw, num_studies)
    yield from true_absences(draw, num_studies)


def false_effects(draw: np.random.Generator, name: str, num_studies: int) -> Iterator[Figure]:
    """Studies without any true effect in which some arm helps or hurts."""
    for arms in NUM_ARMS:
        seeds = paired.num_seeds_needed(arms)
        found = paired.judge(DIFFERENCES[name](draw, (num_studies, arms, seeds)), 1e-9)
        shown = np.isin(found.verdict, (paired.HELPS, paired.HURTS)).any(axis=-1)
        flips = (found.sign_flip_holm_p <= paired.ALPHA).any(axis=-1)
        promised = (0.0, paired.ALPHA) if name == "normal" else (None, None)
        yield counted("any false effect: the verdict", name, arms, seeds, shown, promised, is_bound=True)
        yield counted("any false effect: sign flips", name, arms, seeds, flips)


def powers(draw: np.random.Generator, name: str, num_studies: int) -> Iterator[Figure]:
    """Arms that help truly, by the effect that the plan promises to show with 80 %; the others do nothing."""
    for arms in NUM_ARMS:
        seeds = paired.num_seeds_needed(arms)
        differences = DIFFERENCES[name](draw, (num_studies, arms, seeds))
        differences[:, 0] -= paired.effect_shown(1.0, seeds, arms)
        helps = paired.judge(differences, 1e-9).verdict[:, 0] == paired.HELPS
        promised = (0.78, 0.82) if name == "normal" else (None, None)
        yield counted("effect promised at 80 % helps", name, arms, seeds, helps, promised)


def coverages(draw: np.random.Generator, name: str, num_studies: int) -> Iterator[Figure]:
    """95 % intervals that hold the true difference."""
    for seeds in dict.fromkeys(map(paired.num_seeds_needed, NUM_ARMS)):
        summary = paired.judge(DIFFERENCES[name](draw, (num_studies, 1, seeds)), 1e-9).summary
        holds = (summary.low_95 <= 0) & (summary.high_95 >= 0)
        promised = (0.94, 0.96) if name == "normal" else (None, None)
        yield counted("95 % interval holds the truth", name, 1, seeds, holds[:, 0], promised)


def false_absences(draw: np.random.Generator, num_studies: int) -> Iterator[Figure]:
    """Arms whose true effect just matters, and of which the verdict says that it does not."""
    for bound in (0.5, 1.0, 3.0):
        seeds = paired.num_seeds_needed(1)
        found = paired.judge(normal(draw, (num_studies, 1, seeds)) + bound, bound)
        absent = found.verdict[:, 0] == paired.NO_EFFECT
        name = f"normal, effect = bound = {bound:g}"
        promised = (0.0, paired.EQUIVALENCE_ALPHA)
        yield counted("no_effect_that_matters, wrongly", name, 1, seeds, absent, promised, is_bound=True)
        either = absent | found.below_smallest_effect[:, 0]
        yield counted("that, or shown but too small", name, 1, seeds, either, promised, is_bound=True)


def true_absences(draw: np.random.Generator, num_studies: int) -> Iterator[Figure]:
    """Arms without an effect of which the verdict says so, against the chance that a plan states."""
    for arms, bound in ((1, 1.0), (1, 2.0), (4, 1.0)):
        seeds = paired.num_seeds_needed(arms)
        absent = paired.judge(normal(draw, (num_studies, arms, seeds)), bound).verdict == paired.NO_EFFECT
        chance = paired.no_effect_chance(1.0, seeds, bound, arms)
        name = f"normal, no effect, bound {bound:g}"
        promised = (chance - 0.02, chance + 0.02)
        yield counted("no_effect_that_matters, rightly", name, arms, seeds, absent[:, 0], promised)


def counted(
    question: str,
    differences: str,
    num_arms: int,
    num_seeds: int,
    hits: np.ndarray,
    promised: tuple[float | None, float | None] = (None, None),
    *,
    is_bound: bool = False,
) -> Figure:
    """The share of hits, with its binomial interval."""
    number = int(hits.sum())
    interval = stats.binomtest(number, len(hits)).proportion_ci(0.95)
    ends = float(interval.low), float(interval.high)
    return Figure(
        question, differences, num_arms, num_seeds, number / len(hits), *ends, *promised, is_bound=is_bound
    )


# --- the table -----------------------------------------------------------------------------------------


def format_figures(figures: list[Figure]) -> str:
    """A Markdown table with a row for each question and kind of differences."""
    lines = ["| | differences | arms x seeds: % (95 % interval) | promised |", "|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.question, figure.differences), []).append(figure)
    for (question, differences), group in groups.items():
        shares = "; ".join(
            f"{one.num_arms} x {one.num_seeds}: {100 * one.share:.1f} "
            f"({100 * one.low:.1f}, {100 * one.high:.1f}){' **missed**' if one.is_kept is False else ''}"
            for one in group
        )
        lines.append(f"| {question} | {differences} | {shares} | {_promise(group)} |")
    return "\n".join(lines)


def _promise(group: list[Figure]) -> str:
    told = []
    for one in group:
        if one.promised_low is None or one.promised_high is None:
            continue
        high = _percent(one.promised_high)
        told.append(f"at most {high}" if one.is_bound else f"{_percent(one.promised_low)} to {high}")
    return "; ".join(dict.fromkeys(told))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a promised figure is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=10_000, metavar="N", help="simulated studies per case")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    arguments = parser.parse_args(argv)
    if arguments.studies < 1:
        parser.error(f"--studies {arguments.studies} must be 1 or more")
    figures = list(measure(arguments.studies, arguments.seed))
    print(format_figures(figures))
    if arguments.json:
        rows = [dataclasses.asdict(figure) | {"is_kept": figure.is_kept} for figure in figures]
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    missed = [figure for figure in figures if figure.is_kept is False]
    for figure in missed:
        print(
            f"missed: {figure.question} ({figure.differences}, {figure.num_arms} arms, {figure.num_seeds} "
            f"seeds) is {_percent(figure.share)}",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
