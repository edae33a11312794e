"""The results on disk: their files, writing and reading them.

A study's folder holds the Parquet datasets `trials`, `steps`, `evals`, `layers` and, where models are
evaluated on tasks, `items`; they are the truth, and everything else can be rebuilt from them. `columns` says
what is in them. Files are named after what they hold, so that writing one again replaces it and never doubles
a row:

    trials/trial-00003-attempt-1.parquet     one row
    steps/trial-00003/until-00000050.parquet rows up to step 50 (evals, layers and items likewise)
    trials/compact-2.parquet                 rows of many trials that have ended (`compaction`)

A file appears only when it is whole (`storage`), so readers need no lock.

python -m raydisp.results show DIR
python -m raydisp.results compact DIR
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydisp import storage
from raydisp.errors import OutputError
from raydisp.results import columns, parts

SCHEMA_VERSION = parts.SCHEMA_VERSION
STATUSES = ("completed", "pruned", "failed", "diverged", "interrupted")
NUM_HISTOGRAM_BINS = 128

TRIAL_COLUMNS: dict[str, pa.DataType] = {name: column.type for name, column in columns.TRIALS.items()}
"""Columns of `trials` without those of the searched fields, which stand after `seed`."""

STEP_SCHEMA = columns.make_schema(columns.STEPS)
EVAL_SCHEMA = columns.make_schema(columns.EVALS)
LAYER_SCHEMA = columns.make_schema(columns.LAYERS)
ITEM_SCHEMA = columns.make_schema(columns.ITEMS)
ROW_SCHEMAS = {"steps": STEP_SCHEMA, "evals": EVAL_SCHEMA, "layers": LAYER_SCHEMA, "items": ITEM_SCHEMA}

MAX_READS = 50
"""Times that a table is read anew because its files changed meanwhile."""
MAX_MISSES = 3
"""Times that a file is listed and then not there, until it is taken for a link to nowhere."""


def trial_schema(searched: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of `trials` for a study that searches these fields.

    Args:
        searched: dotted field name -> Arrow type, in the order of the study file.
    """
    fields: list[tuple[str, pa.DataType]] = []
    for name, kind in TRIAL_COLUMNS.items():
        fields.append((name, kind))
        if name == "seed":
            fields.extend(searched.items())
    return pa.schema(fields)


# --- writing -------------------------------------------------------------------------------------------


def trial_name(trial: int) -> str:
    """`trial-00003`: the name of a trial's files and folders."""
    return f"trial-{trial:05d}"


def base_schema(name: str) -> pa.Schema:
    """The columns that every file of a table has; one written before there was a column has nulls there."""
    return pa.schema(list(TRIAL_COLUMNS.items())) if name == "trials" else ROW_SCHEMAS[name]


def encode_table(table: pa.Table, *, row_group_size: int | None = None) -> bytes:
    """A table as a Parquet file, with this version of the schema in its metadata."""
    metadata = {**(table.schema.metadata or {}), parts.VERSION_KEY: str(SCHEMA_VERSION).encode()}
    sink = pa.BufferOutputStream()
    # Dictionaries and statistics of a single row only make it larger, and slower to write.
    has_many = table.num_rows > 1
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=row_group_size,
        use_dictionary=has_many,
        write_statistics=has_many,
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def write_table(location: str, table: pa.Table) -> None:
    """Write one Parquet file whole or not at all."""
    storage.write_bytes(location, encode_table(table))


def write_trial(study_dir: str, row: Mapping[str, Any], searched: Mapping[str, pa.DataType]) -> None:
    """Write the row of one attempt of one trial; writing it again replaces it.

    Args:
        row: column -> value; what is left out, and any number that is not finite, becomes null.
        searched: dotted field name -> Arrow type of the columns that this study adds.
    Raises:
        OutputError: it cannot be written, or the row lies in a compact file: the trial has ended for good.
    """
    schema = trial_schema(searched)
    unknown = set(row) - set(schema.names)
    assert not unknown, f"not columns of trials: {sorted(unknown)}"
    clean = {name: _null_if_not_finite(row.get(name)) for name in schema.names}
    place = _attempt_place(study_dir, row["trial"], row["attempt"])
    if not storage.exists(place):
        ended = _compacted_rows(study_dir, row["trial"])
        if any(other["attempt"] == row["attempt"] for other in ended):
            raise OutputError(
                f"trial {row['trial']}, attempt {row['attempt']} has ended and its row lies in a compact "
                f"file of {storage.join(study_dir, 'trials')}; it is not written again"
            )
    write_table(place, pa.Table.from_pylist([clean], schema=schema))


def read_trial(study_dir: str, trial: int, attempt: int) -> dict[str, Any] | None:
    """The row of one attempt; None if there is none, or its file cannot be read (a warning tells)."""
    try:
        return _read_attempt(study_dir, trial, attempt)
    except FileNotFoundError:
        rows = [row for row in _compacted_rows(study_dir, trial) if row["attempt"] == attempt]
        return rows[0] if rows else None


