"""How trials fit on machines, and what the plan says of a study."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from raydisp.cluster import session
from raydisp.cluster.capacity import Growth, Node, NodeGroup, Offer
from raydisp.cluster.packing import DRIVER_RESOURCES, HEADLESS_DRIVER_RESOURCES, Plan, plan_resources
from raydisp.config import StudyConfig
from raydisp.config.model import PathModel
from raydisp.errors import ConfigError, ResourceError
from raydisp.plan import concurrency_warning, make_plan
from raydisp.trial_words import describe_evaluations, num_evaluations


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
    plan = plan_resources(with_resources(tree, **resources), Offer(tuple(nodes)), where="here")
    assert (plan.max_concurrent_trials, plan.gpus_per_worker) == (concurrent, gpus)


def test_no_more_at_a_time_than_there_are_trials(tree: dict[str, Any]) -> None:
    plan = plan_resources(with_resources(tree, num_trials=3), Offer((Node(64, 0),)), where="here")
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
        plan_resources(with_resources(tree, **resources), Offer((Node(2, 1),)), where="here")
    assert sentence in str(caught.value)


HEAD = Node(2, 0, is_head=True)
GPU_NODES = Growth((NodeGroup("gpu", Node(8, 1), 2),), 2)
GPU_NODES_200 = Growth((NodeGroup("gpu", Node(8, 1), 200),), 200)


def grown(
    tree: dict[str, Any], growth: Growth | None, *nodes: Node, **resources: Any
) -> tuple[int, int | None]:
    plan = plan_resources(with_resources(tree, **resources), Offer((HEAD, *nodes), growth), where="here")
    return plan.max_concurrent_trials, plan.num_now


def test_concurrency_counts_what_an_autoscaler_may_start(tree: dict[str, Any]) -> None:
    assert grown(tree, GPU_NODES, gpus_per_worker=1) == (2, 0)
    assert grown(tree, GPU_NODES) == (2, 0), "auto: GPUs, because some may come"
    assert grown(tree, GPU_NODES, Node(8, 1)) == (2, 1)
    assert grown(tree, GPU_NODES, gpus_per_worker=0) == (18, 2)
    assert grown(tree, GPU_NODES, num_workers=2, gpus_per_worker=0.5) == (2, 0)
    assert grown(tree, GPU_NODES, max_concurrent_trials=1) == (1, 0)


def test_what_the_autoscaler_may_not_start_is_an_error(tree: dict[str, Any]) -> None:
    with pytest.raises(ResourceError) as caught:
        grown(tree, GPU_NODES, gpus_per_worker=4)
    assert str(caught.value) == (
        "resources: a trial of 1 worker x 1 CPU + 4 GPU needs 1 CPU and 4 GPUs, and here offers 2 CPUs "
        "and 0 GPUs now, and can grow to 18 CPUs and 2 GPUs (autoscaler: up to 2 of 8 CPUs and 1 GPU), which "
        "is room for 0 workers; lower resources.num_workers, cpus_per_worker or gpus_per_worker, or use more "
        "machines (--address)"
    )
    with pytest.raises(ResourceError, match="which is room for 2 workers;"):
        grown(tree, GPU_NODES, num_workers=4, gpus_per_worker=1)
    with pytest.raises(ResourceError, match="max_concurrent_trials = 3, but here has room for 2"):
        grown(tree, GPU_NODES, max_concurrent_trials=3)


def test_a_gpu_that_nobody_has_is_an_error(tree: dict[str, Any]) -> None:
    with pytest.raises(
        ResourceError, match="needs 1 CPU and 1 GPU, and here offers 2 CPUs and 0 GPUs, which"
    ):
        grown(tree, None, gpus_per_worker=1)


def test_nodes_of_unknown_size_are_waited_for(tree: dict[str, Any]) -> None:
    own = Growth((NodeGroup("own", None, 2),), 2)
    assert grown(tree, own, gpus_per_worker=1) == (1, 0)
    with pytest.raises(ResourceError, match="room for 0 workers"):
        grown(tree, own, Node(8, 0), Node(8, 0), gpus_per_worker=1)  # both are here


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_an_address_of_another_kind_is_told_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray Client, whose driver is on no node, and of the dashboard, which `ray job submit` means."""
    with (
        pytest.raises(ResourceError, match=f"--address {address} .*ray attach.*ray job submit"),
        session.running_ray(address),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=f"RAY_ADDRESS {address} "), session.running_ray(None):
        pass


