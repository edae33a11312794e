"""The boundary of a trial, without Ray: whatever happens inside becomes its row."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raydisp import data, results, train
from raydisp.config import StudyConfig, replace_fields
from raydisp.errors import DivergedError, OutOfMemoryError, PreemptedError
from raydisp.trial.assignment import Assignment, in_the_words_of
from raydisp.trial.attempts import run_attempt, run_trial
from raydisp.trial.endings import describe_failure
from raydisp.verdict.pairs import SAME_WITHIN_A_PAIR


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


def test_a_confirm_run_is_paired_tested_and_kept(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    """By arm and seed: what is the same, what differs, and what an interrupted run has when it goes on."""
    tree["checkpoint"] = {"every_tokens": 512}
    methods: dict[str, dict[str, Any]] = {
        "baseline": {"dispersion.weight": 0.0},
        "dispersion": {"dispersion.weight": 0.5},
        "noisy": {"dispersion.weight": 0.0, "noisy_embedding.alpha": 5.0},
        "forgetting": {"dispersion.weight": 0.0, "active_forgetting.every_steps": 4},
    }
    rows = {}
    for number, (arm, values) in enumerate(methods.items()):
        for seed in (7, 8):
            run = assign(
                tree,
                tmp_path,
                cache_dir,
                trial=2 * number + seed,
                phase="confirm",
                arm=arm,
                values={**values, "seed": seed},
                confirm_json="{}",
                keep_model=arm == "baseline",
            )
            rows[arm, seed] = run_attempt(run, lambda metrics: None)
    assert {(row["status"], row["phase"]) for row in rows.values()} == {("completed", "confirm")}
    for column in SAME_WITHIN_A_PAIR:
        for seed in (7, 8):
            assert len({rows[arm, seed][column] for arm in methods}) == 1
        assert rows["baseline", 7][column] != rows["baseline", 8][column]
        assert rows["baseline", 7][column] is not None
    assert len({row["test_loss"] for row in rows.values()}) == 8, "every run came to something else"
    assert [row["seed"] for row in rows.values()] == [7, 8] * 4
    splits = results.read_table(str(tmp_path / "results"), "evals", trial=7).to_pylist()
    (tested,) = [row["value"] for row in splits if (row["split"], row["name"]) == ("test", "loss")]
    assert tested == rows["baseline", 7]["test_loss"]
    kept = sorted(path.name for path in (tmp_path / "results" / "models").iterdir())
    assert kept == ["trial-00007", "trial-00008"]


def test_weights_that_cannot_be_kept_take_nothing_from_the_run(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "models").write_text("a file in the way")
    run = assign(tree, tmp_path, cache_dir, phase="confirm", arm="x", confirm_json="{}", keep_model=True)
    row = run_attempt(run, lambda metrics: None)
    assert row["status"] == "completed"
    assert row["test_loss"] > 0
    assert row["note"].startswith("its weights were not kept: ")


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
    of_confirm = {"test_loss", "confirm_json", *SAME_WITHIN_A_PAIR}
    columns = set(stored) - {
        "error_type",
        "error_message",
        "traceback",
        "model_revision",
        "teacher_revision",
        "note",
        *of_confirm,
    }
    assert (stored["num_skipped_steps"], stored["resumed_step"], stored["micro_batch_tokens"]) == (0, 0, 128)
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


def attempts_of(tmp_path: Path) -> list[dict[str, Any]]:
    return results.read_tables(str(tmp_path / "results")).attempts.to_pylist()


def test_out_of_memory_is_tried_again_with_half_the_micro_batch(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_losses = train.token_losses

    def small_memory(logits: Any, input_ids: Any) -> Any:
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return token_losses(logits, input_ids)

    monkeypatch.setattr(train, "token_losses", small_memory)
    row = run_trial(assign(tree, tmp_path, cache_dir), lambda report: None)
    first, second = attempts_of(tmp_path)
    assert (first["status"], first["error_type"]) == ("interrupted", "OutOfMemoryError")
    assert first["error_message"].startswith("out of memory at step 1 with micro-batches of 128 tokens")
    assert first["micro_batch_tokens"] == 128
    assert (second["status"], second["attempt"], second["micro_batch_tokens"]) == ("completed", 2, 64)
    assert second["note"] == "micro-batches of 64 tokens, because an attempt with more ran out of memory"
    assert second["config_sha256"] == row["config_sha256"]
    assert second["num_tokens"] == 1280
    monkeypatch.undo()
    other = tmp_path / "other"
    whole = run_trial(assign(tree, other, cache_dir), lambda report: None)
    # the same global batch in two passes
    assert second["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_out_of_memory_twice_fails(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(logits: Any, input_ids: Any) -> Any:
        return torch.empty(2**60)

    monkeypatch.setattr(train, "token_losses", no_memory)
    row = run_trial(assign(tree, tmp_path, cache_dir), lambda report: None)
    assert (row["status"], row["attempt"], row["error_type"]) == ("failed", 2, "OutOfMemoryError")
    assert [attempt["micro_batch_tokens"] for attempt in attempts_of(tmp_path)] == [128, 64]


def test_notice_ends_the_attempt_and_keeps_its_checkpoint(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydisp.cluster.preemption.notice_to_this_node", lambda: "its node is taken away")
    assignment = assign(tree, tmp_path, cache_dir)
    row = run_trial(assignment, lambda report: None)
    assert (row["status"], row["error_type"]) == ("interrupted", "PreemptedError")
    assert row["error_message"] == "stopped after step 1: its node is taken away"
    monkeypatch.undo()
    row = run_trial(dataclasses.replace(assignment, attempt=2), lambda report: None)
    assert (row["status"], row["resumed_step"]) == ("completed", 1)
    steps = results.read_table(str(tmp_path / "results"), "steps").to_pylist()
    assert [(row["step"], row["attempt"]) for row in steps] == [(1, 1)] + [(n, 2) for n in range(2, 11)]


def test_a_reused_process_keeps_nothing(tree: dict[str, Any], tmp_path: Path, cache_dir: str) -> None:
    """Trials of one process, one after the other: the last is as in a fresh process, and nothing grows."""

    def held() -> dict[str, Any]:
        gc.collect()
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "files": sorted(file.path for file in psutil.Process().open_files()),
            "num_fds": psutil.Process().num_fds(),
            "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
            "default_dtype": torch.get_default_dtype(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }

    tree["checkpoint"] = {"every_tokens": 512}
    losses, found = [], []
    for number, values in enumerate(
        [{}, {"train.learning_rate": 1e30, "train.grad_clip": None}, {"model.num_heads": 3}, {}, {}]
    ):
        folder = tmp_path / str(number)
        run_trial(assign(tree, folder, cache_dir, values=values), lambda report: None)
        losses.append(results.read_table(str(folder / "results"), "steps")["loss"].to_pylist())
        found.append(held())
    assert losses[0] == losses[3] == losses[4]
    assert len(losses[0]) == 10
    assert found[4]["files"] == found[0]["files"]
    assert found[4] == found[3]


def test_the_peak_of_memory_is_the_trials_own(tree: dict[str, Any], tmp_path: Path, cache_dir: str) -> None:
    large = torch.ones(2**28)  # 1 GiB, of somebody before
    del large
    row = run_trial(assign(tree, tmp_path, cache_dir), lambda report: None)
    status = Path("/proc/self/status").read_text()
    now = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024
    assert row["peak_memory_bytes"] < now + 2**29


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms"),
            "CollectiveTimeout",
            "a worker got no answer from the others within failures.collective_timeout_s",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:39"),
            "WorkerLost",
            "a worker lost the connection to another one, which has ended",
        ),
        (OutOfMemoryError(3, 64, "too much"), "OutOfMemoryError", "out of memory at step 3"),
        (PreemptedError(3, "gone soon"), "PreemptedError", "stopped after step 3: gone soon"),
        (ValueError("timed out"), "ValueError", "timed out"),
    ],
)
def test_what_broke_is_told_in_a_word_and_a_sentence(error: Exception, kind: str, sentence: str) -> None:
    columns = describe_failure(error, 128)
    assert columns["error_type"] == kind
    assert columns["error_message"].startswith(sentence)


def test_errors_survive_pickling() -> None:
    for error in (DivergedError(3, "loss", 1.0), OutOfMemoryError(3, 64, "x"), PreemptedError(3, "x")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.step) == (str(error), 3)


@pytest.mark.parametrize("every_tokens", [None, 256])
def test_a_trial_that_is_stopped_is_pruned(
    tree: dict[str, Any],
    tmp_path: Path,
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    every_tokens: int | None,
) -> None:
    monkeypatch.setattr(
        "raydisp.trial.share._must_stop", lambda assignment: lambda metrics: metrics["num_tokens"] >= 512
    )
    tree["checkpoint"] = {"every_tokens": every_tokens}
    reports: list[dict[str, Any]] = []
    row = run_trial(assign(tree, tmp_path, cache_dir, values={"dispersion.weight": 0.7}), reports.append)
    stored = results.read_trial(str(tmp_path / "results"), 1, 1)
    assert stored["status"] == row["status"] == "pruned"
    assert (stored["num_steps"], stored["num_tokens"]) == (4, 512)
    metrics = ("train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "layer_cosine_mean")
    assert [stored[name] for name in (*metrics, "spearman", "kendall")] == [None] * 7
    assert stored["dispersion.weight"] == 0.7, "read back from what was used, as of any other"
    assert stored["error_type"] is None
    assert stored["tokens_per_s"] > 0
    assert stored["ended_at"] is not None
    tables = results.read_tables(str(tmp_path / "results"))
    assert tables.steps["step"].to_pylist() == [1, 2, 3, 4]
    assert sorted(set(tables.evals["num_tokens"].to_pylist())) == [0, 512], "its curve is kept"
    assert [report["num_tokens"] for report in reports] == [0, 512]
    assert not (tmp_path / "results" / "checkpoints" / "trial-00001").exists()


def test_a_field_that_is_not_searched_here_is_null(
    tree: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    tree["search"]["space"] = {
        "dispersion.variant": ["angular_spread", "cosine"],
        "dispersion.temperature": {
            "low": 0.5,
            "high": 2.0,
            "when": {"dispersion.variant": ["angular_spread"]},
        },
    }
    rows = []
    for trial, values in enumerate(
        [
            {"dispersion.variant": "cosine"},
            {"dispersion.variant": "angular_spread", "dispersion.temperature": 0.75},
        ],
        1,
    ):
        row = run_trial(assign(tree, tmp_path, cache_dir, trial=trial, values=values), lambda report: None)
        assert row["status"] == "completed", row["error_message"]
        rows.append((row["dispersion.variant"], row["dispersion.temperature"]))
    assert rows == [("cosine", None), ("angular_spread", 0.75)]
