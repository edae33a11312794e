"""One contract for every sampler: what it may suggest, that it repeats itself, and what it is worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.search import samplers, space
from raydisp.search.dispatch import Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.trial.assignment import blank_row

WIDE = {
    "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
    "train.beta1": {"low": 0.5, "high": 0.8, "step": 0.1},
    "train.warmup_frac": {"low": 0.0, "high": 0.5},
    "model.num_layers": {"low": 2, "high": 4},
    "model.vocab_size": {"low": 300, "high": 320, "log": True},
    "dispersion.layers": ["all", "last", [1], [1, 2]],
    "train.grad_clip": [None, 1.0],
}
RANGES = {name: WIDE[name] for name in ("dispersion.weight", "train.beta1", "train.warmup_frac")}
STEPS = {name: WIDE[name] for name in ("train.beta1", "model.num_layers", "dispersion.layers")}
TREE = {
    "dispersion.variant": ["angular_spread", "decorrelation", "uniformity"],
    "dispersion.layers": {
        "choices": ["all", "last"],
        "when": {"dispersion.variant": ["angular_spread", "decorrelation"]},
    },
    "dispersion.temperature": {
        "low": 0.5,
        "high": 1.0,
        "step": 0.25,
        "when": {"dispersion.layers": ["last"], "dispersion.variant": ["angular_spread"]},
    },
}
SPACES = {"tpe": WIDE, "random": WIDE, "qmc": WIDE, "cma-es": RANGES, "grid": STEPS}
SAMPLERS = list(SPACES)
CONDITIONAL = [name for name in SAMPLERS if name != "cma-es"]


def make_study(tree: dict[str, Any], sampler: str, dimensions: Any = None, **search: Any) -> StudyConfig:
    tree["search"] = {
        "num_trials": 24,
        "num_startup_trials": 4,
        "space": dimensions or SPACES[sampler],
        "sampler": sampler,
        **search,
    }
    return StudyConfig.model_validate(tree)


def outcome_of(study: StudyConfig, trial: int, values: dict[str, Any]) -> dict[str, Any]:
    """The row that a trial leaves: every fourth is pruned, every seventh fails."""
    launch = Launch(study, "", "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1))
    row = blank_row(launch.assign(trial, 1, "search", values), study, 0.0)
    value = 5 + 0.1 * math.sin(37 * len(str(values)) + trial)
    if trial % 7 == 0:
        return {**row, "status": "failed", "error_message": "boom"}
    if trial % 4 == 0:
        return {**row, "status": "pruned", "num_tokens": 512}
    return {**row, "status": "completed", "val_loss": value, "num_tokens": 1280}


def curve_of(trial: int) -> list[tuple[int, dict[str, float]]]:
    return [(512, {"val_loss": 6 - 0.01 * trial})]


def suggest_all(
    study: StudyConfig, num_trials: int, rows: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Suggestions up to a number of trials, after the trials of `rows`, to which the new ones are added."""
    rows = [] if rows is None else rows
    known = OptunaStudy(study, None)
    for row in rows:
        known.add_finished(row, curve_of(row["trial"]))
    suggested = []
    for trial in range(len(rows) + 1, num_trials + 1):
        values = known.suggest(trial)
        suggested.append(values)
        rows.append(outcome_of(study, trial, values))
        known.finish(rows[-1], curve_of(trial))
    known.close()
    return suggested


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_suggestions_are_in_the_space_and_of_its_types(tree: dict[str, Any], sampler: str) -> None:
    study = make_study(tree, sampler)
    seen: dict[str, set[str]] = {name: set() for name in study.search.space}
    for values in suggest_all(study, 24):
        assert list(values) == list(study.search.space)
        for name, value in values.items():
            assert space.contains(study, name, value), f"{name} = {value}"
            distribution = space.distributions(study)[name]
            if isinstance(distribution, IntDistribution):
                assert type(value) is int
            elif isinstance(distribution, FloatDistribution):
                assert type(value) is float
            else:
                assert any(value is choice or value == choice for choice in study.search.space[name])
            seen[name].add(str(value))
    assert all(len(values) > 1 for values in seen.values()), "all of them vary"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_and_results_same_suggestions(tree: dict[str, Any], sampler: str) -> None:
    study = make_study(tree, sampler)
    first = suggest_all(study, 16)
    assert suggest_all(study, 16) == first
    assert suggest_all(study.model_copy(update={"seed": 99}), 16) != first


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cut", [3, 9])
def test_a_study_cut_in_two_suggests_what_a_whole_one_does(
    tree: dict[str, Any], sampler: str, cut: int
) -> None:
    """With pruned and failed trials among those before the cut."""
    study = make_study(tree, sampler)
    whole = suggest_all(study, 20)
    rows: list[dict[str, Any]] = []
    assert suggest_all(study, cut, rows) == whole[:cut]
    assert suggest_all(study, 20, rows) == whole[cut:]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cma-es"])
