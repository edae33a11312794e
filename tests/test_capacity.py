"""Room for workers, now and with all that an autoscaler may start, and where its limits are read from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.core.generated import autoscaler_pb2

from raydisp.cluster import autoscaler
from raydisp.cluster.capacity import Growth, Node, NodeGroup, Offer
from raydisp.cluster.packing import plan_resources
from raydisp.cluster.placement import PlacementWatch, describe_offer
from raydisp.config import StudyConfig
from raydisp.errors import ResourceError
from raydisp.search.on_tune import _trial_resources
from raydisp.trial.share import limit_memory

HEAD = Node(2, 0, is_head=True)
BIG, SMALL = Node(8, 1), Node(4, 4)


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        (Node(8, 0), 1, 0, 8),
        (Node(8, 0), 3, 0, 2),
        (Node(1, 0), 0.1, 0, 10),  # 1 / 0.1 is just below 10 in floats
        (Node(8, 2), 1, 0.5, 4),
        (Node(8, 2), 1, 0.4, 4),  # two share a GPU; nobody gets what is left of both
        (Node(8, 2), 1, 0.1, 8),
        (Node(8, 3), 1, 2, 1),
        (Node(8, 2), 4, 0.5, 2),
        (Node(8, 2), 1, 4, 0),
        (Node(8, 0), 1, 1, 0),
    ],
)
def test_room_on_a_node(node: Node, cpus: float, gpus: float, room: int) -> None:
    assert node.room(cpus, gpus) == room


@pytest.mark.parametrize(
    ("growth", "cpus", "gpus", "now", "room"),
    [
        (None, 1, 0, 2, 2),
        (Growth((NodeGroup("a", BIG, 3),), 3), 1, 0, 2, 26),
        (Growth((NodeGroup("a", BIG, 3),), 3), 1, 1, 0, 3),
        (Growth((NodeGroup("a", BIG, 3),), 1), 1, 1, 0, 1),  # one in all
        # two in all: those with four GPUs first, although they have fewer CPUs
        (Growth((NodeGroup("a", BIG, 3), NodeGroup("b", SMALL, 1)), 2), 1, 1, 0, 5),
        (Growth((NodeGroup("a", BIG, 3), NodeGroup("b", SMALL, 1)), 2), 1, 0, 2, 18),
        (Growth((NodeGroup("a", BIG, 3),), 3, with_head=True), 1, 0, 2, 24),
        (Growth((), 0), 1, 0, 2, 2),
        (Growth((NodeGroup("a", Node(1, 0), 1),), 1, with_head=True), 1, 0, 2, 2),  # never less than now
        (Growth((NodeGroup("a", None, 3),), 3), 1, 0, 2, 2),
    ],
)
def test_room_with_an_autoscaler(
    growth: Growth | None, cpus: float, gpus: float, now: int, room: int
) -> None:
    offer = Offer((HEAD,), growth)
    assert (offer.room_now(cpus, gpus), offer.room(cpus, gpus)) == (now, room)


def test_nodes_that_the_autoscaler_has_started_are_not_counted_twice() -> None:
    growth = Growth((NodeGroup("a", BIG, 3),), 3)
    assert Offer((HEAD, BIG, BIG), growth).room(1, 0) == Offer((HEAD,), growth).room(1, 0) == 26
    unsized = Growth((NodeGroup("a", None, 3),), 3)
    assert Offer((HEAD, BIG, BIG), unsized).num_unsized == 1
    assert Offer((HEAD, BIG, BIG, BIG), unsized).num_unsized == 0


@pytest.mark.parametrize(
    ("offer", "gpus", "text"),
    [
        (Offer((HEAD,)), 0, "2 CPUs"),
        (Offer((HEAD,)), 1, "2 CPUs and 0 GPUs"),
        (
            Offer((HEAD, BIG, SMALL)),
            1,
            "14 CPUs and 5 GPUs on 3 nodes (none with more than 8 CPUs or 4 GPUs)",
        ),
        (
            Offer((HEAD,), Growth((NodeGroup("a", BIG, 3), NodeGroup("b", SMALL, 1)), 2)),
            1,
            "2 CPUs and 0 GPUs now, and can grow to 14 CPUs and 5 GPUs (autoscaler: up to 3 of 8 CPUs and 1 "
            "GPU, 1 of 4 CPUs and 4 GPUs, 2 in all)",
        ),
        (
            Offer((HEAD,), Growth((NodeGroup("a", None, 2),), 2)),
            0,
            "2 CPUs now, and 2 nodes of unknown size may join",
        ),
        (Offer((HEAD,), Growth((), 0)), 0, "2 CPUs now, and its autoscaler may start no more"),
    ],
)
def test_an_offer_in_words(offer: Offer, gpus: float, text: str) -> None:
    assert offer.describe(1, gpus) == text


def test_only_nodes_of_one_accelerator_count() -> None:
    l4, h100 = Node(8, 1, accelerator_type="L4"), Node(16, 8, accelerator_type="H100")
    growth = Growth((NodeGroup("small", l4, 4), NodeGroup("big", h100, 2)), 6)
    offer = Offer((HEAD, l4, h100), growth)
    assert offer.room(1, 1) == 2 * 8 + 4 * 1
    assert offer.only("L4").room(1, 1) == 4
    assert offer.only("H100").room_now(1, 1) == 8
    assert offer.only("A100").room(1, 1) == 0
    assert offer.only("A100").describe(1, 1).startswith("0 CPUs and 0 GPUs on 3 nodes")


def test_a_trial_asks_for_its_accelerator(study: StudyConfig) -> None:
    tree = study.model_dump(mode="json")
    tree["resources"].update(accelerator_type="L4", gpus_per_worker="auto", max_concurrent_trials="auto")
    wanted = StudyConfig.model_validate(tree)
    offer = Offer((HEAD,), Growth((NodeGroup("a", Node(8, 1, accelerator_type="L4"), 3),), 3))
    plan = plan_resources(wanted, offer, where="the cluster")
    assert (plan.gpus_per_worker, plan.max_concurrent_trials) == (1, 3)
    assert plan.needs == "1 worker x 1 CPU + 1 GPU (L4)"
    assert _trial_resources(plan).bundles == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:L4": 0.001}]
    tree["resources"]["accelerator_type"] = "H100"
    other = StudyConfig.model_validate(tree)
    with pytest.raises(ResourceError, match=r"the cluster, counting only nodes with H100, offers 0 CPUs"):
        plan_resources(other, offer, where="the cluster")
    tree["resources"]["gpus_per_worker"] = 0
    with pytest.raises(ValueError, match="gpus_per_worker = 0 asks for none"):
        StudyConfig.model_validate(tree)


@pytest.mark.parametrize(("gpus", "frac"), [(0.25, 0.25), (1.0, 1.0), (4.0, 1.0)])
def test_a_part_of_a_gpu_has_a_part_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, gpus: float, frac: float
) -> None:
    import torch

    told = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    limit_memory(torch.device("cpu"), 0.0)
    limit_memory(torch.device("cuda", 0), gpus)
    assert told == [(frac, torch.device("cuda", 0))]


# --- where the limits are read ------------------------------------------------------------------------


def ray_up_file(**changes: Any) -> dict[str, Any]:
    """As `ray up` leaves it on the head node."""
    return {
        "cluster_name": "lab",
        "max_workers": 5,
        "head_node_type": "head",
        "auth": {"ssh_private_key": "a secret"},
        "available_node_types": {
            "head": {"resources": {"CPU": 2}, "node_config": {"Image": "x"}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "min_workers": 0, "max_workers": 4},
            "cpu": {"resources": {"CPU": 16, "memory": 1e9}, "node_config": {}},
        },
        **changes,
    }


def test_growth_from_a_file_of_ray_up() -> None:
    assert autoscaler.growth_of_file(ray_up_file()) == Growth(
        # the head's own kind is not started again; a kind without a limit has the cluster's
        (NodeGroup("gpu", Node(8, 1), 4), NodeGroup("cpu", Node(16, 0), 5)),
        5,
    )


def test_growth_of_machines_of_ones_own_has_no_size() -> None:
    local = {
        "max_workers": 2,
        "head_node_type": "local.cluster.node",
        "available_node_types": {"local.cluster.node": {"resources": {}, "max_workers": 2}},
    }
    assert autoscaler.growth_of_file(local) == Growth((NodeGroup("local.cluster.node", None, 2),), 2)


def test_growth_from_the_control_store() -> None:
    config = autoscaler_pb2.ClusterConfig()
    for name, resources, most in (("head", {"CPU": 2}, 1), ("gpu", {"CPU": 8, "GPU": 1}, -1), ("no", {}, 0)):
        config.node_group_configs.add(name=name, resources=resources, max_count=most)
    found = autoscaler.growth_of_report(config)
    assert found == Growth(
        (NodeGroup("head", Node(2, 0), 1), NodeGroup("gpu", Node(8, 1), autoscaler.UNLIMITED)),
        autoscaler.UNLIMITED + 1,
        with_head=True,
    )
    assert autoscaler.growth_of_report(autoscaler_pb2.ClusterConfig()) is None


def test_the_file_is_found_by_the_autoscalers_process(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(ray_up_file(), sort_keys=False))
    (tmp_path / "monitor.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / "monitor.py"),
            "--gcs-address=10.1.2.3:61234",
            f"--autoscaling-config={tmp_path}/config.yaml",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        process.stdout.readline()
        found = autoscaler.config_on_this_node("head.lab:61234")
        assert autoscaler.config_on_this_node("head.lab:61235") is None, "another cluster's"
    finally:
        process.kill()
        process.communicate()
    assert autoscaler.growth_of_file(found) == autoscaler.growth_of_file(ray_up_file())
    assert "secret" not in str(found)


def ray_cluster(*, autoscaling: bool) -> dict[str, Any]:
    """A RayCluster object, as far as Ray's own translation reads it."""

    def pod(**limits: Any) -> dict[str, Any]:
        return {"spec": {"containers": [{"resources": {"limits": limits, "requests": limits}}]}}

    return {
        "metadata": {"name": "lab", "namespace": "ml"},
        "spec": {
            "enableInTreeAutoscaling": autoscaling,
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod(cpu="2", memory="4Gi")},
            "workerGroupSpecs": [
                {
                    "groupName": "gpu",
                    "replicas": 0,
                    "minReplicas": 0,
                    "maxReplicas": 3,
                    "numOfHosts": 2,
                    "rayStartParams": {},
                    "template": pod(**{"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": "1"}),
                }
            ],
        },
    }


