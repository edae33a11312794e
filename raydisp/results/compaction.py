"""Many small files of a results folder become one, and no reader sees a row twice.

Only files of trials that no command will go on with are merged: completed, pruned, diverged. What a trial
wrote past its last checkpoint is dropped by whole files when it goes on, and a failed one may be tried again.
For each table, under the folder's lease:

1. the rows of the small files and of the earlier compact file are written to `_compact-<n>.tmp`, which no
   glob for `*.parquet` finds;
2. the journal is written: these files are replaced by that one;
3. the files that it replaces are deleted;
4. the new file gets its name, `compact-<n>.parquet`;
5. the journal says that nothing is moving.

raydisp's own readers follow the journal and see every row once at any moment. A plain glob may miss the rows
that are moving between 3 and 4, for as long as deleting takes; it never sees one twice. Cut short before 2,
nothing has happened; after it, the next compaction or the next run of the study goes on at 3 (`finish`).
"""

from __future__ import annotations

import dataclasses
import logging
import re

import pyarrow as pa
import pyarrow.compute as pc

from raydisp import results, storage
from raydisp.errors import OutputError
from raydisp.results import parts
from raydisp.storage import lease

logger = logging.getLogger(__name__)

MAX_COMPACT_BYTES = 256 << 20
"""A compact file of this size is left alone; the next one is begun."""

ROW_GROUP_SIZE = {"trials": 2048, "steps": 65536, "evals": 65536, "layers": 8192, "items": 65536}
"""Rows of a group: some MB, and few enough that one trial's rows are found without decoding everything."""

FINAL_STATUSES = ("completed", "pruned", "diverged")
"""Trials that no command will ever go on with."""

TABLES = ("trials", *results.ROW_SCHEMAS)

_TRIAL_FILE = re.compile(r"trial-(\d+)-attempt-(\d+)\.parquet|trial-(\d+)/until-\d+\.parquet")
_TEMPORARY = re.compile(r"_compact-(\d+)\.tmp")


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of one table."""

    table: str
    num_files: int
    """Files that were replaced; 0: there was nothing to do."""
    num_rows: int
    file: str | None
    """The new one."""


def compact(study_dir: str) -> list[Merged]:
    """Merge the small files of trials that have ended; one item per table.

    Raises:
        OutputError: another command holds the folder, or it cannot be read or written.
    """
    with lease.hold(study_dir) as held:
        finish(study_dir)
        ended = _ended_trials(study_dir)
        return [_compact_table(held, name, ended) for name in TABLES]


def finish(study_dir: str) -> None:
    """Bring what an earlier compaction left half done to its end; the caller holds the folder's lease."""
    for name in TABLES:
        folder = storage.join(study_dir, name)
        journal = parts.read_journal(folder, strict=True)
        if journal.moving:
            _move(folder, journal)
        for file in storage.list_leftovers(folder):
            if _TEMPORARY.fullmatch(file):  # no journal names it: it may not be whole
                storage.delete_file(storage.join(folder, file))


def _ended_trials(study_dir: str) -> set[int]:
    """Trials whose last attempt will not go on. One with a file that cannot be read may have another one."""
    folder = storage.join(study_dir, "trials")
    base = results.base_schema("trials")
    latest: dict[int, tuple[int, bool]] = {}
    in_doubt: set[int] = set()
    files = parts.current_files(folder, parts.read_journal(folder, strict=True))
    tables = parts.in_parallel(lambda file: parts.read_part(storage.join(folder, file), base), files)
    for file, table in zip(files, tables, strict=True):
        match = _TRIAL_FILE.fullmatch(file)
        if table is None:
            in_doubt |= {int(match[1])} if match and match[1] else set()
            continue
        rows = table.select(["trial", "attempt", "status"]).to_pydict()
        for trial, attempt, status in zip(rows["trial"], rows["attempt"], rows["status"], strict=True):
            if trial is None or attempt is None:
                continue
            latest[trial] = max(latest.get(trial, (0, False)), (attempt, status in FINAL_STATUSES))
    return {trial for trial, (_, has_ended) in latest.items() if has_ended} - in_doubt


