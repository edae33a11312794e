r"""Statistics of paired differences: arm minus baseline at the same seed, where lower is better.

Arrays are [..., m, n]: m arms that are compared with one baseline, n seeds, any number of studies before. A
seed without a difference (either run of the pair is incomplete) is NaN and dropped from that arm alone.

The test of an arm is the paired Student t test, two-sided; its interval is the t interval. The exact
sign-flip test stands beside it: it supposes only that a difference is as likely to have the one sign as the
other. Over the arms both are adjusted by Holm's procedure.

Where a statistic does not exist it is NaN, which tables write as null:

    fewer than 2 pairs      no spread, no interval, no p-value; without a pair no mean either
    all differences equal   spread 0, the interval is the point; p is 1 where they are 0, else 0. Differences
                            that agree to within 1e-12 of their size are equal: the rest is rounding

Sources: Student 1908; Fisher 1935 (sign flips); Holm 1979, doi.org/10.2307/4615733; Schuirmann 1987,
doi.org/10.1007/BF01068419 (equivalence by two one-sided tests).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# scipy is imported where it is needed: importing its statistics takes most of a second.

ALPHA = 0.05
"""Level at which an effect is shown, over all arms of a study together."""
EQUIVALENCE_ALPHA = 0.05
"""Level of each of the two one-sided tests for no effect that matters: the 90 % interval."""
PROMISED_POWER = 0.8
MAX_EXACT_PAIRS = 16
"""Up to so many pairs the sign-flip test tries all 2^n signs; beyond, NUM_RANDOM_SIGNS random ones."""
NUM_RANDOM_SIGNS = 99_999
SIGNS_SEED = 0

HELPS, HURTS = "helps", "hurts"
NO_EFFECT, INCONCLUSIVE = "no_effect_that_matters", "inconclusive"
VERDICTS = (HELPS, HURTS, NO_EFFECT, INCONCLUSIVE)

_EQUAL = 1e-12
_CHUNK = 1 << 22  # numbers that are held at once
_SIGNS_AT_A_TIME = 4096

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


# --- one arm -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """Paired differences of each arm in numbers; arrays [..., m], in the unit of the differences."""

    num_pairs: NDArray[np.int64]
    mean: Floats
    spread: Floats
    """Standard deviation over the seeds (n - 1 in the denominator)."""
    low_95: Floats
    high_95: Floats
    low_90: Floats
    high_90: Floats
    p_value: Floats
    """Of the two-sided t test, not adjusted for the number of arms."""


def summarise(differences: ArrayLike) -> Summary:
    """Mean, spread, t intervals and t test of paired differences.

    Args:
        differences: [..., m, n]; NaN where a pair is incomplete.
    """
    values = np.asarray(differences, dtype=np.float64)
    columns = _by_count(values, _t_statistics, 7)
    return Summary(np.isfinite(values).sum(axis=-1), *columns)


def sign_flip_p(differences: ArrayLike) -> tuple[Floats, Bools]:
    """Two-sided p-value of the sign-flip test of the mean, and whether it is exact.

    Up to MAX_EXACT_PAIRS pairs all 2^n signs are tried, and the p-value is exact (that of
    `scipy.stats.permutation_test` with `permutation_type="samples"`). Beyond, it is (1 + number of hits) /
    (1 + NUM_RANDOM_SIGNS) over random signs from a fixed seed: near 0.05 within about 0.002 of
    the exact one.

    Args:
        differences: [..., m, n]; NaN where a pair is incomplete.
    Returns:
        Two arrays [..., m]; p is NaN with fewer than 2 pairs.
    """
    values = np.asarray(differences, dtype=np.float64)
    (p_values,) = _by_count(values, _sign_flips, 1)
    return p_values, np.isfinite(values).sum(axis=-1) <= MAX_EXACT_PAIRS


def _by_count(values: Floats, statistics: Callable[[Floats], Floats], number: int) -> list[Floats]:
    """Apply a function of [k, n] without gaps to all rows; those with as many pairs go together.

    Args:
        statistics: [k, n] -> [k, number], n >= 1.
    Returns:
        `number` arrays of the shape of `values` without its last axis, NaN where there is no pair.
    """
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    there = np.isfinite(rows)
    rows = np.take_along_axis(rows, np.argsort(~there, axis=-1, kind="stable"), axis=-1)
    counts = there.sum(axis=-1)
    found = np.full((len(rows), number), np.nan)
    for count in np.unique(counts[counts > 0]):
        chosen = counts == count
        found[chosen] = statistics(rows[chosen, :count])
    return [found[:, place].reshape(values.shape[:-1]) for place in range(number)]


def _t_statistics(rows: Floats) -> Floats:
    """[k, n] -> [k, 7]: the fields of `Summary` after `num_pairs`."""
    from scipy import stats

    found = np.full((len(rows), 7), np.nan)
    mean = rows.mean(axis=-1)
    found[:, 0] = mean
    if rows.shape[-1] < 2:
        return found
    equal = np.ptp(rows, axis=-1) <= _EQUAL * np.abs(rows).max(axis=-1)
    found[equal, 1] = 0.0
    found[equal, 2:6] = mean[equal, None]
    found[equal, 6] = mean[equal] == 0
    varied = rows[~equal]
    if len(varied):
        test = stats.ttest_1samp(varied, 0.0, axis=-1)
        wide = test.confidence_interval(1 - ALPHA)
        narrow = test.confidence_interval(1 - 2 * EQUIVALENCE_ALPHA)
        spread = varied.std(axis=-1, ddof=1)
        columns = [spread, wide.low, wide.high, narrow.low, narrow.high, test.pvalue]
        found[~equal, 1:] = np.stack(columns, axis=-1)
    return found


def _sign_flips(rows: Floats) -> Floats:
    """[k, n] -> [k, 1]."""
    number = rows.shape[-1]
    if number < 2:
        return np.full((len(rows), 1), np.nan)
    # Sums that are equal in truth differ by rounding, which is relative to what was added.
    observed = np.abs(rows.sum(axis=-1)) - _EQUAL * np.abs(rows).sum(axis=-1)
    hits, tried = np.zeros(len(rows)), 0
    for signs in _sign_blocks(number):
        tried += len(signs)
        step = max(1, _CHUNK // len(signs))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            sums = np.abs(rows[part] @ signs.T)
            hits[part] += (sums >= observed[part, None]).sum(axis=-1)
    extra = int(number > MAX_EXACT_PAIRS)
    return ((hits + extra) / (tried + extra))[:, None]


def _sign_blocks(number: int) -> Iterator[Floats]:
    """[k, number] of signs: all that there are up to a factor of -1, or random ones from a fixed seed."""
    if number <= MAX_EXACT_PAIRS:
        # A sign vector and its opposite give the same |sum|: half of them are enough.
        yield np.array([(1.0, *half) for half in itertools.product((1.0, -1.0), repeat=number - 1)])
        return
    draw = np.random.default_rng(SIGNS_SEED)
    for start in range(0, NUM_RANDOM_SIGNS, _SIGNS_AT_A_TIME):
        size = min(_SIGNS_AT_A_TIME, NUM_RANDOM_SIGNS - start)
        yield draw.choice((1.0, -1.0), size=(size, number))


# --- a family of arms ----------------------------------------------------------------------------------


def holm(p_values: ArrayLike) -> Floats:
    """P-values adjusted over the last axis by Holm's step-down procedure; scipy has none.

    An effect is shown where the adjusted value is at most alpha; the chance of any false one is then at most
    alpha, whatever the dependence between the arms. NaN stays NaN and counts as a member of the family: an
    arm that was planned and gave no p-value makes the others' no smaller.

    Source: Holm 1979.
    """
    values = np.asarray(p_values, dtype=np.float64)
    number = values.shape[-1]
    order = np.argsort(values, axis=-1)  # NaN comes last
    scaled = np.take_along_axis(values, order, axis=-1) * (number - np.arange(number))
    adjusted = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    found = np.empty_like(values)
    np.put_along_axis(found, order, adjusted, axis=-1)
    return found


def num_seeds_needed(num_arms: int, alpha: float = ALPHA) -> int:
    """The fewest pairs with which the exact sign-flip test can show an effect at all among so many arms.

    Its smallest p-value is 2 / 2^n, times the number of arms by Holm: 6, 7, 7, 8 for 1 to 4 arms at 5 %.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_alpha(alpha)
    if num_arms < 1:
        raise ValueError(f"num_arms = {num_arms} must be 1 or more")
    return next(number for number in itertools.count(1) if 2 * num_arms <= alpha * 2**number)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What `judge` found; arrays [..., m]."""

    verdict: NDArray[np.str_]
    """One of VERDICTS."""
    summary: Summary
    holm_p: Floats
    """The t test's p-value, adjusted over the arms."""
    sign_flip_p: Floats
    """Not adjusted."""
    sign_flip_holm_p: Floats
    sign_flip_exact: Bools
    """Whether all signs were tried."""
    tests_disagree: Bools
    """Only one of the two tests, both adjusted, shows an effect."""
    below_smallest_effect: Bools
    """An effect is shown (helps or hurts), but it is less than what would matter."""
    barred: Bools
    """Would have been `helps`, had the arm been allowed to be: it is inconclusive instead."""


