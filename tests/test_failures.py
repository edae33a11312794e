"""The kill matrix: whatever is killed, the trial goes on from its last checkpoint and loses nothing.

Every kill comes after a trial's first checkpoint, and after rows of at least two steps past it were written,
so that something is really replayed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import start_command
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from test_on_ray import left_on_cluster, wait_for, write
from test_parallel import run_two
from test_worker import assign

from raydisp import results
from raydisp.config import StudyConfig, replace_fields
from raydisp.trial.attempts import run_attempt

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CHECKPOINT_EVERY, EVALUATE_EVERY = 72, 18
Row = dict[str, Any]


def long_study(tree: dict[str, Any], tmp_path: Path, num_steps: int, **resources: Any) -> Path:
    """A baseline and one trial, long enough to be killed in the middle."""
    tree["train"].update(budget_tokens=128 * num_steps, learning_rate=2e-3)
    tree["search"]["num_trials"] = 1
    tree["search"]["space"] = {"dispersion.weight": [0.3, 1.0]}
    tree["evaluate"].update(every_tokens=128 * EVALUATE_EVERY, max_tokens=64)
    tree["checkpoint"] = {"every_tokens": 128 * CHECKPOINT_EVERY}
    tree["resources"] = resources
    return write(tree, tmp_path / "out")


def ray_processes(title: str) -> list[psutil.Process]:
    """Those of this test's own Ray, whose raylet is a child of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def latest(folder: Path, pattern: str) -> int:
    return max((int(re.findall(r"\d{8}", str(path))[0]) for path in folder.glob(pattern)), default=-1)


def reached(folder: Path, trial: int) -> tuple[int, int]:
    """Steps of a trial's last whole checkpoint and of its last written rows."""
    name = f"trial-{trial:05d}"
    return (
        latest(folder / "checkpoints" / name, "step-*/COMPLETE"),
        latest(folder / "steps" / name, "until-*.parquet"),
    )


def replay_is_certain(folder: Path, trial: int, beyond: int = 0) -> tuple[int, int] | None:
    """(checkpoint, rows) of a trial once rows past a checkpoint later than `beyond` are there."""
    saved, written = reached(folder, trial)
    return (saved, written) if saved > beyond and written >= saved + EVALUATE_EVERY else None


def check_rows(folder: Path, trial: int, num_attempts: int, reference: list[float], rel: float) -> None:
    num_steps = len(reference)
    tables = results.read_tables(str(folder))
    attempts = [row for row in tables.attempts.to_pylist() if row["trial"] == trial]
    assert [row["attempt"] for row in attempts] == list(range(1, num_attempts + 1))
    assert [row["status"] for row in attempts] == ["interrupted"] * (num_attempts - 1) + ["completed"]
    assert (attempts[-1]["resumed_step"] > 0) == (num_attempts > 1), "it did not begin anew"
    steps = [row for row in tables.steps.to_pylist() if row["trial"] == trial]
    assert [row["step"] for row in steps] == list(range(1, num_steps + 1)), "no step lost, none doubled"
    assert {row["attempt"] for row in steps} == set(range(1, num_attempts + 1))
    for row in steps:
        if row["step"] > attempts[-1]["resumed_step"]:
            assert row["attempt"] == num_attempts
    evals = [row for row in tables.evals.to_pylist() if row["trial"] == trial and row["name"] == "loss"]
    assert [row["step"] for row in evals] == list(range(0, num_steps + 1, EVALUATE_EVERY))
    assert [row["loss"] for row in steps] == pytest.approx(reference, rel=rel, abs=0)
    assert not (folder / "checkpoints" / f"trial-{trial:05d}").exists()


def undisturbed(tree: dict[str, Any], tmp_path: Path, weight: float) -> list[float]:
    """Losses of a trial of one worker that nobody kills, trained in this process."""
    alone = tmp_path / "alone"
    assignment = assign(tree, alone, str(tmp_path / "cache"), values={"dispersion.weight": weight})
    assert run_attempt(assignment, lambda report: None)["status"] == "completed"
    return results.read_tables(assignment.study_dir).steps["loss"].to_pylist()


def weights_of(folder: Path) -> dict[int, float]:
    rows = results.read_tables(str(folder)).trials.to_pylist()
    return {row["trial"]: json.loads(row["config_json"])["dispersion"]["weight"] for row in rows}


def kill_one(title: str, wait_gone: bool = True) -> None:
    victims = ray_processes(title)
    assert victims, f"no process {title}"
    victims[-1].kill()
    if wait_gone:
        psutil.wait_procs(victims[-1:], timeout=20)


def test_a_trial_of_one_worker_is_killed_twice(tree: dict[str, Any], tmp_path: Path, address: str) -> None:
    """The process of such a trial is its worker and its driver in one."""
    path = long_study(tree, tmp_path, 720, max_concurrent_trials=1)
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", address)
    try:
        first, _ = wait_for(lambda: replay_is_certain(folder, 1))
        kill_one("ray::ImplicitFunc")
        wait_for(lambda: replay_is_certain(folder, 1, beyond=first))
        kill_one("ray::ImplicitFunc")
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    lost = [row for row in results.read_tables(str(folder)).attempts.to_pylist() if row["error_type"]]
    assert [(row["trial"], row["error_type"]) for row in lost] == [(1, "ProcessLost")] * 2
    assert all(row["ended_at"] for row in lost)
    # bitwise: one process of one thread
    check_rows(folder, 1, 3, undisturbed(tree, tmp_path, weights_of(folder)[1]), rel=0)
    assert left_on_cluster() == {"actors": [], "placement_groups": []}


