"""Files in a local folder or an object store, through `pyarrow.fs`: written whole or not at all.

A local file appears under its name only when it is whole: it is written beside it under a name that readers
skip (`_tmp-...`), flushed to the disk, and renamed. Object stores show an object only when it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import uuid

import pyarrow.fs as pafs

from raydisp.errors import OutputError

logger = logging.getLogger(__name__)

OBJECT_STORES = ("s3", "gs", "gcs")

_SECRETS = re.compile(
    r"://[^/:@]+:(?!\d+(?:/|$))[^@]*@|[?&][^=&]*(?:password|token|secret|key)[^=&]*=", re.IGNORECASE
)
"""A password before the host (a port is none), or a secret among the options of a URI."""


def resolve(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path on it that a local path or a URI (`s3://...`, `gs://...`) means.

    Raises:
        OutputError: there is no such file system, it cannot be reached, or there is a secret in the URI.
    """
    if "\0" in location:
        raise OutputError(f"{location!r} is no path: it holds a null character")
    if "://" in location:
        if _SECRETS.search(location):
            # Without what was found: it would stand in a log.
            raise OutputError(
                f"{location.partition('://')[0]}://... holds a password or a key, and the place of results "
                "is written into rows, logs and reports; leave it out and give it by the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), a profile, or a role of the machine"
            )
        scheme, _, rest = location.partition("://")
        bucket, slash, key = rest.partition("/")
        try:
            if scheme in OBJECT_STORES and "?" not in rest and bucket and "@" not in bucket:
                settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
                return _object_store(scheme, bucket, settings), bucket + slash + key.rstrip("/")
            filesystem, path = pafs.FileSystem.from_uri(location)
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"{location} cannot be reached: {reason}; give a folder, or a URI such as s3://bucket/folder"
            ) from None
        return filesystem, path
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))


@functools.lru_cache(maxsize=64)
def _object_store(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """Made once: a new client asks for its credentials and for the bucket's region anew, for every file.

    Args:
        settings: the environment that it was made in; another one needs another client.
    """
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]


def _is_object_store(filesystem: pafs.FileSystem) -> bool:
    return filesystem.type_name in OBJECT_STORES


def join(location: str, *parts: str) -> str:
    """A place below a local path or URI; "" is the working directory, as elsewhere."""
    return "/".join([location.rstrip("/") or location[:1], *parts] if location else parts)


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
        if _is_object_store(filesystem):
            # It has no folders, and shows an object only when its upload is complete.
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        filesystem.create_dir(parent, recursive=True)
        if not isinstance(filesystem, pafs.LocalFileSystem):
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
    except IsADirectoryError:
        raise OutputError(f"{location} cannot be written: it is a folder; name a file") from None
    except OSError as error:
        raise OutputError(
            f"{location} cannot be written: {error.strerror or error}; make the folder writable, free some "
            "space, or choose another place"
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


def list_files(location: str, *, recursive: bool = True) -> list[str]:
    """Paths below a folder, relative to it and sorted, without hidden ones; [] without a folder.

    A folder in it that cannot be read is named in a warning. One whose name ends in `.parquet` is listed too,
    so that a reader can say what it is.
    """
    found = _all_files(location, recursive=recursive)
    return sorted(name for name in found if not any(part[:1] in ("_", ".") for part in name.split("/")))


def list_versions(location: str) -> list[tuple[str, int, int]]:
    """Path, size and time of writing of every file below a folder; they tell whether anything has changed."""
    filesystem, path = resolve(location)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    return sorted(
        (info.path, int(info.size or 0), int(info.mtime_ns or 0))
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File and not info.base_name.startswith(("_", "."))
    )


def version_of(location: str) -> tuple[int, int] | None:
    """Size and time of writing of a file; None where there is none."""
    filesystem, path = resolve(location)
    info = filesystem.get_file_info(path)
    return (int(info.size), int(info.mtime_ns or 0)) if info.type == pafs.FileType.File else None


def list_leftovers(location: str) -> list[str]:
    """Names in a folder that `list_files` leaves out."""
    return sorted(name for name in _all_files(location, recursive=False) if name[:1] in ("_", "."))


def _all_files(location: str, *, recursive: bool) -> list[str]:
    filesystem, path = resolve(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return _walk(path, recursive=recursive)  # Arrow would ask for the size of each file
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return [
        info.path.removeprefix(path).lstrip("/")
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
    ]


def _walk(path: str, *, recursive: bool) -> list[str]:
    def tell(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            logger.warning("%s cannot be read and is left out: %s", error.filename, error.strerror)

    found: list[str] = []
    for folder, folders, files in os.walk(path, onerror=tell):
        below = os.path.relpath(folder, path)
        prefix = "" if below == "." else f"{below}/"
        odd = [name for name in folders if name.endswith(".parquet")]
        found.extend(prefix + name for name in [*files, *odd])
        if not recursive:
            break
    return found


def delete_file(location: str) -> None:
    """Remove a file; nothing happens where there is none.

    Raises:
        OutputError: it cannot be removed.
    """
    filesystem, path = resolve(location)
    try:
        filesystem.delete_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{location} cannot be removed: {error.strerror or error}") from None


def rename(location: str, new: str) -> None:
    """Give a file another name, replacing what has it; on an object store it is copied and removed.

    Raises:
        FileNotFoundError: there is no such file.
        OutputError: it cannot be renamed.
    """
    filesystem, path = resolve(location)
    try:
        filesystem.move(path, resolve(new)[1])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(f"{location} cannot be renamed: {error.strerror or error}") from None


def sync_folder(location: str) -> None:
    """Make the names in a local folder survive a loss of power; object stores need nothing."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_empty_folders(location: str) -> None:
    """Remove the empty folders right below a local folder; object stores have none."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, pafs.LocalFileSystem) and os.path.isdir(path):
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(entry.path)


def file_size(location: str) -> int | None:
    """Bytes of a file; None where there is none."""
    filesystem, path = resolve(location)
    info = filesystem.get_file_info(path)
    return int(info.size) if info.type == pafs.FileType.File else None


def modified_at(location: str) -> float | None:
    """When a file was written, in seconds by the clock of the place that keeps it; None without a file."""
    filesystem, path = resolve(location)
    info = filesystem.get_file_info(path)
    return None if info.mtime_ns is None else info.mtime_ns / 1e9


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
        delete_file(probe)
        return
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise OutputError(
            f"{study_dir} cannot be a results folder: {existing} is a file; choose another place"
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
            "or choose another place"
        ) from None