@pytest.mark.parametrize(
    ("resources", "growth", "text"),
    [
        (
            {"num_workers": 2},
            None,
            "2 workers x 1 CPU per trial (its driver takes no CPU), 1 trial at a time",
        ),
        ({"gpus_per_worker": 0}, None, "1 worker x 1 CPU per trial, 2 trials at a time"),
        (
            {},
            GPU_NODES,
            "1 worker x 1 CPU + 1 GPU per trial, 2 trials at a time, of which none fits on the nodes that "
            "are there; the others wait for nodes to join",
        ),
        (
            {"gpus_per_worker": 0},
            GPU_NODES,
            "1 worker x 1 CPU per trial, 18 trials at a time, of which 2 fit on the nodes that are there; "
            "the others wait for nodes to join",
        ),
    ],
)
def test_a_plan_in_words(
    tree: dict[str, Any], resources: dict[str, Any], growth: Growth | None, text: str
) -> None:
    plan = plan_resources(with_resources(tree, **resources), Offer((HEAD,), growth), where="here")
    assert plan.describe() == text


def test_drivers_are_placed_where_they_take_no_cpu(tree: dict[str, Any]) -> None:
    study = with_resources(tree, num_trials=5000, num_workers=2)
    plan = plan_resources(study, Offer((Node(4000, 0, is_head=True),)), where="here")
    assert (plan.driver_resources, plan.max_concurrent_trials) == (DRIVER_RESOURCES, 1000)
    plan = plan_resources(study, Offer((Node(4000, 0),)), where="here")
    assert (plan.driver_resources, plan.max_concurrent_trials) == (HEADLESS_DRIVER_RESOURCES, 2000)


def test_the_drivers_of_all_trials_fit_into_the_heads_memory(tree: dict[str, Any]) -> None:
    """`auto` is bounded by it where trials have drivers there, a number of the user's is not."""

    def planned(gigabytes: float | None, **resources: Any) -> Plan:
        memory = None if gigabytes is None else gigabytes * 2**30
        offer = Offer((HEAD,), GPU_NODES_200, head_memory_bytes=memory)
        return plan_resources(with_resources(tree, **resources), offer, where="here")

    tight = planned(7, num_workers=2)
    assert (tight.max_concurrent_trials, tight.bounded_by_head) == (10, True)
    assert tight.describe().startswith(
        "2 workers x 1 CPU + 1 GPU per trial (its driver takes no CPU), 10 trials at a time, for whose "
        "drivers the head has memory (700 MiB each; resources.max_concurrent_trials overrides it), of which "
        "none fits"
    )
    assert planned(0.1, num_workers=2).max_concurrent_trials == 1, "one always"
    for plan in (planned(100, num_workers=2), planned(None, num_workers=2), planned(7)):
        assert (plan.max_concurrent_trials, plan.bounded_by_head) == (100 + (plan.num_workers == 1), False)
    by_hand = planned(7, num_workers=2, max_concurrent_trials=50)
    assert (by_hand.max_concurrent_trials, by_hand.bounded_by_head) == (50, False)


