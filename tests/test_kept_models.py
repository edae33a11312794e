"""Weights that outlive their trial: whole, checked, and the same from any layout."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from raydisp.config import StudyConfig
from raydisp.config.train import TrainConfig
from raydisp.errors import OutputError
from raydisp.models import build_model, weights_sha256
from raydisp.parallel import Layout, parallelise
from raydisp.trial import kept_models

SETTINGS = {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01}


def make_model(study: StudyConfig, *, seed: int = 3) -> Any:
    return build_model(study.model, context_length=16, eos_token_id=0, vocab_size=None, seed=seed)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def keep(model: Any, place: str, tokenizer: str, **options: Any) -> None:
    kept_models.keep(model, place, tokenizer, **{"is_main": True, "about": {"trial": 7}, **options})


def test_a_kept_model_comes_back_as_it_was(study: StudyConfig, tmp_path: Path, tokenizer: str) -> None:
    model, place = make_model(study), str(tmp_path / "kept")
    keep(model, place, tokenizer)
    marker = kept_models.read_marker(place)
    assert marker is not None
    assert marker["trial"] == 7
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(marker["files"])
    kept_models.fetch(place, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert weights_sha256(loaded) == weights_sha256(model)


def test_keeping_again_replaces_it(study: StudyConfig, tmp_path: Path, tokenizer: str) -> None:
    place = str(tmp_path / "kept")
    keep(make_model(study, seed=1), place, tokenizer)
    (tmp_path / "kept" / "stale.bin").write_text("from before")
    keep(make_model(study, seed=2), place, tokenizer)
    kept_models.fetch(place, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert weights_sha256(loaded) == weights_sha256(make_model(study, seed=2))
    assert not (tmp_path / "kept" / "stale.bin").exists()


def test_weights_without_their_marker_are_not_whole(
    study: StudyConfig, tmp_path: Path, tokenizer: str
) -> None:
    place = str(tmp_path / "kept")
    keep(make_model(study), place, tokenizer)
    (tmp_path / "kept" / kept_models.MARKER).unlink()
    assert kept_models.read_marker(place) is None
    with pytest.raises(OutputError, match="no whole model"):
        kept_models.fetch(place, tmp_path / "out")


def test_a_marker_cannot_write_elsewhere(study: StudyConfig, tmp_path: Path, tokenizer: str) -> None:
    place = str(tmp_path / "kept")
    keep(make_model(study), place, tokenizer)
    marker = json.loads((tmp_path / "kept" / kept_models.MARKER).read_text())
    marker["files"]["../escaped"] = marker["files"]["config.json"]
    (tmp_path / "kept" / kept_models.MARKER).write_text(json.dumps(marker))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="not inside the folder"):
        kept_models.fetch(place, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


def test_the_hash_tells_one_weight_from_another(study: StudyConfig) -> None:
    model = make_model(study)
    assert weights_sha256(model) == weights_sha256(make_model(study))
    assert weights_sha256(model) != weights_sha256(make_model(study, seed=4))
    before = weights_sha256(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert weights_sha256(model) != before


def _worker(rank: int, port: int, strategy: str, model: dict[str, Any], place: str, tokenizer: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    study = StudyConfig.model_validate(model)
    layout = Layout(rank, 2, torch.device("cpu"))
    settings = TrainConfig.model_validate({**SETTINGS, "strategy": strategy})
    wrapped = parallelise(make_model(study), layout, settings, "fp32")
    keep(wrapped, place, tokenizer, is_main=layout.is_main)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_layout_keeps_the_same_weights(
    study: StudyConfig, tmp_path: Path, tokenizer: str, strategy: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = str(tmp_path / "kept")
    mp.spawn(_worker, (port, strategy, study.model_dump(mode="json"), place, tokenizer), nprocs=2)
    kept_models.fetch(place, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert weights_sha256(loaded) == weights_sha256(make_model(study))
