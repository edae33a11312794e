"""Files in a local folder or an object store, through `pyarrow.fs`: written whole or not at all.

A local file appears under its name only when it is whole: it is written beside it under a name that readers
skip (`_tmp-...`), flushed to the disk, and renamed. Object stores show an object only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator

import pyarrow.fs as pafs

from raydisp.errors import OutputError


def resolve(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path on it that a local path or a URI (`s3://...`, `gs://...`) means.

    Raises:
        OutputError: there is no such file system, or it cannot be reached.
    """
    if "\0" in location:
        raise OutputError(f"{location!r} is no path: it holds a null character")
    if "://" in location:
        try:
            filesystem, path = pafs.FileSystem.from_uri(location)
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"{location} cannot be reached: {reason}; give a folder, or a URI such as s3://bucket/folder"
            ) from None
        return filesystem, path
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))


def join(location: str, *parts: str) -> str:
    """A place below a local path or URI."""
    return "/".join([location.rstrip("/") or "/", *parts])


def local_absolute(location: str) -> str:
    """A local path made absolute; a URI as it is."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def exists(location: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(location)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def write_bytes(location: str, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    filesystem, path = resolve(location)
    try:
        parent = path.rsplit("/", 1)[0]
        filesystem.create_dir(parent, recursive=True)
        if not isinstance(filesystem, pafs.LocalFileSystem):
            # Object stores show an object only when its upload is complete.
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        temporary = f"{parent}/_tmp-{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise OutputError(
            f"{location} cannot be written: {error.strerror or error}; make the folder writable, free some "
            "space, or choose another one with --output"
        ) from None


def read_bytes(location: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        OutputError: it cannot be read.
    """
    filesystem, path = resolve(location)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(location) from None
    except OSError as error:
        raise OutputError(f"{location} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Hold a local folder for this process alone; the lock ends with the process, however it ends.

    Object stores have no such lock; there it does nothing.

    Raises:
        OutputError: another process holds it.
    """
    filesystem, path = resolve(folder)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    filesystem.create_dir(path, recursive=True)
    with open(os.path.join(path, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OutputError(
                f"{folder} is in use by another raydisp ({file.read().strip()}); wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def delete_dir(location: str) -> None:
    """Remove a folder and all below it; nothing happens where there is none."""
    filesystem, path = resolve(location)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_dir(path)


def check_writable(study_dir: str) -> None:
    """Find out before anything starts whether results can be written, and leave nothing behind.

    Raises:
        OutputError: they cannot.
    """
    filesystem, path = resolve(study_dir)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        probe = join(study_dir, "_probe")
        write_bytes(probe, b"")
        filesystem.delete_file(resolve(probe)[1])
        return
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise OutputError(
            f"{study_dir} cannot be a results folder: {existing} is a file; "
            "choose another place with --output"
        )
    try:
        # os.access says yes to root and on read-only mounts of some kinds; a real file tells.
        probe_path = os.path.join(existing, f"_tmp-{uuid.uuid4().hex}")
        with open(probe_path, "xb"):
            pass
        os.unlink(probe_path)
    except OSError as error:
        raise OutputError(
            f"{study_dir} cannot be written: {existing}: {error.strerror}; make the folder writable "
            "or choose another one with --output"
        ) from None
