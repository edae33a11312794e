"""A process that trains one trial after the other: nothing of one reaches the next, and nothing piles up."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_worker import assign

from raydisp import results
from raydisp.trial import tidy
from raydisp.trial.assignment import Assignment
from raydisp.trial.attempts import run_attempt

OTHERS: dict[str, Callable[[], Any]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "threads": lambda: torch.set_num_threads(3),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "TF32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "gradients": lambda: torch.set_grad_enabled(False),
    "torch's generator": lambda: torch.manual_seed(1),
    "numpy's generator": lambda: np.random.seed(1),
    "Python's generator": lambda: random.seed(1),
    "a new variable": lambda: os.environ.update(RAYDISP_TEST="1"),
    "a changed variable": lambda: os.environ.update(HOME="/nowhere"),
    "a deleted variable": lambda: os.environ.pop("PATH"),
    "folder": lambda: os.chdir("/"),
    "path": lambda: sys.path.insert(0, "/nowhere"),
}


def state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.benchmark,
        "TF32": torch.backends.cuda.matmul.allow_tf32,
        "anomaly": torch.is_anomaly_enabled(),
        "gradients": torch.is_grad_enabled(),
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": [str(part) for part in np.random.get_state()],
        "Python's generator": random.getstate(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
    }


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_a_trial_changes_is_put_back(name: str) -> None:
    before = state()

    @tidy.left_as_found()
    def attempt() -> None:
        OTHERS[name]()
        assert state() != before, "the test changes something"
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            attempt()
        assert state() == before


def test_a_folder_that_is_gone_does_not_matter(tmp_path: Path) -> None:
    here = Path.cwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    try:
        with tidy.left_as_found():
            os.chdir(here)
            gone.rmdir()
    finally:
        os.chdir(here)


def test_threads_that_stay_are_named() -> None:
    before = tidy.threads()
    stop = threading.Event()
    threads = [
        threading.Thread(target=stop.wait, name="stays", daemon=False),
        threading.Thread(target=stop.wait, name="daemon", daemon=True),
        threading.Thread(target=lambda: stop.wait(0.3), name="ends soon", daemon=False),
    ]
    try:
        for thread in threads:
            thread.start()
        assert tidy.leftovers(before) == ["stays"]
    finally:
        stop.set()
    assert tidy.leftovers(before) == []


def losses_of(study_dir: str, trial: int) -> list[float]:
    steps = results.read_tables(study_dir).steps.to_pylist()
    return [row["loss"] for row in steps if row["trial"] == trial]


IN_A_FRESH_PROCESS = """
import json, sys
from raydisp.trial.assignment import Assignment
from raydisp.trial.attempts import run_attempt
row = run_attempt(Assignment(**json.load(sys.stdin)), lambda report: None)
sys.exit(row["status"] != "completed")
"""


def test_the_nth_trial_of_a_process_is_as_in_a_fresh_one(tree: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, with dropout and with trials in between that are larger, diverge or fail."""
    cache_dir = str(tmp_path / "cache")
    tree["model"]["dropout"] = 0.1
    tree["train"]["grad_clip"] = None

    def assignment(folder: str, trial: int, **values: Any) -> Assignment:
        changes = {f"{name.replace('__', '.')}": value for name, value in values.items()}
        return assign(tree, tmp_path / folder, cache_dir, trial=trial, values=changes)

    between = [
        assignment("here", 1, model__hidden_size=64, model__num_layers=4),
        assignment("here", 2, train__learning_rate=1e30),
        assignment("here", 3, model__num_heads=3),
    ]
    ends = [run_attempt(other, lambda report: None)["status"] for other in between]
    assert ends == ["completed", "diverged", "failed"]
    assert run_attempt(assignment("here", 4), lambda report: None)["status"] == "completed"
    told = json.dumps(dataclasses.asdict(assignment("alone", 4)))
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], input=told, text=True, check=True)
    here, alone = (losses_of(str(tmp_path / place / "results"), 4) for place in ("here", "alone"))
    assert len(here) == 10
    assert here == alone


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_nothing_piles_up_from_trial_to_trial(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["checkpoint"] = {"every_tokens": 256}
    cache_dir = str(tmp_path / "cache")
    found = []
    for trial in range(1, 7):
        values = {"train.learning_rate": 1e30, "train.grad_clip": None} if trial % 3 == 0 else {}
        before = tidy.threads()
        row = run_attempt(assign(tree, tmp_path, cache_dir, trial=trial, values=values), lambda report: None)
        assert row["status"] == ("diverged" if values else "completed")
        assert tidy.leftovers(before) == []
        gc.collect()
        found.append(
            {
                "threads": threading.active_count(),
                "files": len(os.listdir("/proc/self/fd")),
                "tensors": sum(torch.is_tensor(thing) for thing in gc.get_objects()),
                "hooks": len(torch.nn.modules.module._global_forward_hooks),
            }
        )
    # The first two load what stays for the process.
    assert found[2:] == [found[2]] * 4, found
    assert found[-1]["files"] <= found[1]["files"]


def test_the_peak_of_a_small_trial_after_a_large_one_is_its_own(tree: dict[str, Any], tmp_path: Path) -> None:
    cache_dir = str(tmp_path / "cache")
    peaks = [
        run_attempt(
            assign(tree, tmp_path, cache_dir, trial=trial, values={"model.hidden_size": size}),
            lambda report: None,
        )["peak_memory_bytes"]
        for trial, size in ((1, 16), (2, 1024), (3, 16))
    ]
    # Two layers of 12 x 1024^2 parameters, their gradients and two moments, in float32: 400 MB
    assert peaks[1] > peaks[0] + 300 * 2**20
    assert peaks[2] < peaks[1] - 200 * 2**20
