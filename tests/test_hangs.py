"""A worker that answers no more: the others do not wait for it longer than the study says."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raydisp import data, models
from raydisp.checkpoint import CheckpointFolder
from raydisp.config import StudyConfig, TrialConfig
from raydisp.parallel import Layout
from raydisp.train import train
from raydisp.trial.endings import describe_failure
from raydisp.trial.retries import goes_on

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

TIMEOUT_S = 3


def _stop() -> None:
    """As a process that swaps or waits for a dead file server: it is there, and does nothing."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _worker(rank: int, port: int, where: str, tree: dict[str, Any], cache_dir: str, out: str) -> None:
    torch.set_num_threads(1)
    # Ray Train makes the workers' group like this, with failures.collective_timeout_s.
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timeout)
    trial = TrialConfig.model_validate(tree)
    folder = data.prepare(trial, cache_dir)
    layout = Layout(rank, 2)
    model = models.build_model(trial.model, context_length=16, eos_token_id=0, seed=trial.seed)
    checkpoints = CheckpointFolder(f"{out}/checkpoints", "x", layout, timeout_s=TIMEOUT_S)
    begun = time.monotonic()

    def on_evaluation(report: dict[str, Any]) -> None:
        nonlocal begun
        begun = time.monotonic()
        if where == "step" and rank == 1 and report["step"] == 4:
            _stop()

    try:
        checkpoints.find()
        begun = time.monotonic()
        if where == "checkpoint" and rank == 1:
            _stop()
        checkpoints.find()
        blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
        train(model, *blocks, trial, layout=layout, checkpoints=checkpoints, on_evaluation=on_evaluation)
    except Exception as error:
        told = {**describe_failure(error, 128), "waited_s": time.monotonic() - begun}
        Path(out, "told.json").write_text(json.dumps(told))
        os._exit(0)  # as Ray ends a worker that has raised


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_worker_that_hangs_ends_the_attempt_in_time(study: StudyConfig, tmp_path: Path, where: str) -> None:
    cache_dir = str(tmp_path / "cache")
    data.prepare(study.trial, cache_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree = study.trial.model_dump(mode="json")
    arguments = (port, where, tree, cache_dir, str(tmp_path))
    workers = mp.start_processes(_worker, arguments, nprocs=2, join=False, start_method="spawn")
    main, hung = workers.processes
    try:
        main.join(90)
        assert main.exitcode == 0
        assert hung.exitcode is None, "it is still there"
    finally:
        for process in (main, hung):
            process.kill()
            process.join()
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["status"], told["error_type"]) == ("failed", "CollectiveTimeout")
    assert told["error_message"].startswith(
        "a worker got no answer from the others within failures.collective_timeout_s: one of them hangs, or "
        "the network between them is down ("
    )
    assert TIMEOUT_S - 0.5 < told["waited_s"] < TIMEOUT_S + 10
    # It is tried again, from the last checkpoint.
    assert goes_on([told], context_length=16, max_failures=1)