def _compact_table(held: lease.Lease, name: str, ended: set[int]) -> Merged:
    folder = storage.join(held.study_dir, name)
    base = results.base_schema(name)
    journal = parts.read_journal(folder, strict=True)
    files = parts.current_files(folder, journal)
    small = [
        file
        for file in files
        if (match := _TRIAL_FILE.fullmatch(file)) and int(match[1] or match[3]) in ended
    ]
    numbers = [int(match[1]) for file in files if (match := parts.COMPACT_NAME.fullmatch(file))]
    earlier = [
        file
        for file in files
        if parts.COMPACT_NAME.fullmatch(file)
        and (storage.file_size(storage.join(folder, file)) or 0) < MAX_COMPACT_BYTES
    ]
    if not small and len(earlier) < 2:
        return Merged(name, 0, 0, None)
    files = [*earlier, *small]
    tables = parts.in_parallel(lambda file: parts.read_part(storage.join(folder, file), base), files)
    whole = [(file, table) for file, table in zip(files, tables, strict=True) if table is not None]
    table, replaced = parts.unite(whole, base)
    if not replaced:
        return Merged(name, 0, 0, None)
    table = table.sort_by([(key, "ascending") for key in _sort_keys(table)])
    _refuse_doubles(folder, table)
    number = max([journal.number, *numbers]) + 1
    content = results.encode_table(table, row_group_size=ROW_GROUP_SIZE[name])
    move = parts.Move(f"_compact-{number}.tmp", f"compact-{number}.parquet", len(content), tuple(replaced))
    journal = parts.Journal(number, move)
    storage.write_bytes(storage.join(folder, move.temporary), content)
    storage.sync_folder(folder)
    if held.lost.is_set() or not lease.still_held(held.study_dir, held.id):
        raise OutputError(
            f"{held.study_dir} was taken over by another raydisp; nothing was compacted in {name}"
        )
    storage.write_bytes(storage.join(folder, parts.JOURNAL_NAME), journal.to_bytes())
    storage.sync_folder(folder)
    _move(folder, journal)
    return Merged(name, len(replaced), table.num_rows, move.final)


def _sort_keys(table: pa.Table) -> list[str]:
    return [key for key in ("trial", "attempt", "step", "layer") if key in table.column_names]


def _refuse_doubles(folder: str, table: pa.Table) -> None:
    """`trials` has one row for each attempt; a file that somebody copied would make them two for ever."""
    if "step" in table.column_names:
        return
    counts = table.group_by(["trial", "attempt"]).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))
    if twice.num_rows:
        raise OutputError(
            f"{folder} has the row of trial {twice['trial'][0]}, attempt {twice['attempt'][0]} more than "
            "once; remove the file that was copied, then compact"
        )


def _move(folder: str, journal: parts.Journal) -> None:
    """Steps 3 to 5, from wherever they were cut short."""
    move = journal.moving
    assert move is not None
    temporary, final = storage.join(folder, move.temporary), storage.join(folder, move.final)
    sizes = [storage.file_size(temporary), storage.file_size(final)]
    if move.num_bytes not in sizes:
        raise OutputError(
            f"{folder}: the journal of a compaction names {move.temporary}, which is not there whole; put "
            f"it back, or remove {parts.JOURNAL_NAME} if the files that it lists are there"
        )
    for file in move.replaced:
        storage.delete_file(storage.join(folder, file))
    if sizes[1] != move.num_bytes:
        storage.rename(temporary, final)
    elif sizes[0] is not None:  # an object store copies, then removes
        storage.delete_file(temporary)
    storage.sync_folder(folder)
    storage.write_bytes(storage.join(folder, parts.JOURNAL_NAME), parts.Journal(journal.number).to_bytes())
    storage.remove_empty_folders(folder)
