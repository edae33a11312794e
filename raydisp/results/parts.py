"""The Parquet files that make up a table just now, and reading one of them.

A table is a folder of files. Small ones come from trials; `raydisp.results.compaction` replaces many of them
by one, `compact-<n>.parquet`. What it is doing stands in the table's journal, `_compaction.json`, so that a
reader can see every row once at any moment:

    {"number": 3, "moving": {"temporary": "_compact-3.tmp", "final": "compact-3.parquet", "num_bytes": 123,
                             "replaced": ["trial-00000-attempt-1.parquet", ...]}}

While something is moving, the temporary file (or, once renamed, the final one) stands for those it replaces.
Afterwards `moving` is null; the number stays, so that no name is used twice and a reader can tell that
something changed while it read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydisp import storage
from raydisp.errors import OutputError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
VERSION_KEY = b"raydisp.schema_version"
JOURNAL_NAME = "_compaction.json"
NEWER = "a newer raydisp wrote it"
COMPACT_NAME = re.compile(r"compact-(\d+)\.parquet")
NUM_READERS = min(8, 2 * (os.cpu_count() or 1))
MIN_FILES_FOR_THREADS = 32

_warned: set[str] = set()
_warned_lock = threading.Lock()
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Move:
    """Files of a table that are being replaced by one."""

    temporary: str
    final: str
    """What the temporary file is called in the end."""
    num_bytes: int
    replaced: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Journal:
    """What a table's compaction has done last, or is doing."""

    number: int = 0
    moving: Move | None = None

    def to_bytes(self) -> bytes:
        """As it is written."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()


def read_journal(folder: str, *, strict: bool = False) -> Journal:
    """A table's journal; an empty one where there is none.

    Args:
        strict: for those who change the folder: a journal that cannot be read is an error, not a warning.
    Raises:
        OutputError: strict, and it cannot be read, or is none.
    """
    place = storage.join(folder, JOURNAL_NAME)
    try:
        tree = json.loads(storage.read_bytes(place))
        moving = tree["moving"]
        if moving is not None:
            moving = Move(
                str(moving["temporary"]),
                str(moving["final"]),
                int(moving["num_bytes"]),
                tuple(map(str, moving["replaced"])),
            )
        return Journal(int(tree["number"]), moving)
    except FileNotFoundError:
        return Journal()
    except (OutputError, ValueError, TypeError, KeyError) as error:
        if strict:
            raise OutputError(
                f"{place} cannot be read as a journal of raydisp's ({error}); remove it if no compaction of "
                "the folder was cut short"
            ) from None
        leave_out(place, f"it cannot be read as a journal ({error})")
        return Journal()


def current_files(folder: str, journal: Journal, *, below: str = "") -> list[str]:
    """Files of a table by their paths relative to its folder, those it replaces left out while moving.

    Args:
        below: list only this folder of it, and the compact files.
    """
    if below:
        names = [
            *(name for name in storage.list_files(folder, recursive=False) if COMPACT_NAME.fullmatch(name)),
            *(f"{below}/{name}" for name in storage.list_files(storage.join(folder, below))),
        ]
    else:
        names = storage.list_files(folder)
    return _as_moving(folder, journal, [name for name in names if name.endswith(".parquet")])


def compact_files(folder: str, journal: Journal) -> list[str]:
    """Those of a table's files that compaction made."""
    names = storage.list_files(folder, recursive=False)
    return _as_moving(folder, journal, [name for name in names if COMPACT_NAME.fullmatch(name)])


def _as_moving(folder: str, journal: Journal, files: list[str]) -> list[str]:
    moving = journal.moving
    if moving is None:
        return files
    gone = {*moving.replaced, moving.final}
    renamed = storage.file_size(storage.join(folder, moving.temporary)) is None
    return [*(name for name in files if name not in gone), moving.final if renamed else moving.temporary]


def in_parallel(function: Callable[[str], _Result], items: Sequence[str]) -> list[_Result]:
    """A function of each item in order, by a few threads where there are many."""
    if len(items) < MIN_FILES_FOR_THREADS:
        return [function(item) for item in items]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(function, items, chunksize=16))


# --- one file ------------------------------------------------------------------------------------------


