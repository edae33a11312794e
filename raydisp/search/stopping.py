"""Who stops a trial before its end: successive halving, hyperband and the median rule, at equal tokens.

The rules are Optuna's pruners, on a study of their own in memory: it knows one metric, whatever the search's
objectives are, and counts steps in tokens. It is made anew from the curves in the results when a study goes
on. A trial asks after each evaluation, and is told at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import optuna
from optuna.pruners import MedianPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from raydisp.arms import Arms
from raydisp.config import StudyConfig
from raydisp.config.search import Median
from raydisp.seeds import derive_seed

Curve = Sequence[tuple[int, float]]
"""(tokens, value) at a trial's evaluations before its end."""


def full_tokens(study: StudyConfig) -> int:
    """Tokens of a trial that is not stopped: the budget in whole steps."""
    return study.num_steps * study.train.global_batch_tokens


def brackets(study: StudyConfig) -> list[list[int]]:
    """The rungs, in tokens, of each bracket: one bracket but for hyperband, whose last one stops nobody.

    The median rule has no rungs; what is given are the points at which it looks.
    """
    rule, full = study.search.stopping, full_tokens(study)
    if rule is None:
        return []
    if isinstance(rule, Median):
        return [list(range(rule.grace_tokens, full, evaluation_tokens(study)))]
    rungs, tokens = [], rule.grace_tokens
    while tokens < full:
        rungs.append(tokens)
        tokens *= rule.reduction_factor
    if study.search.scheduler_name == "asha":
        return [rungs]
    return [rungs[index:] for index in range(len(rungs) + 1)]