def judge(
    differences: ArrayLike,
    smallest_effect: float,
    alpha: float = ALPHA,
    may_help: ArrayLike | None = None,
) -> Judgement:
    """The verdict on each arm of a study, or of many at once.

    - helps, hurts: the Holm-adjusted p-value of the t test is at most alpha; the sign of the mean says which.
    - no_effect_that_matters: otherwise, and the 90 % interval lies wholly inside +-smallest_effect. This is
      each arm's own 5 % risk: it is not adjusted over the arms. Nor has it an arm that may not help.
    - inconclusive: otherwise. Neither an effect nor its absence has been shown.

    Args:
        differences: [..., m, n], arm minus baseline, lower is better; NaN where a pair is incomplete.
        smallest_effect: > 0, the smallest difference that would matter, in the unit of the differences.
        alpha: in (0, 1), for helps and hurts. Intervals are 95 % and 90 % whatever it is.
        may_help: [m] or [..., m]; False for an arm that cannot help whatever its differences say, because
            a run of it diverged: what is left of it are the runs that went well. None: all may.
    Raises:
        ValueError: an argument is out of range.
    Source: Holm 1979; Schuirmann 1987.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim < 2:
        raise ValueError(f"differences must be [..., arms, seeds], not of shape {values.shape}")
    if not (smallest_effect > 0 and math.isfinite(smallest_effect)):
        raise ValueError(f"smallest_effect = {smallest_effect} must be a number above 0")
    _check_alpha(alpha)
    summary = summarise(values)
    holm_p = holm(summary.p_value)
    flip_p, exact = sign_flip_p(values)
    flip_holm_p = holm(flip_p)
    shown = holm_p <= alpha  # False for NaN
    inside = (summary.low_90 > -smallest_effect) & (summary.high_90 < smallest_effect)
    allowed = np.broadcast_to(np.asarray(True if may_help is None else may_help), shown.shape)
    lower = shown & (summary.mean < 0)
    verdict = np.select(
        [lower & allowed, lower, shown, inside & allowed],
        [HELPS, INCONCLUSIVE, HURTS, NO_EFFECT],
        default=INCONCLUSIVE,
    )
    return Judgement(
        verdict=verdict,
        summary=summary,
        holm_p=holm_p,
        sign_flip_p=flip_p,
        sign_flip_holm_p=flip_holm_p,
        sign_flip_exact=exact,
        tests_disagree=shown != (flip_holm_p <= alpha),
        below_smallest_effect=shown & inside & ~(lower & ~allowed),
        barred=~allowed & (lower | (inside & ~shown)),
    )


# --- before the runs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a plan can show, from a spread that is known before its runs; never computed from their own."""

    spread: float
    """Standard deviation over seeds of the paired difference."""
    num_seeds: int
    num_arms: int
    smallest_effect: float
    power: float
    """Chance to show a true effect as large as smallest_effect, with its sign."""
    effect_shown: float
    """The effect that is shown with a chance of PROMISED_POWER."""
    no_effect_chance: float
    """Chance of the verdict `no_effect_that_matters` where there is truly no effect."""