@pytest.mark.parametrize("autoscaling", [True, False])
def test_growth_from_kuberay(monkeypatch: pytest.MonkeyPatch, autoscaling: bool) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    asked = []

    class Client:
        def __init__(self, namespace: str) -> None:
            asked.append(namespace)

        def get(self, path: str) -> dict[str, Any]:
            asked.append(path)
            return ray_cluster(autoscaling=autoscaling)

    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Client)
    for name, value in (
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
        ("RAY_CLUSTER_NAME", "lab"),
        ("RAY_CLUSTER_NAMESPACE", "ml"),
    ):
        monkeypatch.setenv(name, value)
    found = autoscaler.config_on_this_node("head:1")
    assert asked == ["ml", "rayclusters/lab"]
    if autoscaling:
        assert autoscaler.growth_of_file(found) == Growth((NodeGroup("gpu", Node(8, 1), 6),), 6)
    else:
        assert found is None


def test_what_cannot_be_read_counts_as_no_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Growth:
        raise PermissionError("403")

    growth = Growth((), 0)
    monkeypatch.setattr(autoscaler, "_from_control_store", broken)
    monkeypatch.setattr(autoscaler, "_from_head_node", lambda: growth)
    assert autoscaler.read_growth() is growth
    monkeypatch.setattr(autoscaler, "_from_head_node", broken)
    assert autoscaler.read_growth() is None


