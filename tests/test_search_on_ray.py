"""Searches on a real Ray: trials that are stopped, drivers that are killed, studies side by side."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import ray
from conftest import run_command, start_command
from optuna.trial import TrialState
from test_on_ray import attempts_of, descendants, left_on_cluster, wait_for, write

from raydisp import data, results
from raydisp.config import StudyConfig
from raydisp.search.curves import of_metric, read_curves

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RUNGS = (512, 1024)


@pytest.fixture
def halving(tree: dict[str, Any]) -> dict[str, Any]:
    """Ten steps; a learning rate of almost nothing loses at every rung."""
    tree["search"] = {
        "num_trials": 6,
        "space": {
            "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
            "train.learning_rate": [1e-2, 1e-6],
        },
        "points_to_evaluate": [{"train.learning_rate": rate} for rate in (1e-2, 1e-2, 1e-6, 1e-6, 1e-6)],
        "scheduler": {"asha": {"grace_tokens": 512, "reduction_factor": 2}},
    }
    tree["resources"] = {}
    return tree


def optuna_study(tree: dict[str, Any]) -> optuna.Study:
    return optuna.load_study(
        study_name=tree["name"], storage=f"sqlite:///{tree['output']}/{tree['name']}/optuna.db"
    )


def curves_of(tree: dict[str, Any]) -> dict[int, Any]:
    evals = results.read_table(f"{tree['output']}/{tree['name']}", "evals")
    return read_curves(evals, before_tokens=1280)


def test_asha_stops_trials_and_the_next_wave_starts(
    halving: dict[str, Any], tmp_path: Path, address: str
) -> None:
    path = write(halving, tmp_path / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    rows = attempts_of(halving)
    assert [row["trial"] for row in rows] == list(range(7))
    slow = [row for row in rows if row["trial"] and row["train.learning_rate"] == 1e-6]
    assert len(slow) >= 3
    assert {row["status"] for row in slow} == {"pruned"}
    assert rows[0]["status"] == "completed", "the baseline is never stopped"
    steps = results.read_table(f"{tmp_path}/out/tiny", "steps").to_pylist()
    curves = curves_of(halving)
    for row in rows:
        mine = [step["step"] for step in steps if step["trial"] == row["trial"]]
        assert mine == list(range(1, row["num_steps"] + 1))
        assert row["num_tokens"] == 128 * row["num_steps"]
        assert row["error_type"] is None
        if row["status"] == "pruned":
            assert row["num_tokens"] in RUNGS
            assert row["val_loss"] is None
            assert row["train_s"] is not None
        else:
            assert row["num_tokens"] == 1280
    # The schedule of the learning rate belongs to the full budget, whoever is stopped.
    rates = {
        number: [step["learning_rate"] for step in steps if step["trial"] == number][:4] for number in (0, 1)
    }
    assert rates[0] == rates[1]
    trials = optuna_study(halving).trials
    states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    assert [trial.state for trial in trials] == [states[row["status"]] for row in rows[1:]]
    for trial in trials:
        curve = dict(of_metric(curves[trial.user_attrs["trial"]], "val_loss"))
        assert trial.intermediate_values == curve, "at their tokens"
        if trial.state == TrialState.PRUNED:
            assert trial.value == curve[max(curve)]
    assert left_on_cluster() == {"actors": [], "placement_groups": []}
    again = run_command(path, "--address", address)
    assert again.returncode == 0
    assert "done already" in again.stdout
    assert attempts_of(halving) == rows


def test_trials_of_two_workers_are_stopped_too(halving: dict[str, Any], tmp_path: Path, address: str) -> None:
    halving["search"].update(
        num_trials=2, points_to_evaluate=[{"train.learning_rate": rate} for rate in (1e-2, 1e-6)]
    )
    halving["resources"] = {"num_workers": 2}
    done = run_command(write(halving, tmp_path / "out"), "--address", address)
    assert done.returncode == 0, done.stderr
    rows = attempts_of(halving)
    assert [(row["status"], row["num_tokens"]) for row in rows] == [
        ("completed", 1280),
        ("completed", 1280),
        ("pruned", 512),
    ]
    assert left_on_cluster() == {"actors": [], "placement_groups": []}


def test_missing_objectives_leave_no_trial_running(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """A loss that is not a number beside a speed that is, a trial that raises, one that is well."""
    tree["model"]["hidden_size"] = 24
    tree["train"].update(on_nonfinite="skip_step")
    tree["search"] = {
        "num_trials": 4,
        "num_startup_trials": 1,
        "objective": [{"metric": "val_loss"}, {"metric": "tokens_per_s"}],
        "space": {
            "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
            "train.learning_rate": [1e-2, 1e30],
            "model.hidden_size": [24, 16],
            "model.num_heads": [2, 3],  # 3 does not divide 16
        },
        "points_to_evaluate": [
            {"train.learning_rate": 1e30, "model.num_heads": 2},
            {"train.learning_rate": 1e-2, "model.hidden_size": 16, "model.num_heads": 3},
            {"train.learning_rate": 1e-2, "model.num_heads": 2},
        ],
    }
    done = run_command(write(tree, tmp_path / "out"), "--address", address)
    assert done.returncode == 1, done.stderr
    rows = attempts_of(tree)
    assert [row["status"] for row in rows[:4]] == ["completed", "completed", "failed", "completed"]
    assert rows[1]["val_loss"] is None
    assert rows[1]["tokens_per_s"] > 0
    assert rows[1]["num_skipped_steps"] > 0
    assert "is not a multiple of num_heads" in rows[2]["error_message"]
    trials = optuna_study(tree).trials
    assert len(trials) == 4
    assert TrialState.RUNNING not in {trial.state for trial in trials}
    assert [trial.state for trial in trials[:3]] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    assert trials[2].values == [rows[3]["val_loss"], rows[3]["tokens_per_s"]]
    assert "Pareto front over val_loss (min), tokens_per_s (max): trial" in done.stdout


def test_a_trial_that_finds_no_place_ends_the_study_with_numbers(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Somebody else has both CPUs; the token blocks are there already, so that only the trial waits."""
    study = StudyConfig.model_validate(tree)
    data.prepare(study.trial, str(tmp_path / "out" / ".cache"))
    tree["resources"] = {"placement_timeout_s": 4.0}
    path = write(tree, tmp_path / "out")
    taken = ray.util.placement_group([{"CPU": 2}])
    ray.get(taken.ready(), timeout=60)
    try:
        done = run_command(path, "--address", address)
    finally:
        ray.util.remove_placement_group(taken)
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert "a trial of 1 worker x 1 CPU was not placed within placement_timeout_s = 4 s" in sentence
    assert "the cluster offers 2 CPUs" in sentence
    assert "0 CPUs of it free at the moment" in sentence
    assert "Traceback" not in done.stderr
    assert attempts_of(tree) == []
    assert left_on_cluster() == {"actors": [], "placement_groups": []}
    assert run_command(path, "--address", address).returncode == 0, "the same command once there is room"