def read_part(
    location: str, base: pa.Schema, *, trial: int | None = None, strict: bool = False
) -> pa.Table | None:
    """The rows of one file, with all columns of the base schema; None where it is left out, with a warning.

    Args:
        trial: only the rows of this one; row groups without it are not decoded.
        strict: a file that is there and cannot be read just now, one of a newer raydisp, and a damaged
            compact file are errors: trials whose rows they hold would else be taken for new.
    Raises:
        FileNotFoundError: there is no such file (any more).
        OutputError: as `strict` says.
    """
    compact = COMPACT_NAME.fullmatch(location.rsplit("/", 1)[-1]) is not None
    try:
        content = storage.read_bytes(location)
        file = pq.ParquetFile(pa.BufferReader(content))
        problem = _foreign(file.schema_arrow, base)
        if problem:
            if strict and (compact or NEWER in problem):
                raise OutputError(f"{location} cannot be used: {problem}")
            leave_out(location, problem)
            return None
        if trial is None:
            # One thread decodes a file: many files are read at once, and starting threads costs more than it
            # saves on small ones.
            table = file.read(use_threads=len(content) > 1 << 20)
        else:
            table = file.read_row_groups(_row_groups_of(file, trial), use_threads=False)
            table = table.filter(pc.equal(table["trial"], trial))
    except OutputError as error:
        if strict:
            raise
        leave_out(location, str(error))
        return None
    except IsADirectoryError:
        leave_out(location, "it is a folder")
        return None
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError):
            raise
        told = " ".join(str(error).split())[:200]
        if strict and compact:
            raise OutputError(
                f"{location} holds the rows of many trials and is not a whole Parquet file ({told}); restore "
                "it, or move it away to run its trials again"
            ) from None
        leave_out(location, f"it is not a whole Parquet file ({told})")
        return None
    names = set(table.column_names)
    for field in base:  # written before there was this column
        if field.name not in names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.replace_schema_metadata(None)


def leave_out(location: str, reason: str) -> None:
    """Say once in a process that a file is left out, and why."""
    with _warned_lock:
        if location in _warned:
            return
        _warned.add(location)
    logger.warning("%s is left out: %s", location, reason)


def _foreign(schema: pa.Schema, base: pa.Schema) -> str:
    """Why a file's rows are not rows of the table; '' where they are."""
    told = (schema.metadata or {}).get(VERSION_KEY)
    if told is not None:
        if not told.isdigit():
            return f"its {VERSION_KEY.decode()} is not a number"
        if int(told) > SCHEMA_VERSION:
            return (
                f"{NEWER} (schema_version {int(told)}, this one knows {SCHEMA_VERSION}); "
                "update raydisp to read it"
            )
    kinds: dict[str, pa.DataType] = {}
    for field in schema:
        if field.name in kinds:
            return f"it has several columns {field.name}"
        kinds[field.name] = field.type
    missing = [field.name for field in base if field.name not in kinds]
    if missing and (told is None or {"trial", "attempt"} & set(missing)):
        return f"it has no column {', '.join(missing)}"
    for field in base:
        found = kinds.get(field.name, field.type)
        if found != field.type and not _same_list(found, field.type):
            return f"its column {field.name} is {found}, not {field.type}"
    return ""


def _same_list(found: pa.DataType, kind: pa.DataType) -> bool:
    """How a list calls its items is no difference."""
    return bool(pa.types.is_list(found) and pa.types.is_list(kind) and found.value_type == kind.value_type)


def _row_groups_of(file: pq.ParquetFile, trial: int) -> list[int]:
    column = file.schema_arrow.get_field_index("trial")
    groups = []
    for group in range(file.metadata.num_row_groups):
        # Only the first columns' numbers agree between Arrow and Parquet; `trial` is before any nested one.
        statistics = file.metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= trial <= statistics.max:
            groups.append(group)
    return groups


def unite(parts: Sequence[tuple[str, pa.Table]], base: pa.Schema) -> tuple[pa.Table, list[str]]:
    """All rows in one table, and the names of the files that they are from.

    A column that some files lack is null there; whole numbers and fractions in the same column become
    fractions; a file whose column is of a kind that does not go with the first one's is left out.
    """
    kinds: dict[str, Any] = {}
    kept: list[tuple[str, pa.Table]] = []
    last: pa.Schema | None = None
    for name, table in parts:
        if last is not None and table.schema.equals(last):
            kept.append((name, table))
            continue
        clash = [
            field
            for field in table.schema
            if field.name in kinds and not _go_together(kinds[field.name], field.type)
        ]
        if clash:
            field = clash[0]
            leave_out(name, f"its column {field.name} is {field.type}, that of others {kinds[field.name]}")
            continue
        for field in table.schema:
            if not pa.types.is_null(field.type):
                kinds.setdefault(field.name, field.type)
        last = table.schema
        kept.append((name, table))
    if not kept:
        return base.empty_table(), []
    table = pa.concat_tables([table for _, table in kept], promote_options="permissive")
    return table.combine_chunks(), [name for name, _ in kept]


def _go_together(kind: pa.DataType, other: pa.DataType) -> bool:
    def is_number(one: pa.DataType) -> bool:
        return bool(pa.types.is_integer(one) or pa.types.is_floating(one))

    return bool(kind == other or pa.types.is_null(other) or (is_number(kind) and is_number(other)))
