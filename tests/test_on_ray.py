"""Whole studies on a real Ray: every ending is a row, waves follow each other, nothing is left behind."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import ray
import yaml
from conftest import run_command, start_command
from ray.util.state import list_actors, list_placement_groups

from raydisp import data, results
from raydisp.config import StudyConfig
from raydisp.trial.assignment import Assignment
from raydisp.trial.attempts import run_attempt

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

Row = dict[str, Any]


def write(tree: dict[str, Any], folder: Path) -> Path:
    tree["output"] = str(folder)
    path = folder / f"{tree['name']}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def attempts_of(tree: dict[str, Any]) -> list[Row]:
    return results.read_tables(f"{tree['output']}/{tree['name']}").attempts.to_pylist()


RAYS_OWN = {"_AutoscalingCoordinatorActor"}  # Ray makes one for a cluster and keeps it, whoever asked first


def left_on_cluster() -> dict[str, list[Any]]:
    """Actors and placement groups that are not gone; waits a little for Ray's own bookkeeping."""
    deadline = time.monotonic() + 20
    here = ray.get_runtime_context().gcs_address  # another Ray may run on the machine
    while True:
        alive = {actor.class_name for actor in list_actors(address=here) if actor.state != "DEAD"}
        actors = sorted(alive - RAYS_OWN)
        groups = [group.name for group in list_placement_groups(address=here) if group.state != "REMOVED"]
        if not (actors or groups) or time.monotonic() > deadline:
            return {"actors": actors, "placement_groups": groups}
        time.sleep(1)


