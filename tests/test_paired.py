"""Statistics of paired differences: against scipy called one by one, hand-worked examples and simulation."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from raydisp import paired

NAN = math.nan


def gaps(seed: int = 3) -> np.ndarray:
    """[5, 3, 9] differences of all sizes, some of them missing."""
    draw = np.random.default_rng(seed)
    values = draw.normal(0.3, 1.0, (5, 3, 9)) * 10.0 ** draw.integers(-3, 3, (5, 3, 1))
    values[draw.random(values.shape) < 0.2] = NAN
    return values


# --- one arm -------------------------------------------------------------------------------------------


def test_the_t_test_is_scipys_on_what_is_there() -> None:
    values = gaps()
    found = paired.summarise(values)
    for place in np.ndindex(values.shape[:-1]):
        there = values[place][~np.isnan(values[place])]
        test = stats.ttest_1samp(there, 0.0)
        assert found.num_pairs[place] == len(there)
        assert found.mean[place] == pytest.approx(there.mean(), rel=1e-12)
        assert found.spread[place] == pytest.approx(there.std(ddof=1), rel=1e-12)
        assert found.p_value[place] == pytest.approx(test.pvalue, rel=1e-9)
        wide, narrow = test.confidence_interval(0.95), test.confidence_interval(0.90)
        assert (found.low_95[place], found.high_95[place]) == pytest.approx(tuple(wide), rel=1e-9)
        assert (found.low_90[place], found.high_90[place]) == pytest.approx(tuple(narrow), rel=1e-9)


def test_the_t_test_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, spread 1, t = 2 sqrt(3); t_0.975 with 2 degrees of freedom is 4.302653.
    found = paired.summarise([[1.0, 2.0, 3.0]])
    assert (found.mean[0], found.spread[0]) == (2.0, 1.0)
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.low_95[0], found.high_95[0]) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    # P(|T| > t) with 2 degrees of freedom is 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert found.p_value[0] == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-9)


def test_the_sign_flip_test_is_scipys_exact_one() -> None:
    values = gaps()
    found, exact = paired.sign_flip_p(values)
    assert exact.all()
    for place in np.ndindex(values.shape[:-1]):
        there = values[place][~np.isnan(values[place])]
        expected = stats.permutation_test(
            (there,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            vectorized=True,
        )
        assert found[place] == pytest.approx(expected.pvalue, rel=1e-12)


@pytest.mark.parametrize(
    ("differences", "hits", "number"),
    [
        ([1.0, 2.0, 3.0], 2, 8),  # only +++ and --- reach 6
        ([1.0, 2.0, -3.0], 8, 8),  # the sum is 0: every sign reaches it
        ([3.0, 2.0, -1.0], 4, 8),  # +++, ++- and their opposites reach 4
        ([0.1, 0.2, -0.3, 0.3], 12, 16),  # 0.1 + 0.2 and 0.3 are equal but for rounding
        ([-1.0] * 6, 2, 64),
    ],
)
def test_sign_flips_by_hand(differences: list[float], hits: int, number: int) -> None:
    signs = [[1 - 2 * (code >> place & 1) for place in range(len(differences))] for code in range(number)]
    sums = [abs(math.fsum(s * d for s, d in zip(each, differences, strict=True))) for each in signs]
    assert sum(x >= abs(math.fsum(differences)) - 1e-9 for x in sums) == hits
    found, _ = paired.sign_flip_p([differences])
    assert found[0] == hits / number


def test_many_pairs_are_flipped_at_random_and_repeatably() -> None:
    values = np.random.default_rng(2).normal(0.45, 1.0, (1, 17))
    p_value, exact = paired.sign_flip_p(values)
    assert not exact[0]
    assert paired.sign_flip_p(values)[0] == p_value
    signs = 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)
    true = (np.abs(signs @ values[0]) >= abs(values[0].sum()) - 1e-9).mean()
    assert 0.01 < true < 0.3, "the example must say something"
    error = math.sqrt(true * (1 - true) / paired.NUM_RANDOM_SIGNS)
    assert abs(p_value[0] - true) < 4 * error
    smallest, _ = paired.sign_flip_p(np.full((1, 40), -0.2))
    assert smallest[0] == 1 / (1 + paired.NUM_RANDOM_SIGNS), "never 0"


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # num_pairs, mean, spread, low_95, high_95, p
        ([NAN, NAN, NAN], (0, NAN, NAN, NAN, NAN, NAN)),
        ([NAN, 0.5, NAN], (1, 0.5, NAN, NAN, NAN, NAN)),
        ([0.1, 0.1, 0.1], (3, 0.1, 0.0, 0.1, 0.1, 0.0)),
        ([0.0, 0.0, 0.0], (3, 0.0, 0.0, 0.0, 0.0, 1.0)),
        ([5.1 - 5.0, 4.1 - 4.0, 3.1 - 3.0], (3, 0.1, 0.0, 0.1, 0.1, 0.0)),  # equal but for rounding
        ([math.inf, 0.5, NAN], (1, 0.5, NAN, NAN, NAN, NAN)),
    ],
)
def test_degenerate_cases(differences: list[float], expected: tuple[float, ...]) -> None:
    found = paired.summarise([differences])
    numbers = (found.num_pairs, found.mean, found.spread, found.low_95, found.high_95, found.p_value)
    assert [float(number[0]) for number in numbers] == pytest.approx(list(expected), nan_ok=True)
    flips, _ = paired.sign_flip_p([differences])
    assert math.isnan(flips[0]) == (expected[0] < 2)


def test_no_study_and_no_arm_are_no_error() -> None:
    found = paired.judge(np.zeros((0, 2, 5)), 0.1)
    assert found.verdict.shape == (0, 2)
    assert paired.judge(np.zeros((3, 2, 0)), 0.1).verdict.tolist() == [["inconclusive"] * 2] * 3


# --- a family of arms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01; 2 x 0.03; 1 x 0.04, but not below 0.06
        ([0.5, 0.5], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.9, 0.001, 0.02, 0.02], [0.9, 0.004, 0.06, 0.06]),
        ([NAN, 0.02], [NAN, 0.04]),  # an arm without a p-value is still of the family
    ],
)
def test_holm_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert paired.holm(p_values).tolist() == pytest.approx(adjusted, nan_ok=True)


def test_holm_rejects_what_the_step_down_rejects() -> None:
    draw = np.random.default_rng(1)
    p_values = draw.random((200, 4)) ** 3
    adjusted = paired.holm(p_values)
    for p, each in zip(p_values, adjusted, strict=True):
        rejected = set()
        for step, arm in enumerate(np.argsort(p)):
            if p[arm] > 0.05 / (4 - step):
                break
            rejected.add(arm)
        assert set(np.flatnonzero(each <= 0.05)) == rejected


def test_the_fewest_seeds_that_can_show_anything() -> None:
    assert [paired.num_seeds_needed(number) for number in (1, 2, 3, 4)] == [6, 7, 7, 8]
    for arms in (1, 2, 3, 4):
        needed = paired.num_seeds_needed(arms)
        for number, reaches in ((needed, True), (needed - 1, False)):
            values = np.full((arms, number), -1.0)
            assert (paired.holm(paired.sign_flip_p(values)[0]) <= 0.05).all() == reaches


# --- the verdict ---------------------------------------------------------------------------------------

NOISE = np.array([0.01, -0.01, 0.02, -0.02, 0.005, -0.005])
"""Mean 0, spread 0.0145; the 90 % interval is +-0.0119."""


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        (NOISE - 0.1, "helps"),
        (NOISE + 0.1, "hurts"),
        (NOISE, "no_effect_that_matters"),
        (NOISE * 3, "inconclusive"),
        (NOISE * 3 + 0.03, "inconclusive"),
        (np.full(6, NAN), "inconclusive"),
        (np.array([-5.0, NAN, NAN, NAN, NAN, NAN]), "inconclusive"),
        (np.full(6, 0.0), "no_effect_that_matters"),
        (np.full(6, -0.5), "helps"),
    ],
)
def test_each_verdict(differences: np.ndarray, verdict: str) -> None:
    found = paired.judge(differences[None], 0.02)
    assert found.verdict.tolist() == [verdict]
    assert not found.below_smallest_effect[0]
    assert not found.barred[0]


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "helps"), (1, "hurts")])
def test_an_effect_that_is_shown_comes_before_no_effect_that_matters(sign: int, verdict: str) -> None:
    found = paired.judge([sign * (NOISE / 10 + 0.01)], 0.02)
    assert found.verdict.tolist() == [verdict]
    assert found.below_smallest_effect.tolist() == [True]
    assert found.summary.high_90[0] < 0.02


def test_the_interval_must_lie_wholly_inside() -> None:
    end = paired.summarise([NOISE]).high_90[0]
    assert paired.judge([NOISE], end * 1.0001).verdict[0] == "no_effect_that_matters"
    assert paired.judge([NOISE], end * 0.9999).verdict[0] == "inconclusive"
    shifted = NOISE - 0.001  # only the lower end is outside
    assert paired.judge([shifted], end * 1.0001).verdict[0] == "inconclusive"


def test_the_family_decides_together() -> None:
    clear, close = NOISE - 0.1, NOISE - 0.016
    p_value = float(stats.ttest_1samp(close, 0.0).pvalue)
    assert 0.025 < p_value < 0.05, "the example must lie between the levels"
    assert paired.judge([close], 0.001).verdict.tolist() == ["helps"]
    assert paired.judge([close, NOISE], 0.001).verdict.tolist() == ["inconclusive", "inconclusive"]
    found = paired.judge([close, clear], 0.001)
    assert found.verdict.tolist() == ["helps", "helps"], "the second step tests at 5 %"
    assert found.holm_p[0] == pytest.approx(p_value)
    assert paired.judge([close], 0.001, alpha=p_value * 0.99).verdict.tolist() == ["inconclusive"]


def test_an_arm_that_diverged_can_only_hurt() -> None:
    values = [NOISE - 0.1, NOISE - 0.1, NOISE + 0.1, NOISE]
    found = paired.judge(values, 0.02, may_help=[False, True, False, False])
    assert found.verdict.tolist() == ["inconclusive", "helps", "hurts", "inconclusive"]
    assert found.barred.tolist() == [True, False, False, True]


def test_tests_that_disagree_are_flagged() -> None:
    one_sided = np.array([-0.1, -0.11, -0.09, -0.1])  # the t test is sure; 4 pairs cannot flip below 0.125
    found = paired.judge([one_sided], 0.02)
    assert (found.verdict[0], found.sign_flip_p[0]) == ("helps", 0.125)
    assert found.tests_disagree.tolist() == [True]
    outlier = np.array([-0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -4.0])  # the reverse: all of one sign
    found = paired.judge([outlier], 0.02)
    assert (found.verdict[0], found.sign_flip_p[0]) == ("inconclusive", 2 / 128)
    assert found.tests_disagree.tolist() == [True]
    assert not paired.judge([NOISE], 0.02).tests_disagree[0]


def test_many_studies_at_once_are_each_judged_alone() -> None:
    values = gaps()
    together = paired.judge(values, 0.5)
    for place, study in enumerate(values):
        alone = paired.judge(study, 0.5)
        assert together.verdict[place].tolist() == alone.verdict.tolist()
        np.testing.assert_array_equal(together.holm_p[place], alone.holm_p)
        np.testing.assert_array_equal(together.sign_flip_holm_p[place], alone.sign_flip_holm_p)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"differences": [0.1, 0.2]}, "not of shape"),
        ({"smallest_effect": 0.0}, "smallest_effect = 0.0 must be a number above 0"),
        ({"smallest_effect": NAN}, "smallest_effect = nan"),
        ({"alpha": 1.0}, "alpha = 1.0 must lie between 0 and 1"),
    ],
)
def test_bad_arguments_of_the_verdict(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired.judge(**{"differences": [[0.1, 0.2]], "smallest_effect": 0.1} | change)


# --- before the runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_seeds", "num_arms"), [(6, 1), (7, 3), (20, 2)])
def test_power_against_simulation(num_seeds: int, num_arms: int) -> None:
    spread = 0.03
    effect = paired.effect_shown(spread, num_seeds, num_arms)
    assert float(paired.power(effect, spread, num_seeds, num_arms)) == pytest.approx(0.8, abs=1e-6)
    draws = np.random.default_rng(num_seeds).normal(-effect, spread, (40_000, num_seeds))
    test = stats.ttest_1samp(draws, 0.0, axis=-1)
    shown = (test.pvalue <= 0.05 / num_arms) & (test.statistic < 0)
    assert shown.mean() == pytest.approx(0.8, abs=0.008)  # four standard errors


def test_power_has_the_shape_of_the_effects_and_known_ends() -> None:
    found = paired.power([0.0, 0.01, -0.01, 1e9], 0.01, 6, 2)
    assert found.shape == (4,)
    assert found[0] == pytest.approx(0.05 / 2 / 2), "the right sign alone counts"
    assert found[1] == found[2]
    assert found[3] == pytest.approx(1.0)
    assert paired.power([0.0, 0.1], 0.0, 6).tolist() == [0.0, 1.0]
    assert paired.effect_shown(0.0, 6) == 0.0


def test_the_effect_shown_grows_with_what_it_should() -> None:
    usual = paired.effect_shown(0.02, 6)
    assert paired.effect_shown(0.04, 6) == pytest.approx(2 * usual)
    assert paired.effect_shown(0.02, 12) < usual < paired.effect_shown(0.02, 6, 4)
    assert usual < paired.effect_shown(0.02, 6, target=0.9)


@pytest.mark.parametrize(
    ("num_seeds", "num_arms", "bound"),
    [(6, 1, 0.01), (6, 1, 0.02), (7, 3, 0.025), (12, 2, 0.01), (2, 1, 1.0)],
)
def test_the_chance_of_no_effect_against_simulation(num_seeds: int, num_arms: int, bound: float) -> None:
    spread = 0.02
    chance = paired.no_effect_chance(spread, num_seeds, bound, num_arms)
    draws = np.random.default_rng(num_seeds).normal(0.0, spread, (40_000, num_arms, num_seeds))
    found = paired.judge(draws, bound).verdict[:, 0] == paired.NO_EFFECT
    error = math.sqrt(chance * (1 - chance) / len(found))
    assert 0.01 < chance < 0.99
    assert abs(found.mean() - chance) < 4 * error + 0.05**2 * (num_arms > 1)


def test_the_chance_of_no_effect_at_its_ends() -> None:
    assert paired.no_effect_chance(0.0, 6, 0.01) == 1.0
    assert paired.no_effect_chance(1.0, 6, 1e-6) < 1e-6
    assert paired.no_effect_chance(1e-9, 6, 0.01) == pytest.approx(0.95), "the rest are effects by chance"
    assert paired.no_effect_chance(1e-9, 6, 0.01, num_arms=2) == pytest.approx(0.975)


def test_a_promise_holds_the_three_figures() -> None:
    found = paired.promise(0.02, 7, 2, 0.03)
    assert (found.spread, found.num_seeds, found.num_arms, found.smallest_effect) == (0.02, 7, 2, 0.03)
    assert found.power == float(paired.power(0.03, 0.02, 7, 2))
    assert found.effect_shown == paired.effect_shown(0.02, 7, 2)
    assert found.no_effect_chance == paired.no_effect_chance(0.02, 7, 0.03, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-0.1, 6, 1, 0.01), "spread = -0.1 must be a number of 0 or more"),
        ((NAN, 6, 1, 0.01), "spread = nan"),
        ((0.1, 1, 1, 0.01), "num_seeds = 1 must be 2 or more"),
        ((0.1, 6, 0, 0.01), "num_arms = 0 must be 1 or more"),
        ((0.1, 6, 1, 0.0), "smallest_effect = 0.0 must be a number above 0"),
        ((0.1, 6, 1, 0.01, 0.0), "alpha = 0.0 must lie between"),
    ],
)
def test_bad_plans(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired.promise(*arguments)


def test_seeds_for_no_arm_and_for_no_risk() -> None:
    with pytest.raises(ValueError, match="num_arms = 0 must be 1 or more"):
        paired.num_seeds_needed(0)
    with pytest.raises(ValueError, match="alpha = 0 must lie between"):
        paired.num_seeds_needed(1, alpha=0)


def test_a_target_that_no_effect_can_have() -> None:
    with pytest.raises(ValueError, match=r"target = 1\.0 must lie between"):
        paired.effect_shown(0.1, 6, target=1.0)


# --- the benchmark -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/verdicts.py as a module."""
    place = Path(__file__).parents[1] / "benchmarks" / "verdicts.py"
    spec = importlib.util.spec_from_file_location("verdicts_benchmark", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_promises_are_kept_in_simulated_studies(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert benchmark.main(["--studies", "4000", "--seed", "1", "--json", str(file)]) == 0
    assert "missed" not in capsys.readouterr().out
    figures = json.loads(file.read_text())
    promised = [figure for figure in figures if figure["is_kept"] is not None]
    assert len(promised) == 4 + 4 + 3 + 6 + 3
    assert all(figure["is_kept"] for figure in promised)
    normal = [figure["share"] for figure in figures if figure["question"] == "any false effect: the verdict"]
    assert 0.03 < max(normal[:4]) < 0.07, "something is shown now and then"


def test_a_verdict_that_errs_is_found_out(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paired, "holm", lambda p_values: np.asarray(p_values))  # no adjustment
    assert benchmark.main(["--studies", "2000"]) == 1
    out, err = capsys.readouterr()
    assert "**missed**" in out
    assert "missed: any false effect: the verdict (normal, 4 arms, 8 seeds) is 1" in err
