"""The search space as Optuna and Arrow see it."""

from __future__ import annotations

from typing import Any

import optuna
import pyarrow as pa
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raydisp.config import StudyConfig
from raydisp.search import space


@pytest.fixture
def wide(tree: dict[str, Any]) -> StudyConfig:
    tree["search"]["space"] = {
        "dispersion.weight": {"low": 0.01, "high": 2, "log": True},
        "train.beta1": {"low": 0.5, "high": 0.9, "step": 0.1},
        "model.num_layers": {"low": 1, "high": 4},
        "train.grad_clip": [None, 1.0],
        "dispersion.layers": ["all", [1], [1, 2]],
        "model.tie_embeddings": [True, False],
        "train.micro_batch_tokens": ["auto", 16],
    }
    tree["model"]["num_layers"] = 2
    return StudyConfig.model_validate(tree)


def test_distributions_are_exactly_what_the_file_says(wide: StudyConfig) -> None:
    assert space.distributions(wide) == {
        "dispersion.weight": FloatDistribution(0.01, 2.0, log=True),
        "train.beta1": FloatDistribution(0.5, 0.9, step=0.1),
        "model.num_layers": IntDistribution(1, 4),
        "train.grad_clip": CategoricalDistribution([None, 1.0]),
        "dispersion.layers": CategoricalDistribution(["all", "[1]", "[1, 2]"]),
        "model.tie_embeddings": CategoricalDistribution([True, False]),
        "train.micro_batch_tokens": CategoricalDistribution(["auto", 16]),
    }


def test_suggestions_come_back_in_the_words_of_the_file(wide: StudyConfig) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(30):
        trial = study.ask(space.distributions(wide))
        values = space.from_optuna(wide, trial.params)
        assert space.to_optuna(values) == trial.params
        seen.add(str(values["dispersion.layers"]))
        assert isinstance(values["model.num_layers"], int)
    assert seen == {"all", "[1]", "[1, 2]"}


def test_one_typed_column_per_searched_field(wide: StudyConfig) -> None:
    assert space.column_types(wide) == {
        "dispersion.weight": pa.float64(),
        "train.beta1": pa.float64(),
        "model.num_layers": pa.int64(),
        "train.grad_clip": pa.float64(),
        "dispersion.layers": pa.string(),
        "model.tie_embeddings": pa.bool_(),
        "train.micro_batch_tokens": pa.string(),
    }


@pytest.mark.parametrize(
    ("value", "column", "stored"),
    [
        ([1, 2], pa.string(), "[1, 2]"),
        ("all", pa.string(), "all"),
        (16, pa.string(), "16"),
        (1, pa.float64(), 1.0),
        (None, pa.float64(), None),
        (True, pa.bool_(), True),
    ],
)
def test_column_values(value: Any, column: pa.DataType, stored: Any) -> None:
    assert space.column_value(value, column) == stored
