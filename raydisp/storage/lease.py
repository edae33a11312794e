"""One command at a time writes a results folder: a lease, kept alive by its holder's heartbeat.

The lease is a small file in the folder, `.lease.json`: who holds it, since when, and by which id. A thread of
the holder writes it anew every HEARTBEAT_S. Whoever comes next is refused, except that

- a holder on the same host whose process is gone is followed at once,
- a holder elsewhere is followed when its last sign of life is older than EXPIRY_S. The clocks of two hosts
  differ, so both times are those of the file system: the lease's, and that of a file written just now.

On local disks and NFS a lock is held while the lease is read and written, so that two commands cannot both
get it. Object stores have no such lock: there the lease is written, and read again SETTLE_S later; of two
commands that come at the same moment the last writer wins, and one that stalls for longer than that in
between notices only with its first heartbeat. A holder that was followed learns it from its next heartbeat
(`Lease.lost`), and its other processes from `still_held`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from raydisp import storage
from raydisp.errors import OutputError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
EXPIRY_S = 60.0
SETTLE_S = 2.0
LOCK_TIMEOUT_S = 10.0

LEASE_NAME = ".lease.json"
LOCK_NAME = ".lease.lock"


@dataclasses.dataclass(frozen=True)
class Lease:
    """A results folder is this process's."""

    study_dir: str
    id: str
    lost: threading.Event
    """Set when somebody else was found to hold the folder: stop, and write nothing more."""


@contextlib.contextmanager
def hold(study_dir: str) -> Iterator[Lease]:
    """Hold a results folder, made if it is not there, until the block ends, however it ends.

    Raises:
        OutputError: another command holds it, or it cannot be written.
    """
    filesystem, path = storage.resolve(study_dir)
    try:
        filesystem.create_dir(path, recursive=True)
    except OSError as error:
        raise OutputError(f"{study_dir} cannot be written: {error.strerror or error}") from None
    lease = Lease(study_dir, secrets.token_hex(16), threading.Event())
    content = json.dumps({"id": lease.id, **_myself()}).encode()
    _acquire(lease, content)
    ended = threading.Event()
    thread = threading.Thread(
        target=_keep_alive, args=(lease, content, ended), name="raydisp-lease", daemon=True
    )
    try:
        thread.start()
        yield lease
    finally:
        ended.set()
        thread.join(timeout=HEARTBEAT_S)
        _release(lease)


def still_held(study_dir: str, lease_id: str) -> bool:
    """Whether a lease is the one in force; one small read.

    Only a lease that is gone, or another's, says no; a file that cannot be read just now counts as held.
    """
    try:
        return bool(_read(study_dir).get("id", lease_id) == lease_id)
    except FileNotFoundError:
        return False


# --- taking, renewing and giving back ------------------------------------------------------------------


def _acquire(lease: Lease, content: bytes) -> None:
    with _locked(lease.study_dir):
        try:
            holder = _read(lease.study_dir)
        except FileNotFoundError:
            holder = None
        if holder is not None:
            _refuse_if_alive(lease.study_dir, holder)
            logger.warning(
                "%s was held by %s, which has ended without giving it back", lease.study_dir, _name(holder)
            )
        storage.write_bytes(_place(lease.study_dir), content)
    if not _is_local(lease.study_dir):
        time.sleep(SETTLE_S)
        with contextlib.suppress(FileNotFoundError):
            holder = _read(lease.study_dir)
            if holder.get("id", lease.id) != lease.id:
                _refuse_if_alive(lease.study_dir, holder)


def _refuse_if_alive(study_dir: str, holder: dict[str, Any]) -> None:
    """Raise unless a lease's holder is known to be gone."""
    age = _age(study_dir)
    here = holder.get("host_id") == _host_id()
    if here and not _is_running(holder.get("process"), holder.get("process_start")):
        return
    if not here and age > EXPIRY_S:
        return
    if here:
        remedy = f"wait for it, or stop it (kill -INT {holder.get('process')})"
    else:
        expires = datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(seconds=EXPIRY_S - age)
        remedy = (
            f"wait for it, or stop it there; if it gives no further sign of life, the folder is free at "
            f"{expires:%H:%M:%S} UTC"
        )
    raise OutputError(
        f"{study_dir} is in use by another raydisp: {_name(holder)}, since {holder.get('since')}, last sign "
        f"of life {max(0.0, age):.0f} s ago; {remedy}"
    )


def _keep_alive(lease: Lease, content: bytes, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        try:
            with _locked(lease.study_dir):
                if not still_held(lease.study_dir, lease.id):
                    lease.lost.set()
                    logger.error(
                        "%s is no longer held by this command: another took it over", lease.study_dir
                    )
                    return
                if not ended.is_set():
                    storage.write_bytes(_place(lease.study_dir), content)
        except (OutputError, OSError) as error:
            logger.warning("no sign of life could be written: %s", error)


def _release(lease: Lease) -> None:
    try:
        with _locked(lease.study_dir):
            holder = _read(lease.study_dir)
            if holder.get("id") == lease.id:
                storage.delete_file(_place(lease.study_dir))
    except FileNotFoundError:
        return
    except (OutputError, OSError) as error:
        logger.warning(
            "%s could not be given back and stays held until it expires: %s", lease.study_dir, error
        )


@contextlib.contextmanager
def _locked(study_dir: str) -> Iterator[None]:
    """Alone while the lease is read and written; object stores and some file systems have no lock."""
    if not _is_local(study_dir):
        yield
        return
    try:
        file = open(os.path.join(storage.resolve(study_dir)[1], LOCK_NAME), "a")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(
            f"{study_dir} cannot be written: {error.strerror}; make the folder writable"
        ) from None
    with file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"{study_dir}: another command has kept {LOCK_NAME} locked for "
                        f"{LOCK_TIMEOUT_S:.0f} s; stop it, or try again"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                logger.warning(
                    "%s has no file locks (%s); its lease is best effort", study_dir, error.strerror
                )
                break
        yield


def _read(study_dir: str) -> dict[str, Any]:
    """The lease in force; {} where it cannot be read just now, or is not one.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        held = json.loads(storage.read_bytes(_place(study_dir)))
    except (OutputError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _place(study_dir: str) -> str:
    return storage.join(study_dir, LEASE_NAME)


def _is_local(study_dir: str) -> bool:
    return isinstance(storage.resolve(study_dir)[0], pafs.LocalFileSystem)


def _age(study_dir: str) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    written = storage.modified_at(_place(study_dir))
    probe = storage.join(study_dir, f".lease-clock-{secrets.token_hex(8)}")
    storage.write_bytes(probe, b"now")
    try:
        now = storage.modified_at(probe)
    finally:
        storage.delete_file(probe)
    return now - written if now is not None and written is not None else 0.0


# --- who ----------------------------------------------------------------------------------------------


def _myself() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "host": socket.gethostname(),
        "host_id": _host_id(),
        "since": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
    }


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return f"an unknown process ({LEASE_NAME} cannot be read)"
    return f"process {holder.get('process')} on {holder.get('host')}"


def _host_id() -> str:
    """Where a process number means the same process: this boot of this machine, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_running(process: Any, start: Any) -> bool:
    if not isinstance(process, int):
        return True
    if os.path.isdir("/proc/self"):
        return (now := _process_start(process)) is not None and now == start
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _process_start(process: int) -> str | None:
    """When a process began, in ticks since boot; None where it is gone, or a zombie, or there is no /proc."""
    try:
        with open(f"/proc/{process}/stat") as file:
            # The name in parentheses may hold anything; state is the first field after it, start the 20th.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