def attempt_exists(study_dir: str, trial: int, attempt: int) -> bool:
    """Whether an attempt has begun, as far as small files tell; one request to an object store."""
    return storage.exists(_attempt_place(study_dir, trial, attempt))


def read_attempts(
    study_dir: str, trial: int, *, through: int = 0, strict: bool = False
) -> list[dict[str, Any]]:
    """The rows of all attempts of a trial, in order, without those that cannot be read (a warning tells).

    Args:
        through: look for attempts up to this one, whichever before it is missing.
        strict: as `read_table` has it.
    """
    try:
        first = _read_attempt(study_dir, trial, 1, strict=strict)
        rows = [first] if first is not None else []
        attempt = 2
    except FileNotFoundError:
        rows = _compacted_rows(study_dir, trial)
        attempt = rows[-1]["attempt"] + 1 if rows else 2
    while True:
        try:
            row = _read_attempt(study_dir, trial, attempt, strict=strict)
        except FileNotFoundError:
            if attempt >= through:
                return rows
            row = None
        if row is not None:
            rows.append(row)
        attempt += 1


def _attempt_place(study_dir: str, trial: int, attempt: int) -> str:
    return storage.join(study_dir, "trials", f"{trial_name(trial)}-attempt-{attempt}.parquet")


def _read_attempt(study_dir: str, trial: int, attempt: int, *, strict: bool = False) -> dict[str, Any] | None:
    place = _attempt_place(study_dir, trial, attempt)
    table = parts.read_part(place, base_schema("trials"), strict=strict)
    if table is None:
        return None
    rows: list[dict[str, Any]] = table.to_pylist()
    if len(rows) != 1 or (rows[0]["trial"], rows[0]["attempt"]) != (trial, attempt):
        parts.leave_out(place, f"it does not hold the row of trial {trial}, attempt {attempt}")
        return None
    return rows[0]


def _compacted_rows(study_dir: str, trial: int) -> list[dict[str, Any]]:
    """Rows of a trial that lie in compact files, by attempt."""
    folder = storage.join(study_dir, "trials")
    for _ in range(MAX_READS):
        rows: list[dict[str, Any]] = []
        try:
            journal = parts.read_journal(folder)
            for name in parts.compact_files(folder, journal):
                table = parts.read_part(storage.join(folder, name), base_schema("trials"), trial=trial)
                rows.extend(table.to_pylist() if table is not None else [])
        except FileNotFoundError:  # renamed or replaced since it was listed
            continue
        if parts.read_journal(folder) == journal:
            return sorted(rows, key=lambda row: row["attempt"])
    raise _changes_too_fast(folder)


def now() -> datetime.datetime:
    """The present, in UTC, as rows have it."""
    return datetime.datetime.now(tz=datetime.UTC)


def _null_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowWriter:
    """Collects the `steps`, `evals`, `layers` and `items` rows of one trial and writes them in whole files.

    `flush` must come before each checkpoint is made: then no file holds rows from both sides of it, and
    resuming from it drops whole files.
    """

    def __init__(self, study_dir: str, trial: int, attempt: int, *, resumed_step: int) -> None:
        """Drop what an earlier attempt wrote past the step that this one goes on from (0: everything)."""
        self._study_dir = study_dir
        self._ids = {"trial": trial, "attempt": attempt}
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROW_SCHEMAS}
        self._written: set[str] = set()
        for name in ROW_SCHEMAS:
            _drop_files_after(storage.join(study_dir, name, trial_name(trial)), resumed_step)

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """Add a row to one of these tables; `trial` and `attempt` are filled in."""
        clean = {name: _null_if_not_finite(value) for name, value in row.items()}
        self._rows[table].append({**self._ids, **clean})

    def flush(self, step: int) -> None:
        """Write what has come since the last flush; `step` is the number of steps done."""
        for name, rows in self._rows.items():
            if rows:
                folder = storage.join(self._study_dir, name, trial_name(self._ids["trial"]))
                file = storage.join(folder, f"until-{step:08d}.parquet")
                assert file not in self._written, f"rows were added after {file} was written"
                self._written.add(file)
                write_table(file, pa.Table.from_pylist(rows, schema=ROW_SCHEMAS[name]))
        self._rows = {name: [] for name in ROW_SCHEMAS}


def _drop_files_after(folder: str, step: int) -> None:
    """Delete the files of later steps; of all, where the trial starts over at step 0."""
    for name in storage.list_files(folder):
        match = re.fullmatch(r"until-(\d+)\.parquet", name)
        if match is None or step == 0 or int(match[1]) > step:
            storage.delete_file(storage.join(folder, name))