def evaluation_tokens(study: StudyConfig) -> int:
    """Tokens between the evaluations of `evaluate.every_tokens`, at which alone trials are stopped."""
    every = study.evaluate.every_tokens
    assert every is not None, "a rule of the search section"
    if "train.global_batch_tokens" in study.search.space:
        return every  # a multiple of each batch: another rule
    batch = study.train.global_batch_tokens
    return -(-every // batch) * batch


def expected_frac(study: StudyConfig) -> float | None:
    """Tokens of the average search trial over those of a full one, in the long run; None where the rule does
    not tell: how often a trial is below a median depends on the trials.

    Of the trials at a rung, one in reduction_factor goes on.
    """
    rule, full = study.search.stopping, full_tokens(study)
    if rule is None:
        return 1.0
    if isinstance(rule, Median):
        return None
    shares = _bracket_shares(study)
    total = 0.0
    for share, rungs in zip(shares, brackets(study), strict=True):
        seen, going_on = 0, 1.0
        for tokens in [*rungs, full]:
            total += share * going_on * (tokens - seen) / full
            seen, going_on = tokens, going_on / rule.reduction_factor
    return total


def _bracket_shares(study: StudyConfig) -> list[float]:
    """Which part of the trials goes to each bracket: as hyperband has it, about equal tokens for each."""
    rule, number = study.search.stopping, len(brackets(study))
    assert rule is not None
    assert not isinstance(rule, Median)
    weights = [
        math.ceil(number * rule.reduction_factor ** (number - 1 - index) / (number - index))
        for index in range(number)
    ]
    return [weight / sum(weights) for weight in weights]


class StopRule:
    """Decides whether trials go on; holds the values that they had so far."""

    def __init__(self, study: StudyConfig) -> None:
        rule, watched = study.search.stopping, study.search.watched
        assert rule is not None
        assert watched is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed = study.seed
        self.metric = watched.metric
        direction = "minimize" if watched.mode == "min" else "maximize"
        pruners: list[optuna.pruners.BasePruner]
        self._rungs = [] if isinstance(rule, Median) else brackets(study)
        # Nothing is decided at log-spaced evaluations, which lie elsewhere where steps have other tokens.
        self._between = evaluation_tokens(study)
        if isinstance(rule, Median):
            self._shares = [1.0]
            pruners = [
                MedianPruner(n_startup_trials=rule.num_startup_trials, n_warmup_steps=rule.grace_tokens)
            ]
        else:
            self._shares = _bracket_shares(study)
            pruners = [
                SuccessiveHalvingPruner(
                    min_resource=rule.grace_tokens,
                    reduction_factor=rule.reduction_factor,
                    min_early_stopping_rate=index,
                )
                for index in range(len(self._shares))
            ]
        self._brackets = [optuna.create_study(direction=direction, pruner=pruner) for pruner in pruners]
        self._trials: dict[int, optuna.Trial] = {}
        self._reported: dict[int, int] = {}
        self._stopped: dict[int, int] = {}

    def bracket(self, trial: int) -> int:
        """The bracket of a trial: a function of the study's seed and the trial's number."""
        drawn = random.Random(derive_seed("bracket", self._seed, trial)).random()  # noqa: S311
        for index, share in enumerate(self._shares):
            drawn -= share
            if drawn < 0:
                return index
        return len(self._shares) - 1

    def report(self, trial: int, num_tokens: int, value: float | None) -> bool:
        """Take a value; returns whether the trial must stop here.

        What was reported before, by an earlier attempt, is answered as it was.

        Args:
            value: of the watched metric; None or not finite: nothing is decided.
        """
        if num_tokens <= self._reported.get(trial, -1):
            return self._stopped.get(trial, num_tokens + 1) <= num_tokens
        if value is None or not math.isfinite(value):
            return False
        if not (self._compares(trial, num_tokens) if self._rungs else num_tokens % self._between == 0):
            return False
        if trial not in self._trials:
            self._trials[trial] = self._brackets[self.bracket(trial)].ask()
        self._reported[trial] = num_tokens
        self._trials[trial].report(value, num_tokens)
        if self._trials[trial].should_prune():
            self._stopped.setdefault(trial, num_tokens)
            return True
        return False

    def _compares(self, trial: int, num_tokens: int) -> bool:
        """Whether this is a rung, and the trial had a value at each before it: Optuna's pruner takes the next
        value where one is missing, which is of more tokens than the others'."""
        rungs = self._rungs[self.bracket(trial)]
        if num_tokens not in rungs:
            return False
        index = rungs.index(num_tokens)
        return index == 0 or self._reported.get(trial) == rungs[index - 1]

    def close(self, trial: int, status: str) -> None:
        """A trial has ended; one that completed counts for the median."""
        live = self._trials.pop(trial, None)
        if live is None:
            return
        study = self._brackets[self.bracket(trial)]
        if status == "completed":
            values = study.get_trials(deepcopy=False)[live.number].intermediate_values
            study.tell(live, values[max(values)])
        else:
            study.tell(live, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)

    def replay(self, trial: int, curve: Curve, status: str) -> None:
        """Take what an earlier run of the study measured.

        Args:
            status: of the trial's row; `interrupted`: it goes on.
        """
        for num_tokens, value in curve:
            self.report(trial, num_tokens, value)
        # Later values show that it went on, whatever is decided now. At the last one nobody may have heard
        # the answer: an open trial that asks again there is told the same.
        if curve and self._stopped.get(trial, math.inf) < curve[-1][0]:
            del self._stopped[trial]
        if status != "interrupted":
            self.close(trial, status)


class StopRules:
    """The rule of each searched arm: trials compare with those of their own arm."""

    def __init__(self, study: StudyConfig) -> None:
        self._arms = Arms(study)
        self._rules = {arm.name: StopRule(arm.study) for arm in self._arms.searched}

    def _of(self, trial: int) -> StopRule:
        return self._rules[self._arms.of(trial).name]

    def report(self, trial: int, num_tokens: int, value: float | None) -> bool:
        """As `StopRule.report`."""
        return self._of(trial).report(trial, num_tokens, value)

    def close(self, trial: int, status: str) -> None:
        """As `StopRule.close`; an arm that is not searched has nothing to close."""
        if self._arms.of(trial).searched:
            self._of(trial).close(trial, status)

    def replay(self, trial: int, curve: Curve, status: str) -> None:
        """As `StopRule.replay`."""
        self._of(trial).replay(trial, curve, status)