def test_more_trials_at_a_time_than_random_ones_are_told(study: StudyConfig) -> None:
    assert concurrency_warning(study, 2) is None
    text = concurrency_warning(study, 3)
    assert text is not None
    assert text.startswith(
        "3 trials run at a time, so the first 3 learn from no result and are as good as random"
    )


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not session.joins_cluster("local")
    assert session.joins_cluster("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert session.joins_cluster(None)


def test_the_plan_says_what_will_happen(study: StudyConfig, tmp_path: Any) -> None:
    text = make_plan(study, str(tmp_path / "results" / "tiny"), "local").describe()
    for part in (
        "2 layers, 16 features, vocabulary 320",
        "80 documents",
        "3 search trials + 1 baseline (dispersion.weight 0); 5,120 training tokens to come",
        "10 steps x 128 tokens (8 sequences) = 1,280 tokens per trial",
        "evaluation before the first step, every 512 tokens, on 256 tokens; at the end on the whole split",
        "angular_spread, weight 0.3, temperature 1, layers all (1, 2), clamp 0.1",
        "tpe on val_loss (min), seed 3, the first 2 at random",
        "dispersion.weight: 0.01 to 2, logarithmic",
        "1 worker x 1 CPU",
        "Dry run: nothing was started or written.",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("evaluate", "text", "number"),
    [
        ({}, "before the first step, on 8,192 tokens; at the end on the whole split", 2),
        (
            {"num_log_spaced": 3, "max_tokens": None},
            "first step, after 3 log-spaced steps (1, 2, 5), on the",
            5,
        ),
        # 1, 2, 3, 4, 6 and 4, 8
        (
            {"num_log_spaced": 5, "every_tokens": 512},
            "every 512 tokens, after 5 log-spaced steps (1, 2, 3, ",
            8,
        ),
    ],
)
def test_the_plan_says_when_a_trial_is_evaluated(
    tree: dict[str, Any], evaluate: dict[str, Any], text: str, number: int
) -> None:
    tree["evaluate"] = evaluate
    study = StudyConfig.model_validate(tree)
    assert text in describe_evaluations(study)
    assert num_evaluations(study) == number


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


TIED = "the output head of this model shares their weight (tied), so that each reset loses the head too"


def test_the_plan_says_that_a_tied_head_is_forgotten_too(tree: dict[str, Any], tmp_path: Any) -> None:
    def plan(**parts: Any) -> Any:
        changed = copy.deepcopy(tree)
        for part, fields in parts.items():
            changed[part].update(fields) if part in changed else changed.update({part: fields})
        return make_plan(StudyConfig.model_validate(changed), str(tmp_path), "local")

    every = {"every_steps": 4}
    told = plan(active_forgetting=every, noisy_embedding={"alpha": 2.5})
    assert any(TIED in warning and "model.tie_embeddings: false" in warning for warning in told.warnings())
    assert "input embeddings drawn anew every 4 steps, 2 times in all; their peak learning rate 5e-05" in (
        told.describe()
    )
    assert "noise of alpha 2.5 on the input embeddings while training" in told.describe()
    assert plan(active_forgetting=every, model={"tie_embeddings": False}).warnings() == []
    searched = {"active_forgetting.every_steps": [None, 4], "model.tie_embeddings": [False, True]}
    assert any(TIED in warning for warning in plan(search={"space": searched}).warnings())
    assert "embeddings" not in plan().describe().replace("tie_embeddings", "")


def test_a_tied_head_of_a_pretrained_model_is_told(tree: dict[str, Any], tmp_path: Any) -> None:
    from raydisp import models

    for tied in (True, False):
        tree["model"]["tie_embeddings"] = tied
        scratch = StudyConfig.model_validate(tree).model
        model = models.build_model(scratch, context_length=16, eos_token_id=0, seed=0)
        model.save_pretrained(tmp_path / str(tied))
        found = models.ties_embeddings(PathModel(source="path", path=str(tmp_path / str(tied))))
        assert found is models.ties_embeddings(scratch) is tied


def test_a_study_without_oddities_has_no_warnings(study: StudyConfig, tmp_path: Any) -> None:
    assert make_plan(study, str(tmp_path), "local").warnings() == []


def test_arms_without_a_search_are_not_warned_of_one(tree: dict[str, Any], tmp_path: Any) -> None:
    tree["arms"] = {"baseline": {"dispersion.weight": 0}, "strong": {"dispersion.weight": 1.0}}
    tree["search"].update(num_trials=1, space={}, num_startup_trials=1)
    plan = make_plan(StudyConfig.model_validate(tree), str(tmp_path), "local")
    assert plan.warnings() == []
    assert "search     nothing: each arm is one trial\n" in plan.describe()


def test_layers_of_a_pretrained_model_are_checked(tree: dict[str, Any], tmp_path: Any) -> None:
    from raydisp import models

    scratch = StudyConfig.model_validate(tree).model
    model = models.build_model(scratch, context_length=16, eos_token_id=0, seed=0)
    model.save_pretrained(tmp_path / "model")
    tree["model"] = {"source": "path", "path": str(tmp_path / "model")}
    tree["search"]["space"] = {"dispersion.layers": ["all", [3]]}
    with pytest.raises(ConfigError, match=r'search\.space\["dispersion\.layers"\]\[1\]: .*holds 3'):
        make_plan(StudyConfig.model_validate(tree), str(tmp_path), "local")
