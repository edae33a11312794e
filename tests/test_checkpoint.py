"""Checkpoints: whole or left out, the last and the best, on any layout, and never code."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raydisp.checkpoint import CheckpointFolder, distcp
from raydisp.errors import CheckpointError, OutputError
from raydisp.parallel import Layout
from raydisp.storage import fingerprint


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((3, 5), float(step)),
        "model.half": torch.full((4,), float(step), dtype=torch.bfloat16),
        "optimizer.w.step": torch.tensor(float(step)),
    }


def save(folder: CheckpointFolder, step: int, value: float | None = None) -> None:
    folder.save(step, tensors(step), {"train_s": step / 2}, value=value, wait=True)


def steps_of(path: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in path.iterdir())


def check_loads(folder: CheckpointFolder, step: int) -> None:
    saved = folder.find()
    assert saved is not None
    assert (saved.step, saved.state) == (step, {"train_s": step / 2})
    assert saved.names == set(tensors(0))
    found = tensors(-1)
    folder.load(saved, found)
    for name, expected in tensors(step).items():
        assert torch.equal(found[name], expected), name


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    assert folder.find() is None
    save(folder, 4)
    check_loads(folder, 4)
    check_loads(CheckpointFolder(str(tmp_path / "c"), "a"), 4)
    assert CheckpointFolder(str(tmp_path / "other"), "a").find() is None


def test_what_changes_after_save_is_not_saved(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    mine = tensors(7)
    folder.save(7, mine, {"train_s": 3.5})
    for tensor in mine.values():
        tensor.zero_()
    folder.wait()
    check_loads(folder, 7)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    kept = []
    for step, value in enumerate([3.0, 2.0, None, 2.5, float("nan"), 2.0, 1.0], start=1):
        save(folder, step, value)
        kept.append(steps_of(tmp_path))
    # of two that are equally good the later one
    assert kept == [[1], [2], [2, 3], [2, 4], [2, 5], [6], [7]]
    again = CheckpointFolder(str(tmp_path), "a")
    save(again, 8, 1.5)
    assert steps_of(tmp_path) == [7, 8], "values are remembered from attempt to attempt"


def test_a_step_that_is_whole_is_not_written_again(tmp_path: Path) -> None:
    """A process that goes on from it and must leave at once would have to delete it first."""
    save(CheckpointFolder(str(tmp_path), "a"), 4)
    place = tmp_path / "step-00000004" / "COMPLETE"
    written = place.stat().st_mtime_ns
    folder = CheckpointFolder(str(tmp_path), "a")
    folder.find()
    save(folder, 4)
    assert place.stat().st_mtime_ns == written
    save(folder, 5)
    save(folder, 5)
    flip(tmp_path / "step-00000005" / "__0_0.distcp")
    found = folder.find()
    assert found is None, "4 was dropped for 5"
    save(folder, 5)
    check_loads(folder, 5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("COMPLETE", os.unlink, "it was not written to its end"),
        ("COMPLETE", truncate, "it was not written to its end"),
        ("COMPLETE", lambda path: path.write_text("[]"), "it was not written to its end"),
        ("COMPLETE", lambda path: path.write_text('{"state.json": 5}'), "it was not written to its end"),
        ("__0_0.distcp", truncate, "__0_0.distcp is not what was written"),
        ("__0_0.distcp", flip, "__0_0.distcp is not what was written"),
        ("__0_0.distcp", os.unlink, "__0_0.distcp is not what was written"),
        (".metadata", flip, ".metadata is not what was written"),
        ("state.json", truncate, "state.json is not what was written"),
    ],
)
def test_a_damaged_one_is_named_and_an_older_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Any, reason: str
) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    save(folder, 2, value=1.0)
    save(folder, 4, value=2.0)
    harm(tmp_path / "step-00000004" / name)
    with caplog.at_level(logging.WARNING):
        check_loads(folder, 2)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("raydisp")] == [
        f"{tmp_path}/step-00000004 is left out: {reason}"
    ]
    save(folder, 4, value=0.5)
    check_loads(folder, 4)


def test_one_of_another_trial_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(CheckpointFolder(str(tmp_path), "a"), 4)
    assert CheckpointFolder(str(tmp_path), "b").find() is None
    assert "it is of a trial with other settings" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.w": torch.zeros(3, 6)}, r"model\.w is \[3, 5\] torch\.float32 there and \[3, 6\]"),
        ({"model.w": torch.zeros(3, 5).half()}, r"torch\.float32 there and \[3, 5\] torch\.float16 here"),
        ({"model.new": torch.zeros(1)}, r"step-00000004 has no model\.new"),
        ({"model.w": None}, r"this model has no model\.w"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    save(folder, 4)
    saved = folder.find()
    assert saved is not None
    wanted = {name: value for name, value in {**tensors(0), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=f"is of another model: .*{sentence}"):
        folder.load(saved, wanted)


# --- never code ----------------------------------------------------------------------------------------


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file as someone with access to the folder would: the marker agrees."""
    (folder / name).write_bytes(content)
    marker = json.loads((folder / "COMPLETE").read_text())
    marker[name] = fingerprint.of_content(content)._asdict()
    (folder / "COMPLETE").write_text(json.dumps(marker))


