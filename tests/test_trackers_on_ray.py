"""Trackers beside studies on a real Ray: what they hold is what the rows say, and none harms a study."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_command
from tensorboardX.proto.event_pb2 import Event

from raydisp import results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
HAS_WANDB = importlib.util.find_spec("wandb") is not None
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "geheim-mlflow-4711",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}

Tree = dict[str, Any]


def write(tree: Tree, folder: Path, trackers: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**tree, "output": str(folder), "trackers": trackers}, sort_keys=False))
    return path


def tables_of(folder: Path) -> results.Tables:
    return results.read_tables(str(folder / "tiny"))


def losses_of(folder: Path) -> list[Any]:
    return [(row["trial"], row["status"], row["val_loss"]) for row in tables_of(folder).trials.to_pylist()]


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def small(corpus_dir: Path) -> Tree:
    """A study of three trials, of which one diverges."""
    return {
        "name": "tiny",
        "seed": 3,
        "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {
            "budget_tokens": 1280,
            "global_batch_tokens": 128,
            "learning_rate": 0.01,
            "grad_clip": None,
        },
        "search": {
            "num_trials": 2,
            "sampler": "grid",
            "space": {"train.learning_rate": [0.01, 1e30]},
        },
        "evaluate": {"every_tokens": 512, "max_tokens": 256},
        "resources": {"max_concurrent_trials": 1},
    }


@pytest.fixture(scope="module")
def tracked(small: Tree, address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study beside every tracker that is installed here, with secrets in the environment."""
    folder = tmp_path_factory.mktemp("tracked")
    chosen: list[Any] = ["tensorboard"]
    if HAS_MLFLOW:
        chosen.append({"mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment": "mine"}})
    if HAS_WANDB:
        chosen.append({"wandb": {"project": "raydisp-tests"}})
    before = {name: os.environ.get(name) for name in SECRETS}
    os.environ.update(SECRETS)
    try:
        done = run_command(write(small, folder, chosen), "--address", address)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    assert done.returncode == 1, done.stderr  # one trial diverges
    assert "gets no more of this study" not in done.stderr
    assert "WARNING" not in done.stderr
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
    return folder


def read_events(folder: Path) -> list[Any]:
    """TensorBoard's event files of a run: records of length, checksum, content, checksum."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value."""
    curves: dict[str, dict[int, float]] = {}
    for event in read_events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


def test_tensorboard_has_the_numbers_of_the_rows(tracked: Path):
    tables = tables_of(tracked)
    rows = {row["trial"]: row for row in tables.trials.to_pylist()}
    runs = {path.name: path for path in (tracked / "tiny" / "tensorboard").iterdir()}
    assert sorted(runs) == ["baseline-00000", "search-00001", "search-00002"]
    evals = [
        one for one in tables.evals.to_pylist() if one["name"] == "loss" and one["split"] == "validation"
    ]
    for name, path in runs.items():
        row, curves = rows[int(name[-5:])], scalars(path)
        measured = {one["num_tokens"]: one["value"] for one in evals if one["trial"] == row["trial"]}
        finite = {tokens: value for tokens, value in measured.items() if value is not None}
        assert 0 in finite
        assert curves["ray/tune/val_loss"] == pytest.approx(finite, rel=1e-6)  # they are float32
        if row["status"] == "completed":
            assert sorted(finite) == [0, 512, 1024, 1280]
            for column in ("train_loss", "tokens_per_s", "train_s", "val_loss"):
                # Against tokens, like all of them.
                assert curves[f"ray/tune/{column}"][1280] == pytest.approx(row[column], rel=1e-6)
    assert {row["status"] for row in rows.values()} == {"completed", "diverged"}


@pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is not installed: pip install 'raydisp[mlflow]'")
def test_mlflow_has_the_numbers_of_the_rows(tracked: Path):
    code = """
import json, sys, mlflow
client = mlflow.MlflowClient(sys.argv[1])
(experiment,) = client.search_experiments(filter_string="name = 'mine'")
print(json.dumps([
    {"name": run.info.run_name, "status": run.info.status, "params": run.data.params, "tags": run.data.tags,
     "val_loss": {one.step: one.value for one in client.get_metric_history(run.info.run_id, "val_loss")},
     "metrics": run.data.metrics}
    for run in client.search_runs([experiment.experiment_id])
]))
"""
    told = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tracked}/mlflow.db"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    runs = {run["name"]: run for run in json.loads(told.stdout.splitlines()[-1])}
    tables = tables_of(tracked)
    rows = {row["trial"]: row for row in tables.trials.to_pylist()}
    assert sorted(runs) == ["baseline-00000", "search-00001", "search-00002"]
    for name, run in runs.items():
        row = rows[int(name[-5:])]
        assert run["status"] == ("FINISHED" if row["status"] == "completed" else "FAILED")
        assert run["tags"]["study"] == "tiny"
        told = {"trial": str(row["trial"]), "attempt": "1", "arm": row["arm"], "phase": "search", "seed": "3"}
        assert told.items() <= run["params"].items()
        if row["trial"]:
            assert float(run["params"]["train.learning_rate"]) == row["train.learning_rate"]
        if row["status"] == "completed":
            assert sorted(map(int, run["val_loss"])) == [0, 512, 1024, 1280]
            assert run["val_loss"]["1280"] == row["val_loss"]
            assert run["metrics"]["train_loss"] == row["train_loss"]


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed: pip install 'raydisp[wandb]'")
def test_wandb_writes_runs_to_be_sent_later(tracked: Path):
    runs = sorted((tracked / "tiny" / "wandb").glob("offline-run-*"))
    assert len(runs) == 3
    content = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
    for name in (b"baseline-00000", b"search-00001", b"search-00002", b"val_loss", b"raydisp-tests"):
        assert name in content


def test_no_secret_is_kept(tracked: Path):
    assert len(files_with(tracked, "study")) > 3
    for secret in SECRETS.values():
        assert files_with(tracked, secret) == []
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert files_with(logs, "raydisp") != []
    for secret in SECRETS.values():
        assert files_with(logs, secret) == []


BROKEN = """
import sys
from raydisp import study, trackers

class Broken:
    def __getattr__(self, name):
        def fail(*arguments, **settings):
            raise OSError(f"{name} is broken")
        return fail

made = trackers.make_tracker

def make(name, *rest):
    return trackers.Tracker(name, Broken) if name == "tensorboard" else made(name, *rest)

trackers.make_tracker = make
sys.exit(study.main(sys.argv[1:]))
"""


def test_trackers_that_fail_are_a_warning_each_and_the_study_is_as_it_is_without(
    tracked: Path, small: Tree, address: str, tmp_path: Path
):
    """One raises wherever it is called; the other has a server that is away."""
    chosen: list[Any] = ["tensorboard"]
    if HAS_MLFLOW:
        chosen.append({"mlflow": {"tracking_uri": "http://127.0.0.1:9"}})  # nobody listens there
    path = write(copy.deepcopy(small), tmp_path, chosen)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(path), "--address", address],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"},
    )
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if "gets no more of this study" in line]
    assert told[0].startswith("WARNING: tensorboard gets no more of this study: OSError: setup is broken.")
    assert len(told) == len(chosen)
    if HAS_MLFLOW:
        assert "WARNING: mlflow gets no more of this study: " in told[1]
        assert "Connection refused" in told[1]
    rest = [line for line in done.stderr.splitlines() if line not in told]
    assert all(line.startswith("[") for line in rest), "nothing but progress"
    assert "Traceback" not in done.stderr
    assert losses_of(tmp_path) == losses_of(tracked)


def test_a_study_may_go_on_with_other_trackers(small: Tree, address: str, tmp_path: Path):
    """They are no part of it: the file may name others, and only what runs from now on is told to them."""
    first = write(small, tmp_path, [])
    done = run_command(first, "--address", address, "--set", "search.num_trials=1")
    assert done.returncode in (0, 1), done.stderr
    assert not (tmp_path / "tiny" / "tensorboard").exists()
    again = run_command(write(small, tmp_path, ["tensorboard"]), "--address", address)
    assert again.returncode == 1, again.stderr
    assert [path.name for path in (tmp_path / "tiny" / "tensorboard").iterdir()] == ["search-00002"]
