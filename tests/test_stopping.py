"""Who is stopped, by loops that say it again in plain words."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from raydisp.config import StudyConfig
from raydisp.search.stopping import StopRule, brackets, expected_frac, full_tokens

FULL = 8192


@pytest.fixture
def make(tree: dict[str, Any]) -> Any:
    """A study of 64 steps of 128 tokens, evaluated every 256, with a scheduler."""

    def build(scheduler: Any, **search: Any) -> StudyConfig:
        tree["train"]["budget_tokens"] = FULL
        tree["evaluate"]["every_tokens"] = 256
        tree["search"].update(scheduler=scheduler, num_trials=200, **search)
        return StudyConfig.model_validate(tree)

    return build


def curve_of(trial: int, full: int = FULL) -> list[tuple[int, float]]:
    """Values that fall, and cross each other now and then."""
    draw = random.Random(trial)
    level = draw.random()
    return [(tokens, level + draw.gauss(0, 0.1) + 1 / tokens) for tokens in range(256, full, 256)]


def run_trial(rule: StopRule, trial: int, sign: float = 1.0) -> int:
    """Tokens at which a trial ends."""
    for tokens, value in curve_of(trial):
        if rule.report(trial, tokens, sign * value):
            rule.close(trial, "pruned")
            return tokens
    rule.close(trial, "completed")
    return FULL


def halving_by_hand(num_trials: int, rungs: list[int], factor: int) -> list[int]:
    """Trials one after the other: at a rung the best 1 / factor of the values seen there so far go on, at
    least one."""
    seen: dict[int, list[float]] = {tokens: [] for tokens in rungs}
    ends = []
    for trial in range(1, num_trials + 1):
        end = FULL
        for tokens, value in curve_of(trial):
            if tokens in seen:
                seen[tokens].append(value)
                going_on = sorted(seen[tokens])[: max(1, len(seen[tokens]) // factor)]
                if value > going_on[-1]:
                    end = tokens
                    break
        ends.append(end)
    return ends


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("grace", "factor"), [(512, 2), (512, 3), (1024, 4)])
def test_asha_lets_the_best_of_a_rung_go_on(make: Any, mode: str, grace: int, factor: int) -> None:
    settings = {"grace_tokens": grace, "reduction_factor": factor}
    study = make({"asha": settings}, objective={"metric": "val_loss", "mode": mode})
    rule = StopRule(study)
    sign = 1.0 if mode == "min" else -1.0
    ends = [run_trial(rule, trial, sign) for trial in range(1, 101)]
    assert ends == halving_by_hand(100, brackets(study)[0], factor)
    assert len(set(ends)) == len(brackets(study)[0]) + 1, "some end at each rung, some at the end"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("none", []),
        ({"asha": {"grace_tokens": 512}}, [[512, 1536, 4608]]),
        ({"asha": {"grace_tokens": 4096, "reduction_factor": 2}}, [[4096]]),
        ({"hyperband": {"grace_tokens": 512, "reduction_factor": 4}}, [[512, 2048], [2048], []]),
        ({"median": {"grace_tokens": 7424}}, [[7424, 7680, 7936]]),
    ],
    ids=str,
)
def test_rungs_are_in_tokens_and_below_the_budget(make: Any, scheduler: Any, expected: Any) -> None:
    assert brackets(make(scheduler)) == expected


def test_an_open_trial_that_was_stopped_is_told_so_again(make: Any) -> None:
    """The driver died after its rule had said stop and before the trial's row said so."""
    rule = StopRule(make({"asha": {"grace_tokens": 512, "reduction_factor": 2}}))
    rule.replay(1, [(512, 1.0)], "completed")
    rule.replay(2, [(512, 9.0)], "interrupted")
    assert rule.report(2, 512, 9.0)
    # One that has values past a rung went on there, whatever its neighbours' values say now.
    rule.replay(3, [(512, 9.0), (768, 9.0)], "interrupted")
    assert not rule.report(3, 512, 9.0)


def test_an_answer_is_given_again(make: Any) -> None:
    """A trial that goes on from a checkpoint evaluates again what an earlier attempt reported."""
    rule = StopRule(make({"asha": {"grace_tokens": 512}}))
    assert not rule.report(1, 512, 1.0)
    assert not rule.report(2, 256, 2.0)
    assert rule.report(2, 512, 2.0)
    for value in (2.0, 0.1):
        assert not rule.report(1, 512, value + 5)
        assert not rule.report(2, 256, value)
        assert rule.report(2, 512, value)
    # The second values were not taken: 1.5 is worse than 1.0 and would be better than 5.1.
    assert rule.report(3, 512, 1.5)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheduler", [{"asha": {"grace_tokens": 512}}, {"median": {"grace_tokens": 256}}])
def test_what_is_no_number_decides_nothing(make: Any, scheduler: Any, value: float | None) -> None:
    rule = StopRule(make(scheduler))
    for trial in range(1, 6):
        run_trial(rule, trial)
    assert not any(rule.report(9, tokens, value) for tokens in range(256, FULL, 256))
    rule.close(9, "completed")
    untouched = StopRule(make(scheduler))
    for trial in range(1, 6):
        run_trial(untouched, trial)
    assert [run_trial(rule, trial) for trial in range(20, 50)] == [
        run_trial(untouched, trial) for trial in range(20, 50)
    ], "nor does it count for others"


def test_a_rung_that_was_missed_is_not_made_up_for_later(make: Any) -> None:
    """A value at more tokens does not compare with those of the rung."""
    rule = StopRule(make({"asha": {"grace_tokens": 512}}))
    rule.report(1, 512, math.nan)
    assert not any(rule.report(1, tokens, 0.01) for tokens in range(768, FULL, 256))
    rule.close(1, "completed")
    assert not rule.report(2, 512, 1.0), "the first at its rung"
    assert rule.report(3, 512, 1.1)


