"""Who suggests the next point: a sampler made anew for every trial.

What one suggests is a function of the study's seed, the trial's number and the trials that have ended (with
tpe those that run, too), and of nothing else: no generator's state has to survive a restart, and a study that
was cut in two suggests what a whole one does. Optuna's own samplers for quasi-random points and CMA-ES keep
their place in the storage; the two here work it out from the trials instead.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from raydisp.config import StudyConfig
from raydisp.search import space
from raydisp.seeds import derive_seed

Distributions = Mapping[str, BaseDistribution]


def make_sampler(study: StudyConfig, distributions: Distributions, trial: int) -> BaseSampler:
    """The sampler that suggests one trial, numbered from 1."""
    search = study.search
    seed = derive_seed("search", study.seed, trial) % 2**32
    if search.sampler == "qmc":
        return SobolSampler(distributions, seed=derive_seed("sobol", study.seed) % 2**32, index=trial - 1)
    if search.sampler == "cma-es":
        return CmaEsSampler(distributions, seed=derive_seed("cma-es", study.seed) % 2**31, index=trial - 1)
    if search.sampler == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(
                seed=seed,
                n_startup_trials=search.startup_trials,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
    return RandomSampler(seed=seed)


def fixed_point(study: StudyConfig, trial: int) -> space.Values:
    """What is settled of a trial before any sampler is asked: a point of the file."""
    search = study.search
    if trial <= len(search.points_to_evaluate):
        return dict(search.points_to_evaluate[trial - 1])
    return {}


def shuffled_grid(study: StudyConfig) -> list[space.Values]:
    """All points of the grid: the one of trial 1, of trial 2, ..."""
    points = space.grid(study)
    random.Random(derive_seed("grid", study.seed)).shuffle(points)  # noqa: S311 - an order, no secret
    return points


class _OwnSampler(BaseSampler):
    """Suggests whole points of a known space."""

    def __init__(self, distributions: Distributions, *, seed: int, index: int) -> None:
        """Args: index: of the point in the sequence, from 0."""
        self._distributions = dict(distributions)
        self._seed = seed
        self._index = index
        self._rest = RandomSampler(seed=derive_seed(seed, index) % 2**32)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions, those with a condition included."""
        return self._distributions

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Not needed for the dimensions of the space."""
        return self._rest.sample_independent(study, trial, param_name, param_distribution)


class SobolSampler(_OwnSampler):
    """Points of a scrambled Sobol sequence: they fill the space more evenly than random ones."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point of this trial."""
        from scipy.stats import qmc  # 0.7 s

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that balance needs powers of 2
            engine = qmc.Sobol(len(search_space), scramble=True, rng=self._seed)
            if self._index:
                engine.fast_forward(self._index)
            point = engine.random(1)[0]
        return {name: from_unit(kind, u) for (name, kind), u in zip(search_space.items(), point, strict=True)}


class CmaEsSampler(_OwnSampler):
    """CMA-ES (the cmaes package), its distribution worked out anew from the completed trials.

    They are told to it in the order of their numbers, a generation at a time; trials that came while a
    generation was not complete are part of the next ones.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point drawn from the distribution as the completed trials have shaped it."""
        from cmaes import CMA

        names = list(search_space)
        optimizer = CMA(
            mean=np.full(len(names), 0.5),
            sigma=0.25,
            bounds=np.tile([0.0, 1.0], (len(names), 1)),
            seed=self._seed,
        )
        sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        told = [
            (np.array([to_unit(search_space[name], done.params[name]) for name in names]), sign * done.value)
            for done in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if done.value is not None and all(name in done.params for name in names)
        ]
        size = optimizer.population_size
        for start in range(0, len(told) - size + 1, size):
            if optimizer.should_stop():  # it has converged: begin again around the best
                best = min(told[:start], key=lambda pair: pair[1])[0]
                optimizer = CMA(mean=best, sigma=0.25, bounds=np.tile([0.0, 1.0], (len(names), 1)))
            optimizer.tell(told[start : start + size])
        optimizer.reseed_rng(derive_seed("cma-es", self._seed, self._index) % 2**32)
        point = optimizer.ask()
        return {name: from_unit(search_space[name], u) for name, u in zip(names, point, strict=True)}


def from_unit(distribution: BaseDistribution, u: float) -> Any:
    """The value of a dimension at u in [0, 1]: evenly over its axis, which may be logarithmic."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    low, high, step = _ends(distribution)
    value = low + (high - low) * u
    if distribution.log:
        value = math.exp(value)
    if step is not None:
        value = distribution.low + round((value - distribution.low) / step) * step
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def to_unit(distribution: BaseDistribution, value: Any) -> float:
    """Where a number lies on the axis of its dimension, in [0, 1]."""
    low, high, _ = _ends(distribution)
    if distribution.log:
        value = math.log(value)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _ends(distribution: BaseDistribution) -> tuple[float, float, float | None]:
    """Both ends of the axis, half a step wider where there are steps, so that each value has its share."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = float(distribution.low), float(distribution.high), distribution.step
    if step is not None:
        low, high = low - step / 2, high + step / 2
    return (math.log(low), math.log(high), step) if distribution.log else (low, high, step)
