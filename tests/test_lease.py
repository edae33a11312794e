"""One command at a time: who holds a results folder, who may follow, and how the holder learns of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raydisp import storage
from raydisp.errors import OutputError
from raydisp.storage import lease


def holder(folder: Path, **changed: object) -> str:
    """Write a lease as another command would have, and return its id."""
    content = {"id": "other", **lease._myself(), **changed}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / lease.LEASE_NAME).write_text(json.dumps(content))
    return str(content["id"])


def elsewhere(folder: Path, age_s: float) -> None:
    """A lease of a process on another host, whose last sign of life is so old."""
    holder(folder, host="node7", host_id="node7", process=123)
    then = time.time() - age_s
    os.utime(folder / lease.LEASE_NAME, (then, then))


HOLD = """
import sys, time
from raydisp.storage import lease
with lease.hold(sys.argv[1]) as held:
    print(held.id, flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_a_folder_is_held_and_given_back(tmp_path: Path) -> None:
    folder = str(tmp_path / "study")
    with lease.hold(folder) as held:
        assert lease.still_held(folder, held.id)
        with pytest.raises(OutputError) as told, lease.hold(folder):
            pass
        message = str(told.value)
        assert f"is in use by another raydisp: process {os.getpid()} on " in message
        assert "UTC, last sign of life 0 s ago; wait for it, or stop it (kill -INT" in message
    assert not lease.still_held(folder, held.id)
    with pytest.raises(RuntimeError), lease.hold(folder) as again:
        raise RuntimeError
    assert again.id != held.id
    assert {file.name for file in Path(folder).iterdir()} == {lease.LOCK_NAME}, (
        "given back after an error too"
    )


def test_a_process_that_was_killed_is_followed_at_once(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    try:
        with pytest.raises(OutputError, match=f"process {process.pid} on "), lease.hold(str(tmp_path)):
            pass
        process.kill()
        process.wait()
        with lease.hold(str(tmp_path)) as held:
            assert lease.still_held(str(tmp_path), held.id)
    finally:
        process.kill()


def test_ctrl_c_gives_it_back(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    assert not (tmp_path / lease.LEASE_NAME).exists()


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    holder(tmp_path, process_start="1")
    with lease.hold(str(tmp_path)):
        pass


def test_another_host_is_followed_when_its_lease_has_run_out(tmp_path: Path) -> None:
    elsewhere(tmp_path, lease.EXPIRY_S - 20)
    with (
        pytest.raises(
            OutputError, match=r"process 123 on node7.* life 40 s ago.*is free at \d\d:\d\d:\d\d UTC"
        ),
        lease.hold(str(tmp_path)),
    ):
        pass
    elsewhere(tmp_path, lease.EXPIRY_S + 5)
    with lease.hold(str(tmp_path)) as held:
        assert lease.still_held(str(tmp_path), held.id)


def test_age_is_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose clock is an hour ahead must not take what is in use."""
    elsewhere(tmp_path, 5)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    with pytest.raises(OutputError, match="is in use"), lease.hold(str(tmp_path)):
        pass


def test_a_heartbeat_renews_and_a_failing_one_only_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    place = tmp_path / lease.LEASE_NAME
    with lease.hold(str(tmp_path)) as held:
        os.utime(place, (0, 0))
        wait_until(lambda: place.stat().st_mtime > 1)
        with monkeypatch.context() as broken:
            broken.setattr(storage, "write_bytes", raise_full)
            wait_until(lambda: "no sign of life could be written: disk full" in caplog.text)
        os.utime(place, (0, 0))
        wait_until(lambda: place.stat().st_mtime > 1)
        assert not held.lost.is_set()


def raise_full(location: str, content: bytes) -> None:
    raise OutputError("disk full")


def wait_until(condition: object, timeout_s: float = 10) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_holder_that_was_followed_learns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    with lease.hold(str(tmp_path)) as held:
        other = holder(tmp_path)
        assert held.lost.wait(10)
        assert not lease.still_held(str(tmp_path), held.id)
    assert lease.still_held(str(tmp_path), other), "what is another's is not given back"


def test_a_lease_that_cannot_be_read_just_now_counts_as_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease.hold(str(tmp_path)) as held:
        monkeypatch.setattr(storage, "read_bytes", lambda location: raise_full(location, b""))
        assert lease.still_held(str(tmp_path), held.id)


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    end = threading.Barrier(8)
    got: list[str] = []

    def try_it() -> None:
        start.wait()
        try:
            with lease.hold(str(tmp_path)) as held:
                got.append(held.id)
                end.wait()
        except OutputError:
            end.wait()

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


@pytest.fixture
def object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that is not `LocalFileSystem`, so that the ways for object stores are taken."""
    local = pafs.LocalFileSystem()
    (tmp_path / "bucket").mkdir()
    store = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), local)
    real = storage.resolve

    def resolve(location: str) -> tuple[pafs.FileSystem, str]:
        return (store, location[5:]) if location.startswith("s3://") else real(location)

    monkeypatch.setattr(storage, "resolve", resolve)
    return "s3://results/study"


def test_object_stores_are_held_as_well_as_they_can(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    with lease.hold(object_store) as held:
        assert lease.still_held(object_store, held.id)
        with pytest.raises(OutputError, match="is in use"), lease.hold(object_store):
            pass
    assert not lease.still_held(object_store, held.id)
    # Somebody else writes at the same moment, and last.
    monkeypatch.setattr(time, "sleep", lambda seconds: holder(tmp_path / "bucket" / "results" / "study"))
    with pytest.raises(OutputError, match="is in use"), lease.hold(object_store):
        pass
