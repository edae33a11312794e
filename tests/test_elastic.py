"""Trials that may have fewer workers than they would like: the same batch, the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aws_server import free_port
from conftest import start_command
from pydantic import ValidationError
from ray.cluster_utils import Cluster
from test_failures import check_rows, long_study, replay_is_certain, undisturbed, weights_of
from test_on_ray import wait_for

from raydisp import results
from raydisp.cluster.capacity import Node, Offer
from raydisp.cluster.elastic import PATIENCE_S, choose_num_workers
from raydisp.cluster.packing import plan_resources
from raydisp.config import StudyConfig
from raydisp.config.resources import ResourcesConfig
from raydisp.errors import ResourceError


@pytest.mark.parametrize(
    ("num_workers", "rooms", "again", "chosen", "waited"),
    [
        (4, [0], False, 4, 0),  # a fixed number asks for nothing else
        ([2, 4], [4], False, 4, 0),
        ([2, 4], [9], False, 4, 0),
        ([2, 4], [3, 3, 4], False, 4, 4),  # it waits for the last one
        ([2, 8], [5], False, 4, PATIENCE_S),  # 5 cannot share a batch of 8
        ([2, 4], [0], False, 4, 0),  # an autoscaler must learn of it
        ([2, 4], [0, 1, 4], True, 4, 4),
        ([1, 2], [0, 1], True, 1, PATIENCE_S),  # the other one is gone for good
        ([2, 4], [1], True, 4, PATIENCE_S),
    ],
)
def test_as_many_as_there_is_room_for(
    num_workers: Any, rooms: list[int], again: bool, chosen: int, waited: float
) -> None:
    clock = [0.0]
    looks = iter(rooms)
    room = [0]

    def look(accelerator_type: str | None) -> list[Node]:
        room[0] = next(looks, room[0])
        return [Node(1, 0)] * room[0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    found = choose_num_workers(
        ResourcesConfig(num_workers=num_workers),
        8,
        0.0,
        again=again,
        free_nodes=look,
        sleep=sleep,
        now=lambda: clock[0],
    )
    assert (found, clock[0]) == (chosen, waited)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resources.num_workers": [2, 2]}, "is no range; give"),
        ({"resources.num_workers": [4, 2]}, "is no range; give"),
        ({"resources.num_workers": [0, 2]}, "greater than or equal to 1"),
        ({"resources.num_workers": [1, 2, 4]}, "at most 2"),
        ({"resources.num_workers": [1, 3]}, "num_workers = 3 cannot share"),
        ({"resources.num_workers": [1, 2], "train.strategy": "fsdp"}, "or at least 2 workers"),
    ],
)
def test_ranges_that_are_none(tree: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    for name, value in changes.items():
        part, field = name.split(".")
        tree[part][field] = value
    with pytest.raises(ValidationError, match=message):
        StudyConfig.model_validate(tree)


def test_the_plan_counts_full_trials_where_one_fits(tree: dict[str, Any]) -> None:
    tree["resources"] = {"num_workers": [2, 4]}
    study = StudyConfig.model_validate(tree)

    def planned(cpus: int) -> Any:
        return plan_resources(study, Offer((Node(cpus, 0, is_head=True),)), where="this machine")

    assert planned(8).describe() == (
        "2 to 4 workers x 1 CPU per trial (its driver takes no CPU), 2 trials at a time"
    )
    assert planned(3).max_concurrent_trials == 1
    with pytest.raises(ResourceError, match=r"a trial of 2 workers x 1 CPU needs 2 CPUs"):
        planned(1)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_trial_goes_on_with_one_worker_where_two_began(tree: dict[str, Any], tmp_path: Path) -> None:
    path = long_study(tree, tmp_path, 360, num_workers=[1, 2], max_concurrent_trials=1)
    folder = tmp_path / "out" / "tiny"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": free_port(),
        },
    )
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = start_command(path, "--address", cluster.address)
        try:
            wait_for(lambda: replay_is_certain(folder, 0))
            cluster.remove_node(other, allow_graceful=False)
            _, err = process.communicate(timeout=400)
        finally:
            process.kill()
    finally:
        cluster.shutdown()
    assert process.returncode == 0, err
    rows = results.read_tables(str(folder)).attempts.to_pylist()
    assert [(row["trial"], row["attempt"], row["world_size"], row["status"]) for row in rows] == [
        (0, 1, 2, "interrupted"),
        (0, 2, 1, "completed"),
        (1, 1, 1, "completed"),
    ]
    tree["resources"] = {}
    for trial, weight in weights_of(folder).items():
        (tmp_path / str(trial)).mkdir()
        reference = undisturbed(tree, tmp_path / str(trial), weight)
        # The same global batch on two workers and on one: the sums are of another order.
        check_rows(folder, trial, 2 - trial, reference, rel=1e-4)
