"""The boundary of a trial, without Ray: whatever happens inside becomes its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydisp import data, results, train
from raydisp.config import StudyConfig, replace_fields
from raydisp.worker import Assignment, describe_failure, in_the_words_of, run_attempt


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def assign(tree: dict[str, Any], tmp_path: Path, cache_dir: str, **changes: Any) -> Assignment:
    study = StudyConfig.model_validate(tree)
    values = changes.pop("values", {})
    fields = {
        "study": study.model_dump(mode="json"),
        "study_dir": str(tmp_path / "results"),
        "cache_dir": cache_dir,
        "working_dir": str(Path.cwd()),
        "trial": 1,
        "attempt": 1,
        "phase": "search",
        "arm": "search",
        "values": values,
        "gpus_per_worker": 0.0,
        "prepared": data.prepare(study.trial, cache_dir),
        "model_revision": None,
        "code_version": "0+test",
        "packages": {"torch": "x"},
    }
    return Assignment(**{**fields, **changes})


def test_a_trial_that_ends_well(tree: dict[str, Any], tmp_path: Path, cache_dir: str) -> None:
    reports: list[dict[str, Any]] = []
    values = {"dispersion.weight": 0.7, "dispersion.layers": [1]}
    tree["checkpoint"] = {"every_tokens": 512}
    row = run_attempt(assign(tree, tmp_path, cache_dir, values=values), reports.append)
    stored = results.read_trial(str(tmp_path / "results"), 1, 1)
    assert stored["status"] == "completed"
    assert {name: stored[name] for name in row if row[name] is not None} == {
        name: value for name, value in row.items() if value is not None
    }
    assert stored["dispersion.weight"] == 0.7
    assert stored["dispersion.layers"] == "[1]"
    assert json.loads(stored["config_json"])["dispersion"]["layers"] == [1]
    assert (stored["num_steps"], stored["num_tokens"], stored["world_size"]) == (10, 1280, 1)
    assert (stored["precision"], stored["device"], stored["strategy"]) == ("fp32", "cpu", "ddp")
    assert stored["val_loss"] == reports[-1]["val_loss"]
    assert stored["error_type"] is None
    assert stored["startup_s"] > 0
    assert stored["train_s"] > 0
    assert stored["ended_at"] > stored["started_at"]
    columns = set(stored) - {"error_type", "error_message", "traceback", "model_revision"}
    assert [name for name in columns if stored[name] is None] == [], "nothing else is missing"
    tables = results.read_tables(str(tmp_path / "results"))
    assert tables.steps["step"].to_pylist() == list(range(1, 11))
    losses = [row["step"] for row in tables.evals.to_pylist() if row["name"] == "loss"]
    assert losses == [0, 4, 8, 10]
    assert tables.layers["step"].to_pylist() == [0] * 3 + [4] * 3 + [8] * 3 + [10] * 3
    assert not (tmp_path / "results" / "checkpoints" / "trial-00001").exists()


def test_two_attempts_at_the_same_trial_agree_to_the_bit(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    rows = [
        run_attempt(assign(tree, tmp_path / str(n), cache_dir, trial=n), lambda report: None) for n in (1, 2)
    ]
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[0]["config_sha256"] == rows[1]["config_sha256"]


ENDINGS = {
    # 16 is no multiple of 3 heads: legal one by one, not together
    "raises": (
        {"model.num_heads": 3},
        "failed",
        "ConfigError",
        "hidden_size = 16 is not a multiple of num_heads = 3",
    ),
    # a 16 TB embedding
    "out of memory": ({"model.hidden_size": 2**33}, "failed", "RuntimeError", "allocate memory"),
    "diverges": (
        {"train.learning_rate": 1e30, "train.grad_clip": None, "train.global_batch_tokens": 256},
        "diverged",
        "DivergedError",
        " is ",
    ),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_a_trial_that_ends_badly(tree: dict[str, Any], tmp_path: Path, cache_dir: str, ending: str) -> None:
    values, status, error_type, message = ENDINGS[ending]
    row = run_attempt(assign(tree, tmp_path, cache_dir, values=values), lambda report: None)
    stored = results.read_trial(str(tmp_path / "results"), 1, 1)
    assert stored["status"] == row["status"] == status
    assert stored["error_type"] == error_type
    assert message in stored["error_message"]
    assert "Traceback" in stored["traceback"]
    assert stored["val_loss"] is None
    assert stored["ended_at"] is not None
    assert json.loads(stored["config_json"]), "what was tried is told"
    if status == "diverged":
        assert 1 <= stored["num_steps"] < 10
        assert stored["num_tokens"] == stored["num_steps"] * 256
        steps = results.read_table(str(tmp_path / "results"), "steps")["step"].to_pylist()
        assert steps == list(range(1, stored["num_steps"] + 1)), "the curve up to the end is kept"


def test_columns_are_read_back_from_the_live_objects(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that differ from the suggestion must show in the row: it is not the suggestion passed on."""
    tree["search"]["space"] = {
        "dispersion.weight": [0.3, 0.7],
        "dispersion.temperature": [0.5, 1.0],
        "dispersion.layers": ["all", "last"],
        "train.learning_rate": [0.01, 0.02],
        "model.num_layers": [2, 3],
    }
    make_term, make_optimizer = train.make_term, train.make_optimizer

    def other_term(model: Any, trial: Any) -> Any:
        changes = {"dispersion.weight": 0.7, "dispersion.temperature": 0.5, "dispersion.layers": "last"}
        return make_term(model, replace_fields(trial, changes))

    monkeypatch.setattr(train, "make_term", other_term)
    monkeypatch.setattr(
        train,
        "make_optimizer",
        lambda model, settings: make_optimizer(model, settings.model_copy(update={"learning_rate": 0.02})),
    )
    suggested = {
        "dispersion.weight": 0.3,
        "dispersion.temperature": 1.0,
        "dispersion.layers": "all",
        "train.learning_rate": 0.01,
        "model.num_layers": 3,
    }
    row = run_attempt(assign(tree, tmp_path, cache_dir, values=suggested), lambda report: None)
    assert {name: row[name] for name in suggested} == {
        "dispersion.weight": 0.7,
        "dispersion.temperature": 0.5,
        "dispersion.layers": "[3]",
        "train.learning_rate": 0.02,
        "model.num_layers": 3,
    }
    steps = results.read_table(str(tmp_path / "results"), "steps")["learning_rate"].to_pylist()
    assert max(steps) == 0.02


