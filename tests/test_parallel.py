"""Two gloo processes give the same training as one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raydisp import data, models
from raydisp.config import StudyConfig, TrialConfig, replace_fields
from raydisp.errors import DivergedError
from raydisp.parallel import Layout
from raydisp.train import train

pytestmark = pytest.mark.processes


class _Losses:
    def __init__(self) -> None:
        self.steps: list[float] = []

    def add(self, table: str, row: dict[str, Any]) -> None:
        if table == "steps":
            self.steps.append(row["loss"])

    def flush(self, step: int) -> None:
        pass


def _train(trial: TrialConfig, cache_dir: str, layout: Layout) -> dict[str, Any]:
    folder = data.prepare(trial, cache_dir)
    model = models.build_model(trial.model, context_length=16, eos_token_id=0, seed=trial.seed)
    rows = _Losses()
    blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
    try:
        result = train(model, *blocks, trial, layout=layout, rows=rows if layout.is_main else None)
    except DivergedError as error:
        return {"diverged": error.step, "losses": rows.steps}
    return {
        "losses": rows.steps,
        "val_loss": result.final.loss,
        "stderr": result.final.stderr,
        "num_tokens": result.final.num_tokens,
        "cosines": result.final.condensation.cosine_mean,
        "histogram": result.final.condensation.histogram,
    }


def _worker(rank: int, port: int, tree: dict[str, Any], cache_dir: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = _train(TrialConfig.model_validate(tree), cache_dir, Layout(rank, 2))
        (Path(out) / f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def run_two(trial: TrialConfig, cache_dir: str, out: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, trial.model_dump(mode="json"), cache_dir, str(out)), nprocs=2)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


CASES: list[dict[str, Any]] = [
    {"dispersion.variant": "angular_spread"},
    {"dispersion.max_tokens": 6, "train.micro_batch_tokens": 32},
]


@pytest.mark.parametrize("changes", CASES, ids=["plain", "subsample and micro-batches"])
def test_two_processes_equal_one(study: StudyConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    # At the tiny study's rate of 0.01 Adam blows rounding up to 4e-5 within 20 steps; this is the default's.
    steps = {"train.budget_tokens": 2560, "train.learning_rate": 2e-3}
    trial = replace_fields(study.trial, {**steps, **changes})
    cache_dir = str(tmp_path / "cache")
    alone = _train(trial, cache_dir, Layout())
    main, other = run_two(trial, cache_dir, tmp_path)
    assert len(alone["losses"]) == 20
    # float32 sums in another order, over 20 steps
    assert main["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for key in ("val_loss", "stderr"):
        assert main[key] == pytest.approx(alone[key], rel=1e-5), key
    # a mean of cosines near 0 is a difference of sums near 1: absolute, not relative
    assert main["cosines"] == pytest.approx(alone["cosines"], abs=2e-5)
    assert main["num_tokens"] == alone["num_tokens"]
    assert [sum(counts) for counts in main["histogram"]] == [sum(counts) for counts in alone["histogram"]]
    assert {key: other[key] for key in ("val_loss", "cosines")} == {
        key: main[key] for key in ("val_loss", "cosines")
    }, "all workers know the same evaluation"


def test_all_processes_diverge_at_the_same_step(study: StudyConfig, tmp_path: Path) -> None:
    trial = replace_fields(study.trial, {"train.learning_rate": 1e30, "train.grad_clip": None})
    main, other = run_two(trial, str(tmp_path / "cache"), tmp_path)
    assert main["diverged"] == other["diverged"] > 1