def test_hyperband_has_all_brackets_in_their_shares(make: Any) -> None:
    study = make({"hyperband": {"grace_tokens": 512, "reduction_factor": 4}})
    rule = StopRule(study)
    weights = [math.ceil(3 * 4 ** (2 - index) / (3 - index)) for index in range(3)]
    assert weights == [16, 6, 3], "the earliest bracket gets most"
    found = [rule.bracket(trial) for trial in range(1, 3001)]
    for index, weight in enumerate(weights):
        # three standard deviations of a share of 3,000
        assert found.count(index) / 3000 == pytest.approx(weight / 25, abs=0.03)
    assert found == [StopRule(study).bracket(trial) for trial in range(1, 3001)]
    ends = {trial: run_trial(rule, trial) for trial in range(1, 151)}
    for trial, end in ends.items():
        assert end in [*brackets(study)[rule.bracket(trial)], FULL]
    for index, rungs in enumerate(brackets(study)):
        stopped = {end for trial, end in ends.items() if rule.bracket(trial) == index and end < FULL}
        assert stopped == set(rungs)


def test_the_median_rule(make: Any) -> None:
    rule = StopRule(make({"median": {"grace_tokens": 768, "num_startup_trials": 3}}))
    for trial, level in enumerate((1.0, 2.0, 3.0), 1):
        assert not any(rule.report(trial, tokens, level) for tokens in (256, 512, 768, 1024))
        rule.close(trial, "completed" if trial < 3 else "failed")
    assert not rule.report(4, 768, 9.0), "two completed, and it takes three"
    rule.report(5, 768, 3.0)
    rule.report(5, 1024, 3.0)
    rule.close(5, "completed")
    assert not rule.report(6, 512, 9.0), "within the grace"
    assert rule.report(6, 768, 2.1), "the median of 1, 2 and 3 is 2"
    assert not rule.report(7, 768, 1.9)
    assert not rule.report(7, 1024, 9.0), "its best so far counts"


SCHEDULERS = [
    {"asha": {"grace_tokens": 512, "reduction_factor": 2}},
    {"hyperband": {"grace_tokens": 512, "reduction_factor": 3}},
    {"median": {"grace_tokens": 512}},
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: next(iter(scheduler)))
def test_log_spaced_evaluations_stop_nobody(make: Any, scheduler: Any) -> None:
    """What a trial is worth between the points of every_tokens changes no decision at them."""
    study = make(scheduler)
    plain, rule, replayed = StopRule(study), StopRule(study), StopRule(study)
    ends, between = [], []
    for trial in range(1, 41):
        ends.append(run_trial(plain, trial))
        curve = [*curve_of(trial), *((tokens, 100.0 - trial) for tokens in (128, 640, 1152, 3200, 7000))]
        end = FULL
        for tokens, value in sorted(curve):
            if rule.report(trial, tokens, value):
                end = tokens
                break
        rule.close(trial, "pruned" if end < FULL else "completed")
        between.append(end)
        seen = [point for point in sorted(curve) if point[0] <= end]
        replayed.replay(trial, seen, "pruned" if end < FULL else "completed")
    assert between == ends
    assert len(set(ends)) > 2, "some are stopped"
    for trial in (60, 61):
        assert [rule.report(trial, *point) for point in curve_of(trial)[:8]] == [
            replayed.report(trial, *point) for point in curve_of(trial)[:8]
        ]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: next(iter(scheduler)))
def test_a_rule_made_anew_from_curves_decides_as_the_old_one(make: Any, scheduler: Any) -> None:
    study = make(scheduler)
    whole = StopRule(study)
    ends = [run_trial(whole, trial) for trial in range(1, 41)]
    open_trial = 41
    for tokens, value in curve_of(open_trial)[:1]:
        assert not whole.report(open_trial, tokens, value)

    again = StopRule(study)
    for trial, end in enumerate(ends, 1):
        seen = [point for point in curve_of(trial) if point[0] <= end]
        again.replay(trial, seen, "completed" if end == FULL else "pruned")
    again.replay(open_trial, curve_of(open_trial)[:1], "interrupted")
    later = [run_trial(again, trial) for trial in range(41, 101)]
    assert later == [run_trial(whole, trial) for trial in range(41, 101)]
    assert len(set(later)) >= 2


@pytest.mark.parametrize("scheduler", SCHEDULERS[:2], ids=lambda scheduler: next(iter(scheduler)))
def test_the_expected_tokens_are_those_of_a_long_run(make: Any, scheduler: Any) -> None:
    study = make(scheduler)
    rule, draw, seen = StopRule(study), random.Random(0), 0
    rungs = sorted({tokens for bracket in brackets(study) for tokens in bracket})
    num_trials = 1200
    for trial in range(1, num_trials + 1):
        end = next((tokens for tokens in rungs if rule.report(trial, tokens, draw.random())), FULL)
        rule.close(trial, "completed" if end == FULL else "pruned")
        seen += end
    # The first trials have few to compete with, and so get further: hence the tolerance.
    assert seen / num_trials / FULL == pytest.approx(expected_frac(study), rel=0.08)
    assert full_tokens(study) == FULL


def test_what_cannot_be_expected(make: Any) -> None:
    assert expected_frac(make({"median": {"grace_tokens": 512}})) is None
    assert expected_frac(make("none")) == 1.0
    # 512 for all, 1,024 more for a third, 3,072 for a ninth, 3,584 for a 27th
    expected = (512 + 1024 / 3 + 3072 / 9 + 3584 / 27) / FULL
    assert expected_frac(make({"asha": {"grace_tokens": 512}})) == pytest.approx(expected)
