"""A cluster with no place for a trial: its wait ends in time, with numbers, and nothing is left of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import run_command, start_command
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.state import list_placement_groups
from test_on_ray import attempts_of, left_on_cluster, wait_for, write

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def held(address: str) -> Iterator[PlacementGroup]:
    """One of the two CPUs is taken by somebody else."""
    group = placement_group([{"CPU": 1}], name="somebody else")
    assert group.wait(30)
    yield group
    remove_placement_group(group)


NOBODYS = {"actors": [], "placement_groups": ["somebody else"]}


def two_workers(tree: dict[str, Any], tmp_path: Path, **resources: Any) -> Path:
    tree["resources"] = {"num_workers": 2, "cpus_per_worker": 1, **resources}
    tree["search"]["num_trials"] = 1
    tree["search"]["space"] = {"dispersion.weight": [0.3, 1.0]}
    return write(tree, tmp_path / "out")


def test_workers_that_find_no_place_are_a_failed_trial(
    tree: dict[str, Any], tmp_path: Path, address: str, held: PlacementGroup
) -> None:
    path = two_workers(tree, tmp_path, placement_timeout_s=5)
    done = run_command(path, "--address", address)
    assert done.returncode == 1, done.stderr
    for row in attempts_of(tree):
        assert (row["status"], row["attempt"], row["error_type"]) == ("failed", 1, "PlacementTimeout")
        assert row["error_message"].startswith(
            "resources: a trial of 2 workers x 1 CPU was not placed within placement_timeout_s = 5 s; the "
            "cluster offers 2 CPUs; 1 CPU of it free at the moment. "
        )
        assert 5 < (row["ended_at"] - row["started_at"]).total_seconds() < 40
    assert "Traceback" not in done.stdout + done.stderr
    assert left_on_cluster() == NOBODYS


def pending_groups() -> int:
    here = ray.get_runtime_context().gcs_address
    return sum(group.state == "PENDING" for group in list_placement_groups(address=here))


def test_workers_that_wait_get_their_place_or_are_given_up(
    tree: dict[str, Any], tmp_path: Path, address: str, held: PlacementGroup
) -> None:
    """Ctrl-C while the workers wait; then the same command, which goes on once there is a place."""
    path = two_workers(tree, tmp_path)
    for stops in (True, False):
        process = start_command(path, "--address", address)
        try:
            wait_for(pending_groups)
            if stops:
                process.send_signal(signal.SIGINT)
            else:
                remove_placement_group(held)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == (130 if stops else 0), out + err
        assert left_on_cluster() == (NOBODYS if stops else {"actors": [], "placement_groups": []})
    rows = attempts_of(tree)
    assert [(row["trial"], row["attempt"], row["status"]) for row in rows] == [
        (0, 1, "interrupted"),
        (0, 2, "completed"),
        (1, 1, "completed"),
    ]


def test_token_blocks_that_find_no_place_are_an_error(
    tree: dict[str, Any], tmp_path: Path, address: str, held: PlacementGroup
) -> None:
    rest = placement_group([{"CPU": 1}])
    assert rest.wait(30)
    tree["resources"] = {"placement_timeout_s": 3}
    try:
        done = run_command(write(tree, tmp_path / "out"), "--address", address)
    finally:
        remove_placement_group(rest)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "resources: a task of 1 CPU, to make the token blocks, was not placed within placement_timeout_s = 3 "
        "s; the cluster offers 2 CPUs; 0 CPUs of it free at the moment. "
    )
    assert not (tmp_path / "out" / "tiny" / "study.yaml").exists(), "it can be mended"