def promise(
    spread: float, num_seeds: int, num_arms: int, smallest_effect: float, alpha: float = ALPHA
) -> Promise:
    """What a plan of so many seeds and arms can show; see the functions below."""
    return Promise(
        spread=spread,
        num_seeds=num_seeds,
        num_arms=num_arms,
        smallest_effect=smallest_effect,
        power=float(power(smallest_effect, spread, num_seeds, num_arms, alpha)),
        effect_shown=effect_shown(spread, num_seeds, num_arms, alpha),
        no_effect_chance=no_effect_chance(spread, num_seeds, smallest_effect, num_arms, alpha),
    )


def power(
    effect: ArrayLike, spread: float, num_seeds: int, num_arms: int = 1, alpha: float = ALPHA
) -> Floats:
    """Chance that a true effect is shown, and with its sign, by the t test at level alpha / num_arms.

    That is the level of Holm's first step; where other arms have effects too, the chance is greater.

    Args:
        effect: true mean of the paired differences, any shape; its sign does not matter.
        spread: >= 0, standard deviation over seeds of the paired difference, in the effect's unit.
        num_seeds: >= 2.
    Raises:
        ValueError: an argument is out of range.
    Source: the noncentral t distribution with noncentrality |effect| sqrt(n) / spread.
    """
    from scipy import stats

    _check_plan(spread, num_seeds, num_arms, alpha)
    size = np.abs(np.asarray(effect, dtype=np.float64))
    if spread == 0:
        return np.where(size > 0, 1.0, 0.0)
    critical = stats.t.isf(alpha / num_arms / 2, num_seeds - 1)
    noncentrality = np.minimum(size * math.sqrt(num_seeds) / spread, 1e8)  # far beyond, scipy's is NaN
    found = stats.nct.sf(critical, num_seeds - 1, noncentrality)
    return np.asarray(found, dtype=np.float64)


