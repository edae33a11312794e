"""How trials fit on machines, and what the plan says of a study."""

from __future__ import annotations

from typing import Any

import pytest

from raydisp import cluster
from raydisp.cluster import Node, plan_resources
from raydisp.config import StudyConfig
from raydisp.errors import ConfigError, ResourceError
from raydisp.plan import make_plan


def with_resources(tree: dict[str, Any], num_trials: int = 100, **resources: Any) -> StudyConfig:
    tree["resources"] = resources
    tree["search"]["num_trials"] = num_trials
    return StudyConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("resources", "nodes", "concurrent", "gpus"),
    [
        ({}, [Node(2, 0)], 2, 0),
        ({"cpus_per_worker": 2}, [Node(2, 0)], 1, 0),
        ({"cpus_per_worker": 0.5}, [Node(2, 0)], 4, 0),
        ({"cpus_per_worker": 0.1}, [Node(1, 0)], 10, 0),  # 1 / 0.1 is just below 10 in floats
        ({"num_workers": 2}, [Node(2, 0)], 1, 0),  # the waiting driver takes no CPU
        ({"num_workers": 2}, [Node(1, 0), Node(1, 0)], 1, 0),
        ({}, [Node(16, 4)], 4, 1),
        ({"gpus_per_worker": 0.5}, [Node(16, 4)], 8, 0.5),
        ({"gpus_per_worker": 0}, [Node(16, 4)], 16, 0),
        ({"num_workers": 8}, [Node(4, 0), Node(96, 8), Node(96, 8)], 2, 1),
        ({"num_workers": 4, "cpus_per_worker": 3}, [Node(8, 8)] * 3, 1, 1),  # two workers a node by CPUs
        ({"max_concurrent_trials": 1}, [Node(2, 0)], 1, 0),
    ],
)
def test_concurrency(
    tree: dict[str, Any], resources: dict[str, Any], nodes: list[Node], concurrent: int, gpus: float
) -> None:
    plan = plan_resources(with_resources(tree, **resources), nodes, where="here")
    assert (plan.max_concurrent_trials, plan.gpus_per_worker) == (concurrent, gpus)


def test_no_more_at_a_time_than_there_are_trials(tree: dict[str, Any]) -> None:
    plan = plan_resources(with_resources(tree, num_trials=3), [Node(64, 0)], where="here")
    assert plan.max_concurrent_trials == 4, "three and the baseline"


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        ({"gpus_per_worker": 4}, "needs 1 CPU and 4 GPUs, and here offers 2 CPUs and 1 GPU"),
        (
            {"num_workers": 4, "gpus_per_worker": 0},
            "needs 4 CPUs, and here offers 2 CPUs, which is room for 2",
        ),
        ({"cpus_per_worker": 3}, "needs 3 CPUs"),
        ({"max_concurrent_trials": 5}, "max_concurrent_trials = 5, but here has room for 1"),
    ],
)
def test_what_cannot_fit_is_told_in_numbers(
    tree: dict[str, Any], resources: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        plan_resources(with_resources(tree, **resources), [Node(2, 1)], where="here")
    assert sentence in str(caught.value)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not cluster.joins_cluster("local")
    assert cluster.joins_cluster("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster.joins_cluster(None)


def test_the_plan_says_what_will_happen(study: StudyConfig, tmp_path: Any) -> None:
    text = make_plan(study, str(tmp_path / "results" / "tiny"), "local").describe()
    for part in (
        "2 layers, 16 features, vocabulary 320",
        "80 documents",
        "3 search trials + 1 baseline (dispersion.weight 0); 5,120 training tokens to come",
        "10 steps x 128 tokens (8 sequences) = 1,280 tokens per trial",
        "angular_spread, weight 0.3, temperature 1, layers all (1, 2), clamp 0.1",
        "tpe on val_loss (min), seed 3, the first 2 at random",
        "dispersion.weight: 0.01 to 2, logarithmic",
        "1 worker x 1 CPU",
        "Dry run: nothing was started or written.",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_startup_trials": 3}, "the whole search is random"),
        ({"space": {"data.context_length": [16, 32]}}, "val_bits_per_byte compares across tokenizers"),
    ],
)
def test_warnings(tree: dict[str, Any], tmp_path: Any, changes: dict[str, Any], sentence: str) -> None:
    tree["search"].update(changes)
    plan = make_plan(StudyConfig.model_validate(tree), str(tmp_path), "local")
    assert any(sentence in warning for warning in plan.warnings())


def test_a_study_without_oddities_has_no_warnings(study: StudyConfig, tmp_path: Any) -> None:
    assert make_plan(study, str(tmp_path), "local").warnings() == []


def test_layers_of_a_pretrained_model_are_checked(tree: dict[str, Any], tmp_path: Any) -> None:
    from raydisp import models

    scratch = StudyConfig.model_validate(tree).model
    model = models.build_model(scratch, context_length=16, eos_token_id=0, seed=0)
    model.save_pretrained(tmp_path / "model")
    tree["model"] = {"source": "path", "path": str(tmp_path / "model")}
    tree["search"]["space"] = {"dispersion.layers": ["all", [3]]}
    with pytest.raises(ConfigError, match=r'search\.space\["dispersion\.layers"\]\[1\]: .*holds 3'):
        make_plan(StudyConfig.model_validate(tree), str(tmp_path), "local")
