"""Checkpoints: whole or left out, and never code."""

from __future__ import annotations

import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from raydisp.checkpoint import Checkpoint, CheckpointFolder


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(Checkpoint(step, {"weights": {"w": torch.full((3,), float(step))}}, {"train_s": step / 2}))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    assert folder.load_latest() is None
    save(folder, 4)
    found = folder.load_latest()
    assert (found.step, found.state) == (4, {"train_s": 2.0})
    assert torch.equal(found.tensors["weights"]["w"], torch.full((3,), 4.0))


def test_only_the_latest_is_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    for step in (2, 4, 6):
        save(folder, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    folder.delete()
    assert folder.load_latest() is None


def test_one_that_was_not_finished_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    save(folder, 2)
    older = (tmp_path / "step-00000002").rename(tmp_path / "kept")
    save(folder, 4)
    (tmp_path / "step-00000004" / "COMPLETE").unlink()
    older.rename(tmp_path / "step-00000002")
    with caplog.at_level(logging.WARNING):
        assert folder.load_latest().step == 2
    assert "step-00000004 is left out: it was not written to its end" in caplog.text


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"\0" + content[1:]])
def test_one_that_was_damaged_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    save(folder, 2)
    file = tmp_path / "step-00000002" / "tensors.pt"
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert folder.load_latest() is None
    assert "tensors.pt is not what was written" in caplog.text


def test_one_of_another_trial_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(CheckpointFolder(str(tmp_path), "a"), 2)
    with caplog.at_level(logging.WARNING):
        assert CheckpointFolder(str(tmp_path), "b").load_latest() is None
    assert "it is of a trial with other settings" in caplog.text
    save(CheckpointFolder(str(tmp_path), "b"), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the foreign one is gone"


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    buffer = io.BytesIO()
    torch.save({"weights": _Attack(trap)}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert trap.exists(), "the attack is a real one"
    trap.rmdir()
    monkeypatch.setattr(torch, "save", lambda tensors, target: target.write(buffer.getvalue()))
    save(folder, 2)
    with pytest.raises(pickle.UnpicklingError):
        folder.load_latest()
    assert not trap.exists()