def test_every_ending_is_a_row_and_the_others_finish(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Seven random trials on two slots, so that waves follow each other; seed 23 brings every ending."""
    tree.update(seed=23, resources={})
    tree["model"]["hidden_size"] = 24
    tree["train"]["grad_clip"] = None
    tree["search"] = {
        "num_trials": 7,
        "sampler": "random",
        "space": {
            "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
            "train.learning_rate": [0.01, 1e30],  # the second diverges
            "model.hidden_size": [24, 16, 2**33],  # the third does not fit into any memory
            "model.num_heads": [2, 3],  # 3 does not divide 16
        },
    }
    path = write(tree, tmp_path / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 1, done.stderr
    rows = attempts_of(tree)
    assert [row["trial"] for row in rows] == list(range(8))

    def expected(row: Row) -> tuple[str, str | None]:
        config = json.loads(row["config_json"])  # the baseline's columns of searched fields are null
        if config["model"]["hidden_size"] % config["model"]["num_heads"]:
            return "failed", "ConfigError"
        if config["model"]["hidden_size"] == 2**33:
            return "failed", "RuntimeError"
        return ("diverged", "DivergedError") if config["train"]["learning_rate"] > 1 else ("completed", None)

    assert [(row["status"], row["error_type"]) for row in rows] == [expected(row) for row in rows]
    assert {expected(row) for row in rows} == {
        ("failed", "ConfigError"),
        ("failed", "RuntimeError"),
        ("diverged", "DivergedError"),
        ("completed", None),
    }
    assert rows[0]["arm"] == "baseline"
    assert rows[0]["dispersion.weight"] == 0.0
    assert [row["val_loss"] is not None for row in rows] == [row["status"] == "completed" for row in rows]
    endings = [row["status"] for row in rows]
    assert f"{endings.count('failed')} failed, {endings.count('diverged')} diverged (trial" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("trial ") >= 8, "without a terminal, a line for each trial"
    assert left_on_cluster() == {"actors": [], "placement_groups": []}
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/out/tiny/optuna.db")
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "FAIL"}


def test_rows_hold_what_was_really_used_and_what_was_suggested(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Columns are read back from the live objects in the trial (test_worker shows that they are); Optuna's
    file has what it suggested."""
    tree["search"]["space"] = {
        "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
        "dispersion.temperature": {"low": 0.1, "high": 2.0, "log": True},
        "dispersion.layers": ["all", "last", "early_half", "late_half", [1]],
        "dispersion.variant": ["angular_spread", "orthogonalization", "uniformity"],
        "train.learning_rate": {"low": 1e-3, "high": 1e-2},
    }
    tree["search"]["num_trials"] = 5
    tree["resources"] = {}
    path = write(tree, tmp_path / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/out/tiny/optuna.db")
    suggested = {trial.user_attrs["trial"]: trial.params for trial in study.trials}
    rows = {row["trial"]: row for row in attempts_of(tree) if row["trial"]}
    assert set(rows) == set(suggested) == {1, 2, 3, 4, 5}
    for number, row in rows.items():
        for name, value in suggested[number].items():
            assert row[name] == value, name
        config = json.loads(row["config_json"])
        assert config["dispersion"]["weight"] == row["dispersion.weight"]


@pytest.fixture(scope="module")
def two_workers(address: str, tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> dict[str, Any]:
    """A study of two-worker trials through Ray Train: two, one after the other."""
    tree = {
        "name": "pairs",
        "seed": 3,
        "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 2560, "global_batch_tokens": 128, "learning_rate": 2e-3},
        "search": {"num_trials": 1, "space": {"dispersion.weight": [0.3, 1.0]}, "sampler": "random"},
        "evaluate": {"every_tokens": 1280, "max_tokens": 256},
        "checkpoint": {"every_tokens": 1280},
        "resources": {"num_workers": 2},
    }
    path = write(tree, tmp_path_factory.mktemp("pairs"))
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    return tree


def test_two_workers_through_ray_train(two_workers: dict[str, Any]) -> None:
    rows = attempts_of(two_workers)
    assert [(row["trial"], row["status"], row["world_size"]) for row in rows] == [
        (0, "completed", 2),
        (1, "completed", 2),
    ]
    assert left_on_cluster() == {"actors": [], "placement_groups": []}
    assert not Path(two_workers["output"], "pairs", ".ray").exists()
    assert not Path(two_workers["output"], "pairs", "checkpoints", "trial-00000").exists()


def test_two_workers_give_the_losses_of_one(two_workers: dict[str, Any], tmp_path: Path) -> None:
    tree = copy.deepcopy(two_workers)
    tree["resources"]["num_workers"] = 1
    study = StudyConfig.model_validate(tree)
    steps = results.read_tables(f"{two_workers['output']}/pairs").steps.to_pylist()
    for trial, weight in ((0, 0.0), (1, attempts_of(two_workers)[1]["dispersion.weight"])):
        assignment = Assignment(
            study=study.model_dump(mode="json"),
            study_dir=str(tmp_path / "alone"),
            cache_dir=str(tmp_path / "cache"),
            working_dir=".",
            trial=trial,
            attempt=1,
            phase="search",
            arm="search",
            values={"dispersion.weight": weight},
            gpus_per_worker=0,
            prepared=data.prepare(study.trial, str(tmp_path / "cache")),
            model_revision=None,
            code_version="0",
            packages={},
        )
        assert run_attempt(assignment, lambda report: None)["status"] == "completed"
        alone = results.read_tables(str(tmp_path / "alone")).steps.to_pylist()
        one = [row["loss"] for row in alone if row["trial"] == trial]
        two = [row["loss"] for row in steps if row["trial"] == trial]
        assert len(one) == 20
        # float32 sums in another order
        assert two == pytest.approx(one, rel=1e-5)


def test_same_file_same_seed_same_suggestions_and_bits(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    found = []
    for name in ("first", "second"):
        assert run_command(write(tree, tmp_path / name), "--address", address, "--quiet").returncode == 0
        rows = attempts_of(tree)
        steps = results.read_tables(f"{tree['output']}/tiny").steps
        found.append(
            {
                "suggestions": [(row["dispersion.weight"], row["dispersion.layers"]) for row in rows],
                "val_loss": [row["val_loss"] for row in rows],
                "losses": steps["loss"].to_pylist(),
                "norms": steps["grad_norm"].to_pylist(),
            }
        )
    assert found[0] == found[1]
    assert len(found[0]["losses"]) == 40


def wait_for(condition: Any, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def second_driver(path: Path, tmp_path: Path) -> None:
    """A study that grows, stopped by SIGTERM to the whole group, while a second command is refused."""
    grown = ("--set", "search.num_trials=4", "--address", "local")
    process = start_command(path, *grown)
    try:
        wait_for(lambda: list(tmp_path.glob("out/tiny/checkpoints/trial-00004/*/COMPLETE")))
        other = run_command(path, *grown)
        assert other.returncode == 2
        assert f"is in use by another raydisp: process {process.pid} on " in other.stderr
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "The same command continues the study." in err
    assert run_command(path, *grown).returncode == 1, "the lost trial stays failed"


def test_killed_and_interrupted_then_the_same_command_again(tree: dict[str, Any], tmp_path: Path) -> None:
    """On a Ray of the command's own: one trial loses its process, Ctrl-C stops the rest, then it goes on."""
    tree["resources"] = {"max_concurrent_trials": 2}
    tree["failures"] = {"max_failures": 0}  # test_failures has trials that go on by themselves
    tree["train"]["budget_tokens"] = 128 * 3000
    tree["evaluate"]["every_tokens"] = 128 * 200
    tree["checkpoint"] = {"every_tokens": 128 * 50}
    path = write(tree, tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", "local")
    try:
        wait_for(lambda: all(list(folder.glob(f"checkpoints/trial-0000{n}/*/COMPLETE")) for n in (0, 1)))
        family = descendants(process.pid)
        # Tune's actor for functions; Ray gives its processes the name of what they run.
        trials = [child for child in family if "ImplicitFunc" in " ".join(child.cmdline())]
        assert len(trials) == 2, "two trials run at a time"
        trials[0].kill()
        row = wait_for(
            lambda: next(
                (row for n in (0, 1) if (row := results.read_trial(str(folder), n, 1))["status"] == "failed"),
                None,
            )
        )
        assert row["error_type"] == "ProcessLost"
        lost = row["trial"]
        wait_for(lambda: list(folder.glob("checkpoints/trial-00002/*/COMPLETE")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and all that it started
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "The same command continues the study." in err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [child.cmdline() for child in alive] == [], "nothing of ours is left running"

    first = {row["trial"]: row for row in attempts_of(tree)}
    kept = 1 - lost
    assert {number: row["status"] for number, row in first.items()} == {
        lost: "failed",
        kept: "interrupted",
        2: "interrupted",
    }
    done = run_command(path, "--address", "local")
    assert done.returncode == 1, done.stderr
    latest = {row["trial"]: row for row in results.read_tables(str(folder)).trials.to_pylist()}
    assert {number: (row["status"], row["attempt"]) for number, row in latest.items()} == {
        lost: ("failed", 1),
        kept: ("completed", 2),
        2: ("completed", 2),
        3: ("completed", 1),
    }
    for number in (kept, 2):
        assert latest[number]["dispersion.weight"] == first[number]["dispersion.weight"]
        steps = [
            row for row in results.read_table(str(folder), "steps").to_pylist() if row["trial"] == number
        ]
        assert [row["step"] for row in steps] == list(range(1, 3001)), "no step lost, none doubled"
        resumed_step = latest[number]["resumed_step"]
        assert resumed_step >= 50
        assert all((row["attempt"] == 1) == (row["step"] <= resumed_step) for row in steps)
    second_driver(path, tmp_path)
    again = run_command(path, "--address", "local")
    assert again.returncode == 1
    assert "done already" in again.stdout