# --- the wait -----------------------------------------------------------------------------------------


def test_the_watch_counts_only_while_nothing_runs() -> None:
    watch = PlacementWatch(60, "2 workers x 1 CPU + 1 GPU")
    assert not watch.saw(pending=True, running=False, now=0)
    assert not watch.saw(pending=True, running=False, now=60)
    assert watch.saw(pending=True, running=False, now=61)
    assert not watch.saw(pending=True, running=True, now=62), "one runs: the others wait for its place"
    assert not watch.saw(pending=True, running=False, now=100)
    assert not watch.saw(pending=False, running=False, now=161), "nothing waits"
    assert not watch.saw(pending=True, running=False, now=162)
    assert watch.saw(pending=True, running=False, now=223)
    offer = describe_offer(Offer((HEAD, BIG), free=Node(3, 1)), 1, 1)
    assert str(watch.error(offer)) == (
        "resources: a trial of 2 workers x 1 CPU + 1 GPU was not placed within placement_timeout_s = 60 s; "
        "the cluster offers 10 CPUs and 1 GPU on 2 nodes (none with more than 8 CPUs or 1 GPU); 3 CPUs and 1 "
        "GPU of it free at the moment. Wait until others are done or nodes have joined and give the same "
        "command again, ask for less, or raise resources.placement_timeout_s"
    )


def test_ray_tells_which_node_is_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from raydisp.cluster import session

    nodes = [
        {"Alive": True, "Resources": {"CPU": 2.0, "node:__internal_head__": 1.0, "memory": 3e9}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 9e9}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    fake = SimpleNamespace(nodes=lambda: nodes, available_resources=lambda: {"CPU": 7.0})
    monkeypatch.setattr(ray, "nodes", fake.nodes)
    monkeypatch.setattr(ray, "available_resources", fake.available_resources)
    assert session.read_offer(can_grow=False) == Offer((HEAD, BIG), None, Node(7, 0), head_memory_bytes=3e9)