# --- reading -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tables:
    """A study's results in memory."""

    trials: pa.Table
    """One row per trial: its latest attempt. Sorted by trial."""
    attempts: pa.Table
    """One row per attempt of every trial."""
    steps: pa.Table
    evals: pa.Table
    layers: pa.Table
    items: pa.Table = dataclasses.field(default_factory=ITEM_SCHEMA.empty_table)
    """Of the runs of the confirm phase alone, as they ended: those of a large search are many."""


def read_tables(study_dir: str) -> Tables:
    """Read a study's datasets; a table without a file yet is empty.

    A file that is not whole, or not ours, is named in a warning and left out.
    """
    attempts = read_table(study_dir, "trials")
    trials = latest_attempts(attempts)
    return Tables(
        trials=trials,
        attempts=attempts,
        **{name: read_table(study_dir, name) for name in ROW_SCHEMAS if name != "items"},
        items=read_final_items(study_dir, trials),
    )


def read_final_items(study_dir: str, trials: pa.Table, *, strict: bool = False) -> pa.Table:
    """The rows of `items` of the confirm phase's runs, of the last step of each.

    Args:
        trials: the latest attempt of each trial.
        strict: as `read_table` has it.
    """
    found = [ITEM_SCHEMA.empty_table()]
    for row in trials.select(["trial", "phase", "num_steps", "config_json"]).to_pylist():
        if row["phase"] == "confirm" and row["num_steps"] and _names_tasks(row["config_json"]):
            items = read_table(study_dir, "items", trial=row["trial"], strict=strict)
            found.append(items.filter(pc.equal(items["step"], row["num_steps"])))
    return pa.concat_tables(found)


def _names_tasks(config_json: str | None) -> bool:
    """Whether a trial is evaluated on tasks, by its settings."""
    try:
        return bool(json.loads(config_json or "{}")["evaluate"]["tasks"])
    except (ValueError, TypeError, KeyError):  # written before there were tasks
        return False


def read_table(study_dir: str, name: str, *, trial: int | None = None, strict: bool = False) -> pa.Table:
    """Read one of the datasets, sorted by trial, attempt and, where there is one, step.

    Every row is there once, whatever a compaction is doing meanwhile.

    Args:
        trial: read the rows of this one alone (not of `trials`).
        strict: for who decides by what is not there: a file that is there and cannot be read just now, a
            damaged compact file, and one of a newer raydisp are errors. A single damaged one is left out.
    Raises:
        OutputError: as `strict` says.
    """
    folder = storage.join(study_dir, name)
    misses: Counter[str] = Counter()
    for tries in range(MAX_READS):
        table = _read_at_once(folder, name, trial, misses, strict=strict)
        if table is not None:
            keys = [key for key in ("trial", "attempt", "step", "layer") if key in table.column_names]
            return _sorted(table, keys)
        time.sleep(0.005 * (tries + 1))
    raise _changes_too_fast(folder)


def _read_at_once(
    folder: str, name: str, trial: int | None, misses: Counter[str], *, strict: bool
) -> pa.Table | None:
    """The rows of a table; None if its files were replaced while they were read.

    Args:
        misses: counts, over the tries, the files that were listed and then not there.
    """
    base = base_schema(name)
    journal = parts.read_journal(folder)
    files = parts.current_files(folder, journal, below="" if trial is None else trial_name(trial))

    def read(file: str) -> pa.Table | None:
        try:
            return parts.read_part(storage.join(folder, file), base, trial=trial, strict=strict)
        except FileNotFoundError:
            misses[file] += 1
            if misses[file] < MAX_MISSES:
                raise
            parts.leave_out(storage.join(folder, file), "it is listed, but not there")
            return None

    try:
        tables = parts.in_parallel(read, files)
    except FileNotFoundError:
        return None
    if parts.read_journal(folder) != journal:
        return None
    found = [(file, table) for file, table in zip(files, tables, strict=True) if table is not None]
    return parts.unite([(storage.join(folder, file), table) for file, table in found], base)[0]


def _changes_too_fast(folder: str) -> OutputError:
    return OutputError(f"{folder} changes faster than it can be read; try again")


def _sorted(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Sorted by columns of whole numbers; a compact file is already."""
    if table.num_rows < 2:
        return table
    values = [table[key].fill_null(-1).to_numpy() for key in keys]
    order = np.lexsort(values[::-1])
    return table if (np.diff(order) == 1).all() else table.take(pa.array(order))


def latest_attempts(attempts: pa.Table) -> pa.Table:
    """One row per trial, that of its highest attempt, sorted by trial."""
    if attempts.num_rows == 0:
        return attempts
    ordered = _sorted(attempts, ["trial", "attempt"])
    trials = ordered["trial"].fill_null(-1).to_numpy()
    return ordered.take(pa.array(np.flatnonzero(np.append(np.diff(trials) != 0, True))))