def test_what_is_continuous_is_never_suggested_twice(tree: dict[str, Any], sampler: str) -> None:
    weights = [values["dispersion.weight"] for values in suggest_all(make_study(tree, sampler), 24)]
    assert len(set(weights)) == 24


@pytest.mark.parametrize(("dimensions", "size"), [(STEPS, 48), (TREE, 7)], ids=["plain", "conditional"])
def test_a_grid_visits_each_point_once(tree: dict[str, Any], dimensions: Any, size: int) -> None:
    study = make_study(tree, "grid", dimensions, num_trials=size)
    assert space.grid_size(study) == size
    suggested = suggest_all(study, size)
    assert len({str(sorted(values.items())) for values in suggested}) == size
    assert {str(values) for values in suggested} == {str(values) for values in space.grid(study)}
    assert suggested != space.grid(study), "in random order, so that a part of it is a fair one"


def test_the_steps_of_a_grid_are_as_they_are_written(tree: dict[str, Any]) -> None:
    """0.1 + 2 * 0.1 is 0.30000000000000004, outside the space."""
    dimensions = {"train.warmup_frac": {"low": 0.1, "high": 0.3, "step": 0.1}}
    study = make_study(tree, "grid", dimensions, num_trials=3)
    assert sorted(values["train.warmup_frac"] for values in suggest_all(study, 3)) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("sampler", CONDITIONAL)
def test_a_field_is_suggested_only_where_its_condition_holds(tree: dict[str, Any], sampler: str) -> None:
    study = make_study(tree, sampler, TREE, num_trials=7)
    num_trials = 7 if sampler == "grid" else 24
    combinations = set()
    for trial, values in enumerate(suggest_all(study, num_trials), 1):
        variant, layers = values["dispersion.variant"], values.get("dispersion.layers")
        assert ("dispersion.layers" in values) == (variant != "uniformity")
        nested = layers == "last" and variant == "angular_spread"
        assert ("dispersion.temperature" in values) == nested
        row = outcome_of(study, trial, values)
        for name in TREE:
            assert (row[name] is None) == (name not in values), "null where it is not searched"
        combinations.add(tuple(values))
    assert len(combinations) == 3


def test_a_condition_counts_values_not_their_spelling(tree: dict[str, Any]) -> None:
    """1 in the file is 1.0 in the row of a float field."""
    dimensions = {
        "dispersion.weight": [1, 2],
        "dispersion.layers": {"choices": ["all", "last"], "when": {"dispersion.weight": [1.0]}},
    }
    study = make_study(tree, "random", dimensions)
    config = {"dispersion": {"weight": 1.0, "layers": "last"}}
    values = space.searched_values(study, config)
    assert values == {"dispersion.weight": 1.0, "dispersion.layers": "last"}
    assert all(space.contains(study, name, value) for name, value in values.items())
    assert not space.is_one_of(True, [1, "True"])


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cma-es"])
def test_given_points_come_first_and_partial_ones_are_completed(tree: dict[str, Any], sampler: str) -> None:
    points = [{"dispersion.weight": 1, "train.beta1": 0.7}, {"train.warmup_frac": 0.25}, {}]
    study = make_study(tree, sampler, points_to_evaluate=points)
    suggested = suggest_all(study, 6)
    for point, values in zip(points, suggested, strict=False):
        assert {name: values[name] for name in point} == point
        assert list(values) == list(study.search.space)
    assert type(suggested[0]["dispersion.weight"]) is float, "as the field is, not as the file spells it"
    rows: list[dict[str, Any]] = []
    assert [*suggest_all(study, 2, rows), *suggest_all(study, 6, rows)] == suggested, "cut among them"


