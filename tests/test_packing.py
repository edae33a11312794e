"""Where Ray puts the workers of one trial: on one node where they fit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from aws_server import free_port
from conftest import start_command
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from test_failures import long_study
from test_on_ray import wait_for


def nodes_of_workers() -> list[str] | None:
    """Nodes of the two workers of the trial that runs; None: they have no place yet."""
    for group in placement_group_table().values():
        if group["state"] == "CREATED" and len(group["bundles"]) == 2:
            return list(group["bundles_to_node_id"].values())
    return None


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_workers_of_a_trial_share_a_node_where_they_fit(tree: dict[str, Any], tmp_path: Path) -> None:
    """One of them would fit on either of the small nodes; both together only on the large one."""
    path = long_study(tree, tmp_path, 1500, num_workers=2, max_concurrent_trials=1)
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
        cluster.add_node(num_cpus=1)
        large = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        process = start_command(path, "--address", cluster.address)
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
            assert wait_for(nodes_of_workers) == [large.node_id] * 2
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            ray.shutdown()
            process.kill()
    finally:
        cluster.shutdown()
    assert process.returncode == 130, err