def test_the_driver_and_its_ray_are_killed(tree: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a study, with one part file cut short and a temporary one left behind."""
    tree["resources"] = {"max_concurrent_trials": 2}
    tree["train"]["budget_tokens"] = 128 * 500
    tree["evaluate"]["every_tokens"] = 128 * 25
    tree["checkpoint"] = {"every_tokens": 128 * 50}
    tree["search"]["num_trials"] = 3
    path = write(tree, tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", "local")
    try:
        wait_for(lambda: list(folder.glob("checkpoints/trial-00002/*/COMPLETE")))
        wait_for(lambda: last_step(folder, 2) >= first_checkpoint(folder, 2) + 25)
        family = [process, *descendants(process.pid)]
    finally:
        for one in family:
            kill(one.pid)
    process.communicate(timeout=60)
    psutil.wait_procs(family[1:], timeout=20)

    before = {row["trial"]: row for row in attempts_of(tree)}
    finished = {number: row for number, row in before.items() if row["status"] == "completed"}
    interrupted = [number for number, row in before.items() if row["status"] == "interrupted"]
    assert 2 in interrupted
    assert finished, "one had ended"
    (folder / "trials" / "_tmp-0123").write_bytes(b"PAR1 half a file")
    # Of a trial that has ended: its rows in there are lost, and nothing else is.
    cut = min((folder / "evals" / "trial-00000").glob("*.parquet"))
    cut.write_bytes(cut.read_bytes()[:100])

    done = run_command(path, "--address", "local")
    assert done.returncode == 0, done.stderr
    assert f"trial-00000/{cut.name} is left out: it is not a whole Parquet file" in done.stderr
    assert 0 in finished
    tables = results.read_tables(str(folder))
    latest = {row["trial"]: row for row in tables.trials.to_pylist()}
    assert sorted(latest) == [0, 1, 2, 3]
    assert {row["status"] for row in latest.values()} == {"completed"}
    for number, row in finished.items():
        assert latest[number] == row, "a finished trial is not run again"
    for number in interrupted:
        assert latest[number]["attempt"] == 2
        assert latest[number]["dispersion.weight"] == before[number]["dispersion.weight"]
    assert latest[2]["resumed_step"] >= 50
    for number in latest:
        mine = [row["step"] for row in tables.steps.to_pylist() if row["trial"] == number]
        assert mine == list(range(1, 501)), "no step lost, none doubled"
    trials = optuna_study(tree).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [trial.user_attrs["trial"] for trial in trials] == [1, 2, 3]
    assert [trial.value for trial in trials] == [latest[number]["val_loss"] for number in (1, 2, 3)]


def last_step(folder: Path, trial: int) -> int:
    names = [int(file.stem.split("-")[1]) for file in folder.glob(f"steps/trial-{trial:05d}/until-*.parquet")]
    return max(names, default=-1)


def first_checkpoint(folder: Path, trial: int) -> int:
    found = [
        int(file.parent.name.split("-")[1])
        for file in folder.glob(f"checkpoints/trial-{trial:05d}/*/COMPLETE")
    ]
    return min(found, default=10**9)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_two_studies_on_one_ray_do_not_touch_each_other(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Of the same name and with the same seed, side by side: each is as it would be alone."""
    tree["search"]["scheduler"] = {"median": {"grace_tokens": 512, "num_startup_trials": 1}}
    paths = [write(tree, tmp_path / name) for name in ("first", "second")]
    commands = [start_command(path, "--address", address, "--quiet") for path in paths]
    try:
        told = [command.communicate(timeout=300) for command in commands]
    finally:
        for command in commands:
            command.kill()
    assert [command.returncode for command in commands] == [0, 0], told
    found = []
    for name in ("first", "second"):
        tree["output"] = str(tmp_path / name)
        rows = attempts_of(tree)
        assert [row["trial"] for row in rows] == [0, 1, 2, 3]
        found.append([(row["dispersion.weight"], row["status"], row["val_loss"]) for row in rows])
    assert found[0] == found[1]
    assert left_on_cluster() == {"actors": [], "placement_groups": []}


def test_failed_trials_are_tried_again_and_a_changed_file_forks(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    tree["model"]["hidden_size"] = 24
    tree["search"] = {
        "num_trials": 2,
        "space": {
            "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
            "model.hidden_size": [24, 16],
            "model.num_heads": [2, 3],  # 3 does not divide 16
        },
        "points_to_evaluate": [
            {"model.hidden_size": 16, "model.num_heads": 3},
            {"model.hidden_size": 24, "model.num_heads": 2},
        ],
        "num_startup_trials": 1,
    }
    path = write(tree, tmp_path / "out")
    assert run_command(path, "--address", address).returncode == 1
    once = attempts_of(tree)
    assert [(row["trial"], row["status"]) for row in once] == [
        (0, "completed"),
        (1, "failed"),
        (2, "completed"),
    ]
    done = run_command(path, "--address", address)
    assert "1 failed, and --retry-failed runs them again" in done.stdout
    assert attempts_of(tree) == once
    assert run_command(path, "--address", address, "--retry-failed").returncode == 1
    again = attempts_of(tree)
    assert [(row["trial"], row["attempt"]) for row in again] == [(0, 1), (1, 1), (1, 2), (2, 1)]
    assert [row for row in again if row["attempt"] == 1] == once
    assert again[2]["status"] == "failed"

    changed = ("--set", "search.sampler=random", "--set", "search.num_trials=1")
    refused = run_command(path, "--address", address, *changed)
    assert refused.returncode == 2
    assert 'search.sampler ("tpe" -> "random")' in refused.stderr
    assert "--fork NAME" in refused.stderr
    forked = run_command(path, "--address", address, *changed, "--fork", "other")
    assert forked.returncode == 1, forked.stderr
    assert "Warm start: 1 trial of " in forked.stdout
    assert attempts_of(tree) == again, "the old study is as it was"
    tree["name"] = "other"
    assert [row["trial"] for row in attempts_of(tree)] == [0, 1]
    known = optuna_study(tree).trials
    assert [trial.state for trial in known] == [TrialState.COMPLETE, TrialState.FAIL]
    assert known[0].user_attrs["study"] == "tiny"
    assert known[0].value == again[3]["val_loss"]