def test_a_given_point_brings_its_conditions(tree: dict[str, Any]) -> None:
    points = [
        {"dispersion.variant": "uniformity"},
        {"dispersion.variant": "angular_spread", "dispersion.layers": "last"},
    ]
    first, second = suggest_all(make_study(tree, "tpe", TREE, points_to_evaluate=points), 2)
    assert first == points[0]
    assert set(second) == set(TREE)


# --- worth ---------------------------------------------------------------------------------------------


def best_of(tree: dict[str, Any], sampler: str, seed: int, num_trials: int) -> float:
    """The best value of a smooth response with its minimum at weight 0.3, warm-up 0.1."""
    tree["seed"] = seed
    dimensions = {
        "dispersion.weight": {"low": 0.001, "high": 10.0, "log": True},
        "train.warmup_frac": {"low": 0.0, "high": 1.0},
    }
    study = make_study(tree, sampler, dimensions, num_trials=num_trials, num_startup_trials=8)
    known, best = OptunaStudy(study, None), math.inf
    for trial in range(1, num_trials + 1):
        values = known.suggest(trial)
        loss = math.log10(values["dispersion.weight"] / 0.3) ** 2 + (values["train.warmup_frac"] - 0.1) ** 2
        best = min(best, loss)
        known.finish({**outcome_of(study, 1, values), "trial": trial, "val_loss": loss})
    return best


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_a_sampler_that_learns_beats_chance(tree: dict[str, Any], sampler: str) -> None:
    seeds = range(7)
    theirs = [best_of(tree, sampler, seed, 60) for seed in seeds]
    chance = [best_of(tree, "random", seed, 60) for seed in seeds]
    # Seeded, so this is no coin toss; medians, because random search is sometimes lucky.
    assert np.median(theirs) < 0.5 * np.median(chance)


def test_quasi_random_points_fill_the_space_better(tree: dict[str, Any]) -> None:
    dimensions = {
        "train.warmup_frac": {"low": 0.0, "high": 1.0},
        "train.beta1": {"low": 0.0, "high": 0.999},
        "dispersion.weight": {"low": 0.01, "high": 1.0, "log": True},
    }

    def discrepancy(sampler: str, seed: int) -> float:
        tree["seed"] = seed
        study = make_study(tree, sampler, dimensions)
        kinds = space.distributions(study)
        points = [
            [samplers.to_unit(kinds[name], value) for name, value in values.items()]
            for values in suggest_all(study, 32)
        ]
        return float(qmc.discrepancy(np.array(points)))

    for seed in range(4):
        assert discrepancy("qmc", seed) < 0.5 * discrepancy("random", seed)


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(0.0, 1.0),
        FloatDistribution(0.01, 2.0, log=True),
        FloatDistribution(0.1, 0.3, step=0.1),
        IntDistribution(1, 4),
        IntDistribution(1, 4, log=True),
        IntDistribution(2, 10, step=4),
        CategoricalDistribution(["a", "b", None]),
    ],
    ids=str,
)
def test_the_unit_interval_covers_a_dimension(distribution: Any) -> None:
    values = [samplers.from_unit(distribution, u) for u in np.linspace(0, 1, 601)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)
    if isinstance(distribution, CategoricalDistribution):
        assert {values.count(choice) for choice in distribution.choices} <= {200, 201}
        return
    assert (min(values), max(values)) == pytest.approx((distribution.low, distribution.high))
    assert values == sorted(values)
    for value in values[::50]:
        assert samplers.from_unit(distribution, samplers.to_unit(distribution, value)) == pytest.approx(value)
    if distribution.step is not None and not distribution.log:
        counts = {values.count(value) for value in set(values)}
        assert max(counts) - min(counts) <= 2, "each has its share, the ends too"