def test_metadata_cannot_run_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    save(folder, 4)
    payload = pickle.dumps(Evil(tmp_path / "ran"))
    pickle.loads(pickle.dumps(Evil(tmp_path / "works")))
    assert (tmp_path / "works").exists(), "the payload is one"
    forge(tmp_path / "c" / "step-00000004", ".metadata", payload)
    assert folder.find() is None
    assert "it names posix.system), and nothing in it was run" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    save(folder, 4)
    other = tmp_path / "other"
    save_distributed({"model.w": Evil(tmp_path / "ran")}, checkpoint_id=other, no_dist=True)
    for name in (".metadata", "__0_0.distcp"):
        forge(tmp_path / "c" / "step-00000004", name, (other / name).read_bytes())
    assert folder.find() is None
    assert "nothing in it was run" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_tensors_cannot_run_code(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "c"), "a")
    save(folder, 4)
    evil = tmp_path / "evil.pt"
    torch.save(Evil(tmp_path / "ran"), evil)
    place = tmp_path / "c" / "step-00000004" / "__0_0.distcp"
    # in the place of the first tensor, as long as the file was or longer
    forge(place.parent, place.name, evil.read_bytes().ljust(place.stat().st_size, b"\0"))
    saved = folder.find()
    assert saved is not None, "digests cannot tell"
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder.load(saved, tensors(0))
    assert not (tmp_path / "ran").exists()


def test_metadata_names_only_files_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")
    save(folder, 4)
    place = tmp_path / "step-00000004" / ".metadata"
    metadata = distcp.load_metadata(place.read_bytes(), "x")
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    forge(place.parent, place.name, pickle.dumps(metadata))
    assert folder.find() is None
    assert "its metadata names files that are not its own" in caplog.text


# --- kept whole ----------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys, torch
from raydisp.checkpoint import CheckpointFolder
from raydisp.errors import OutputError
folder = CheckpointFolder(sys.argv[1], "a")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
folder.save(2, {"w": torch.ones(1000)}, {}, wait=True)
folder.save(4, {"w": torch.ones(1 << 20)}, {})
try:
    folder.wait()
except OutputError as error:
    print(error)
