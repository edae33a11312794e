"""What several test modules share: a small corpus, a small study over it, the command as a process."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydisp.config import StudyConfig

WORDS = ["the", "a", "cat", "dog", "house", "mat", "river", "sat", "ran", "to", "on", "and", "then", "under"]


def pytest_configure(config: pytest.Config) -> None:
    """What a shell puts in the background ignores Ctrl-C, and so would all commands that the tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty short text files of a small language: enough for every split, learnt in a few steps."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(80):
        source = random.Random(number)
        text = " ".join(source.choice(WORDS) for _ in range(300))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared data of a module's trials."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tree(corpus_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The study file of a study that trains in a second, as plain values to change."""
    return {
        "name": "tiny",
        "seed": 3,
        "model": {
            "source": "scratch",
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "vocab_size": 320,
        },
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
        "dispersion": {"weight": 0.3},
        "search": {
            "num_trials": 3,
            "space": {
                "dispersion.weight": {"low": 0.01, "high": 2.0, "log": True},
                "dispersion.layers": ["all", "last", [1]],
            },
            "num_startup_trials": 2,
        },
        "evaluate": {"every_tokens": 512, "max_tokens": 256},
        "resources": {"max_concurrent_trials": 1},
        "output": str(tmp_path / "results"),
    }


@pytest.fixture
def study(tree: dict[str, Any]) -> StudyConfig:
    return StudyConfig.model_validate(copy.deepcopy(tree))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One Ray of two CPUs for the module, which the commands join as they would a cluster."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


WriteStudy = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Writes a tree as a study file."""

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


def start_command(*arguments: str | Path) -> subprocess.Popen[str]:
    """`python -m raydisp.study ...` as a process of its own group, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "raydisp.study", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def run_command(*arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    process = start_command(*arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