def effect_shown(
    spread: float,
    num_seeds: int,
    num_arms: int = 1,
    alpha: float = ALPHA,
    *,
    target: float = PROMISED_POWER,
) -> float:
    """The true effect that is shown with a chance of `target`, in the unit of the spread; see `power`.

    Raises:
        ValueError: an argument is out of range.
    """
    from scipy import optimize

    _check_plan(spread, num_seeds, num_arms, alpha)
    if not alpha < target < 1:
        raise ValueError(f"target = {target} must lie between alpha = {alpha} and 1")
    if spread == 0:
        return 0.0

    def missing(effect: float) -> float:
        return float(power(effect, 1.0, num_seeds, num_arms, alpha)) - target

    most = 1.0
    while missing(most) < 0:
        most *= 2
    return spread * float(optimize.brentq(missing, 0.0, most, xtol=1e-12))


def no_effect_chance(
    spread: float, num_seeds: int, smallest_effect: float, num_arms: int = 1, alpha: float = ALPHA
) -> float:
    r"""Chance of the verdict `no_effect_that_matters` where the true effect is 0: exact, not simulated.

    Given the standard deviation s of a sample, its mean must lie within
    min(b - t_90 s / sqrt(n), t_alpha s / sqrt(n)): inside the bound b, and not shown to be an effect at level
    alpha / num_arms. The mean is normal and independent of s^2 (n - 1) / spread^2, which is chi-square with
    n - 1 degrees of freedom: the integral over it is the chance. With several arms Holm's later steps are
    left out, which changes it by less than alpha^2.

    Args:
        spread: >= 0, standard deviation over seeds of the paired difference.
        num_seeds: >= 2.
        smallest_effect: > 0, in the unit of the spread.
    Raises:
        ValueError: an argument is out of range.
    """
    from scipy import integrate, stats

    _check_plan(spread, num_seeds, num_arms, alpha)
    if not smallest_effect > 0:
        raise ValueError(f"smallest_effect = {smallest_effect} must be a number above 0")
    if spread == 0:
        return 1.0
    freedom = num_seeds - 1
    inner = stats.t.isf(EQUIVALENCE_ALPHA, freedom)
    outer = stats.t.isf(alpha / num_arms / 2, freedom)
    bound = smallest_effect * math.sqrt(num_seeds) / spread  # in standard errors of the mean

    def density(ratio: float) -> float:
        """Of s / spread = `ratio`, times the chance of a mean within the limits given it."""
        limit = min(bound - inner * ratio, outer * ratio)
        within = 2 * stats.norm.cdf(limit) - 1
        return float(within * stats.chi.pdf(ratio * math.sqrt(freedom), freedom) * math.sqrt(freedom))

    # The integrand has a kink where the limits cross, and ends where the interval is wider than the bound.
    last = stats.chi.isf(1e-14, freedom) / math.sqrt(freedom)
    kink, end = min(bound / (inner + outer), last), min(bound / inner, last)
    pieces = [integrate.quad(density, low, high)[0] for low, high in ((0.0, kink), (kink, end)) if low < high]
    return float(min(1.0, sum(pieces)))


def _check_plan(spread: float, num_seeds: int, num_arms: int, alpha: float) -> None:
    _check_alpha(alpha)
    rules: list[tuple[bool, str, Any, str]] = [
        (spread >= 0 and math.isfinite(spread), "spread", spread, "a number of 0 or more"),
        (num_seeds >= 2, "num_seeds", num_seeds, "2 or more: one pair has no spread"),
        (num_arms >= 1, "num_arms", num_arms, "1 or more"),
    ]
    for holds, name, value, rule in rules:
        if not holds:
            raise ValueError(f"{name} = {value} must be {rule}")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} must lie between 0 and 1")