"""


def test_a_disk_that_is_full_harms_no_earlier_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "a checkpoint cannot be written: File too large; make the folder writable" in done.stdout
    assert steps_of(tmp_path) == [2], "what was begun is gone: it would only fill the disk"
    saved = CheckpointFolder(str(tmp_path), "a").find()
    assert saved is not None
    assert saved.step == 2


SAVING = """
import sys, torch
from raydisp.checkpoint import CheckpointFolder
folder = CheckpointFolder(sys.argv[1], "a")
step = 0
while True:
    step += 1
    folder.save(step, {"w": torch.full((1 << 20,), float(step))}, {}, wait=True)
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    left_out = 0
    for attempt in range(5):
        place = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(place)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.005 * attempt)
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        folder = CheckpointFolder(str(place), "a")
        saved = folder.find()
        assert saved is not None
        assert saved.step >= told[-1], "what was reported is there"
        found = {"w": torch.zeros(1 << 20)}
        folder.load(saved, found)
        assert torch.equal(found["w"], torch.full((1 << 20,), float(saved.step)))
        left_out += max(steps_of(place)) > saved.step
    assert left_out, "at least once a save was cut off"


def test_a_save_that_fails_is_told_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(str(tmp_path), "a")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raydisp.checkpoint.save_distributed", fail)
    folder.save(2, tensors(2), {})
    with pytest.raises(OutputError, match="No space left on device; make the folder writable, free some"):
        folder.save(4, tensors(4), {})
    folder.save(2, tensors(2), {})
    folder.abandon()  # after an error elsewhere nothing more is raised


# --- several workers -----------------------------------------------------------------------------------


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **{f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()},
        "optimizer.step": torch.tensor(3.0),
    }


def _sharded() -> torch.nn.Module:
    model = _model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _equal(model: torch.nn.Module) -> bool:
    expected = dict(_model().named_parameters())
    return all(
        torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, expected[name])
        for name, value in model.named_parameters()
    )


def _zero(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _two(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layout = Layout(rank, 2)
    found: dict[str, Any] = {}
    try:
        sharded = CheckpointFolder(f"{out}/sharded", "a", layout)
        sharded.save(1, _named(_sharded()), {"x": 1}, value=1.0)
        sharded.save(2, _named(_sharded()), {"x": 2}, value=2.0)
        sharded.wait()
        plain = CheckpointFolder(f"{out}/plain", "a", layout)
        plain.save(5, _named(_model()), {}, wait=True)
        for name, folder in (("sharded", sharded), ("plain", plain)):
            for kind, make in (("sharded", _sharded), ("plain", _model)):
                model = _zero(make())
                saved = folder.find()
                assert saved is not None
                folder.load(saved, _named(model))
                found[f"{name} into {kind}"] = [_equal(model), saved.step]
        if rank == 0:  # a file that only one of the two examines
            truncate(next(Path(out, "sharded", "step-00000002").glob("__1_0.distcp")))
        dist.barrier()
        saved = sharded.find()
        found["older"] = saved.step if saved else None
        if rank == 1:
            ArrowFiles = distcp.ArrowFileSystem

            def fail(self: Any, path: Any, mode: str) -> Any:
                raise OSError(28, "No space left on device")

            ArrowFiles.create_stream = fail  # type: ignore[method-assign]
        try:
            sharded.save(3, _named(_sharded()), {}, wait=True)
        except OutputError as error:
            found["failed"] = str(error)
        found["left"] = steps_of(Path(out, "sharded"))
        Path(out, f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_workers_share_the_work_and_agree(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_two, (port, str(tmp_path)), nprocs=2)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for found in (main, other):
        for saved, step in (("sharded", 2), ("plain", 5)):
            for kind in ("sharded", "plain"):
                assert found[f"{saved} into {kind}"] == [True, step]
        assert found["older"] == 1, "both know of the damage that one has seen"
        assert "a checkpoint cannot be written: No space left on device" in found["failed"]
    assert other["left"] == [1, 2]
    # one process reads what two have written
    model = _zero(_model())
    folder = CheckpointFolder(str(tmp_path / "sharded"), "a")
    saved = folder.find()
    assert saved is not None
    assert saved.step == 1
    folder.load(saved, _named(model))
    assert _equal(model)