def test_varied_data_are_made_by_the_trial(tree: dict[str, Any], tmp_path: Path, cache_dir: str) -> None:
    row = run_attempt(
        assign(tree, tmp_path, cache_dir, values={"data.context_length": 32}), lambda report: None
    )
    assert row["status"] == "completed", row["error_message"]


def test_layers_are_told_in_the_words_of_the_trial_where_they_are_true(study: StudyConfig) -> None:
    used = {"num_layers": 2, "dispersion.layers": [1, 2]}
    assert in_the_words_of(study.trial, "dispersion.layers", used) == "all"
    used["dispersion.layers"] = [2]
    assert in_the_words_of(study.trial, "dispersion.layers", used) == [2], "the hooks have the last word"
    assert in_the_words_of(study.trial, "train.global_batch_tokens", used) == 128


def test_the_first_cause_is_told_not_the_collective_that_broke() -> None:
    class WorkerError(Exception):
        def __init__(self, cause: Exception, trace: str) -> None:
            self._base_exc, self._traceback_str = cause, trace

    failure = RuntimeError("Training failed due to worker errors")
    failure.worker_failures = {
        0: WorkerError(RuntimeError("Connection closed by peer"), "x/torch/distributed/c10d.py"),
        1: WorkerError(ValueError("bad batch"), "x/raydisp/train.py"),
    }
    columns = describe_failure(failure, 128)
    assert (columns["error_type"], columns["error_message"]) == ("ValueError", "bad batch")
    assert columns["traceback"] == "x/raydisp/train.py"