def test_a_trial_that_is_lost_too_often_fails(tree: dict[str, Any], tmp_path: Path, address: str) -> None:
    path = long_study(tree, tmp_path, 720, max_concurrent_trials=1)
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", address, "--set", "failures.max_failures=0")
    try:
        wait_for(lambda: replay_is_certain(folder, 0))
        kill_one("ray::ImplicitFunc")
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, err
    rows = results.read_tables(str(folder)).attempts.to_pylist()
    assert [(row["trial"], row["attempt"], row["status"]) for row in rows] == [
        (0, 1, "failed"),
        (1, 1, "completed"),
    ]
    assert "1 completed, 1 failed (trial 0: the trial's process ended without a word" in out


def test_workers_and_drivers_of_two_worker_trials_are_killed(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Trial 0 loses a worker; trial 1 its driver, and then a worker too."""
    path = long_study(tree, tmp_path, 288, num_workers=2)
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", address)
    try:
        wait_for(lambda: replay_is_certain(folder, 0))
        (cleaner,) = ray_processes("ray::PlacementGroupCleaner")
        assert cleaner.environ()["RAY_ADDRESS"] == address, "it knows its own Ray where there are others"
        assert not ray_processes("ray::DatasetManager"), "no trial has Ray datasets"
        kill_one("ray::RayTrainWorker")
        first, _ = wait_for(lambda: replay_is_certain(folder, 1))
        kill_one("ray::ImplicitFunc")
        wait_for(lambda: replay_is_certain(folder, 1, beyond=first))
        kill_one("ray::RayTrainWorker")
        _, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, err
    rows = results.read_tables(str(folder)).attempts.to_pylist()
    assert [(row["trial"], row["attempt"], row["error_type"]) for row in rows] == [
        (0, 1, "WorkerLost"),
        (0, 2, None),
        (1, 1, "ProcessLost"),
        (1, 2, "WorkerLost"),
        (1, 3, None),
    ]
    study = StudyConfig.model_validate(tree)
    for trial, weight in weights_of(folder).items():
        alone = tmp_path / f"two-{trial}"
        alone.mkdir()
        changed = replace_fields(study.trial, {"dispersion.weight": weight, "checkpoint.every_tokens": None})
        reference = run_two(changed, str(tmp_path / "cache"), alone)[0]["losses"]
        # the same layout: the same sums in the same order
        check_rows(folder, trial, 2 + trial, reference, rel=1e-6)
    assert left_on_cluster() == {"actors": [], "placement_groups": []}


def drain(address: str, node_id: str) -> None:
    """What a cloud's notice makes Ray do: the node goes in ten minutes."""
    accepted, why_not = GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "taken back",
        int((time.time() + 600) * 1000),
    )
    assert accepted, why_not


def test_a_node_that_gives_notice_and_a_node_that_is_lost(tree: dict[str, Any], tmp_path: Path) -> None:
    """Three nodes, a trial on each: one gives notice, one dies, and both trials go on on the third."""
    long_study(tree, tmp_path, 1500)
    tree["search"]["num_trials"] = 2
    path = write(tree, tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
    )
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        process = start_command(path, "--address", cluster.address)
        try:
            wait_for(lambda: all(replay_is_certain(folder, trial) for trial in range(3)))
            drain(cluster.address, others[0].node_id)
            preempted = wait_for(rows_with(folder, "PreemptedError"))
            cluster.remove_node(others[1], allow_graceful=False)
            lost = wait_for(rows_with(folder, "ProcessLost"))
            _, err = process.communicate(timeout=400)
        finally:
            process.kill()
    finally:
        cluster.shutdown()
    assert process.returncode == 0, err
    assert "its node is taken away at " in preempted[0]["error_message"]
    assert preempted[0]["trial"] != lost[0]["trial"]
    tables = results.read_tables(str(folder))
    assert [row["status"] for row in tables.trials.to_pylist()] == ["completed"] * 3
    assert {row["trial"]: row["attempt"] for row in tables.trials.to_pylist()} == {
        trial: 2 if trial in (preempted[0]["trial"], lost[0]["trial"]) else 1 for trial in range(3)
    }
    for trial in range(3):
        steps = [row["step"] for row in tables.steps.to_pylist() if row["trial"] == trial]
        assert steps == list(range(1, 1501)), "no step lost, none doubled"
    # Notice was given: nothing had to be replayed.
    again = next(row for row in tables.trials.to_pylist() if row["trial"] == preempted[0]["trial"])
    stopped_at = int(re.findall(r"after step (\d+)", preempted[0]["error_message"])[0])
    assert again["resumed_step"] == stopped_at


def rows_with(folder: Path, error_type: str) -> Callable[[], list[Row]]:
    def find() -> list[Row]:
        rows = results.read_tables(str(folder)).attempts.to_pylist()
        return [row for row in rows if row["error_type"] == error_type]

    return find
