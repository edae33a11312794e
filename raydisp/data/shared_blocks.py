"""Token blocks made once for all nodes: a copy beside the results in an object store, fetched once per node.

<output>/.cache/<key>/train.arrow, ...   the files of a prepared folder
                      WHOLE              written last: size and SHA-256 of each of them

Blocks are memory-mapped, so every node keeps a copy of its own. On a folder that all nodes share there is
nothing to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from raydisp import storage
from raydisp.errors import OutputError
from raydisp.storage import fingerprint

logger = logging.getLogger(__name__)

MARKER = "WHOLE"
CHUNK_BYTES = 8 << 20


def publish(prepared: str, output: str) -> None:
    """Copy a prepared folder of this node beside the results, unless it is there or they are no object store.

    Raises:
        OutputError: the store cannot be written.
    """
    place = _place(prepared, output)
    if place is None or storage.exists(storage.join(place, MARKER)):
        return
    files = {}
    for path in sorted(Path(prepared).rglob("*")):
        if path.is_file():
            name = path.relative_to(prepared).as_posix()
            _copy(str(path), storage.join(place, name))
            files[name] = _fingerprint(str(path))._asdict()
    storage.write_bytes(storage.join(place, MARKER), json.dumps(files, indent=2).encode())


def fetch(prepared: str, output: str) -> bool:
    """Have a prepared folder on this node, if it is there or beside the results; returns whether it is.

    Several processes of a node may ask at once: one fetches, the others wait for it.
    """
    if _is_whole(prepared):
        return True
    place = _place(prepared, output)
    if place is None:
        return False
    try:
        files = json.loads(storage.read_bytes(storage.join(place, MARKER)))
        parent = Path(prepared).parent
        parent.mkdir(parents=True, exist_ok=True)
        with _alone(parent / f".fetching-{Path(prepared).name}.lock"):
            if not _is_whole(prepared):
                _fetch(place, files, Path(prepared))
        return True
    except FileNotFoundError:
        return False
    except (OutputError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is left out, and the token blocks are made anew: %s", place, error)
        return False


def _fetch(place: str, files: dict[str, dict[str, object]], prepared: Path) -> None:
    temporary = prepared.parent / f".making-{prepared.name[:16]}-{uuid.uuid4().hex}"
    try:
        for name, told in files.items():
            target = temporary / name
            if not target.resolve().is_relative_to(temporary.resolve()):
                raise OutputError(f"{place} names {name!r}, which is not inside the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(storage.join(place, name), str(target))
            if _fingerprint(str(target)) != fingerprint.Fingerprint.parse(told):
                raise OutputError(f"{place}/{name} is damaged: its content is not what was written")
        temporary.rename(prepared)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(prepared: str, output: str) -> str | None:
    return storage.join(output, ".cache", os.path.basename(prepared)) if "://" in output else None


def _is_whole(prepared: str) -> bool:
    return os.path.isfile(os.path.join(prepared, "meta.json"))


def _copy(source: str, target: str) -> None:
    """A file of any size, piece by piece."""
    from_filesystem, from_path = storage.resolve(source)
    to_filesystem, to_path = storage.resolve(target)
    pafs.copy_files(
        from_path,
        to_path,
        source_filesystem=from_filesystem,
        destination_filesystem=to_filesystem,
        chunk_size=CHUNK_BYTES,
    )


def _fingerprint(path: str) -> fingerprint.Fingerprint:
    found = fingerprint.of_file(path)
    if found is None:
        raise OutputError(f"{path} is gone")
    return found


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
