"""The row of an attempt names the hosts of its workers while it runs, and keeps them however it ends."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from test_worker import assign

from raydisp import results
from raydisp.config import StudyConfig
from raydisp.parallel import Layout
from raydisp.search import space
from raydisp.trial import attempts as worker
from raydisp.trial.assignment import Assignment, blank_row
from raydisp.trial.attempts import run_attempt, tell_hosts


def begin(tree: dict[str, Any], tmp_path: Path) -> tuple[Assignment, StudyConfig]:
    """An attempt of two workers that has begun: its row is there."""
    tree["resources"] = {"num_workers": [1, 2]}
    assignment = assign(tree, tmp_path, str(tmp_path / "cache"))
    study = StudyConfig.model_validate(assignment.study)
    row = blank_row(assignment, study, time.time())
    results.write_trial(assignment.study_dir, row, space.column_types(study))
    return assignment, study


def hosts_in_the_row(assignment: Assignment) -> tuple[str, int]:
    row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
    assert row is not None
    return row["hostname"], row["world_size"]


def _worker(rank: int, port: int, assignment: dict[str, Any]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker.socket = SimpleNamespace(gethostname=lambda: f"host-{rank}")  # type: ignore[attr-defined]
    told = Assignment(**assignment)
    try:
        tell_hosts(told, StudyConfig.model_validate(told.study), Layout(rank, 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_workers_tell_where_they_are(tree: dict[str, Any], tmp_path: Path) -> None:
    assignment, _ = begin(tree, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, dataclasses.asdict(assignment)), nprocs=2)
    assert hosts_in_the_row(assignment) == ("host-0, host-1", 2)


def test_one_worker_of_a_range_is_one(tree: dict[str, Any], tmp_path: Path) -> None:
    assignment, study = begin(tree, tmp_path)
    assert hosts_in_the_row(assignment)[1] == 2, "as many as there may be, until it is known"
    tell_hosts(assignment, study, Layout(0, 1))
    assert hosts_in_the_row(assignment) == (socket.gethostname(), 1)


def test_an_attempt_that_has_ended_is_left_as_it_is(tree: dict[str, Any], tmp_path: Path) -> None:
    assignment, study = begin(tree, tmp_path)
    row = results.read_trial(assignment.study_dir, assignment.trial, 1)
    row |= {"ended_at": results.now(), "hostname": "elsewhere"}
    results.write_trial(assignment.study_dir, row, space.column_types(study))
    tell_hosts(assignment, study, Layout(0, 1))
    assert hosts_in_the_row(assignment)[0] == "elsewhere"


def test_a_row_that_cannot_be_written_does_not_end_the_training(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assignment, study = begin(tree, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_trial", full)
    tell_hosts(assignment, study, Layout(0, 1))
    assert "its row does not name its hosts: [Errno 28]" in caplog.text


@pytest.mark.parametrize("told", [True, False])
def test_the_driver_keeps_what_the_workers_told(
    told: bool, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver, on the head, writes how the attempt ended: by a lost worker, here."""
    assignment, _ = begin(tree, tmp_path)

    def lose_a_worker(assignment: Assignment, study: StudyConfig, *_: Any) -> dict[str, Any]:
        if told:
            row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
            row |= {"hostname": "worker-1, worker-2", "world_size": 1}
            results.write_trial(assignment.study_dir, row, space.column_types(study))
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(worker, "_place", lose_a_worker)
    row = run_attempt(assignment, lambda report: None)
    assert (row["status"], row["error_type"]) == ("interrupted", "WorkerLost")
    expected = ("worker-1, worker-2", 1) if told else (socket.gethostname(), 2)
    assert (row["hostname"], row["world_size"]) == expected
    assert hosts_in_the_row(assignment) == expected
