"""The results on disk: column names, Arrow schemas, writing and reading.

A study's folder holds four Parquet datasets, `trials`, `steps`, `evals` and `layers`; they are the truth,
and everything else can be rebuilt from them. Files are named after what they hold, so that writing one again
replaces it and never doubles a row:

    trials/trial-00003-attempt-1.parquet     one row
    steps/trial-00003/until-00000050.parquet rows up to step 50 (evals and layers likewise)

A file appears only when it is whole (`storage`), so readers need no lock.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raydisp import storage

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATUSES = ("completed", "pruned", "failed", "diverged", "interrupted")
NUM_HISTOGRAM_BINS = 128

_timestamp = pa.timestamp("us", tz="UTC")

TRIAL_COLUMNS: dict[str, pa.DataType] = {
    "study": pa.string(),
    "phase": pa.string(),  # search
    "trial": pa.int32(),  # 0 is the baseline
    "attempt": pa.int32(),  # from 1; the one with the highest number counts
    "arm": pa.string(),  # baseline | search
    "status": pa.string(),  # one of STATUSES
    "seed": pa.int64(),
    "config_json": pa.string(),  # the whole TrialConfig
    "study_json": pa.string(),  # the whole study file, resolved
    "config_sha256": pa.string(),  # the trial's identity
    "num_steps": pa.int64(),  # really done
    "num_tokens": pa.int64(),  # really seen
    "num_skipped_steps": pa.int64(),  # of num_steps: not used, because the gradient was not finite
    "resumed_step": pa.int64(),  # the step that this attempt went on from; 0: it began anew
    "train_loss": pa.float64(),  # nats per token, cross-entropy alone, mean over the last tenth of the steps
    "val_loss": pa.float64(),  # nats per token, whole validation split
    "val_perplexity": pa.float64(),
    "val_bits_per_byte": pa.float64(),
    "layer_cosine_mean": pa.float64(),  # mean over layers 1..n of the mean pairwise cosine
    "spearman": pa.float64(),  # of the layer means against the layer number, 0..n
    "kendall": pa.float64(),
    "train_s": pa.float64(),  # the loop: steps, evaluations, checkpoints
    "startup_s": pa.float64(),  # from the trial's start to its first step
    "tokens_per_s": pa.float64(),  # training steps alone
    "peak_memory_bytes": pa.int64(),  # of one worker: CUDA's peak, else the process's resident peak
    "world_size": pa.int32(),
    "strategy": pa.string(),
    "precision": pa.string(),  # resolved: fp32 | bf16 | fp16
    "micro_batch_tokens": pa.int64(),  # per forward pass of one worker; null where none was made
    "device": pa.string(),
    "hostname": pa.string(),
    "data_sha256": pa.string(),
    "model_revision": pa.string(),
    "code_version": pa.string(),
    "packages_json": pa.string(),
    "error_type": pa.string(),
    "error_message": pa.string(),
    "traceback": pa.string(),
    "note": pa.string(),  # what a reader should know of an attempt that otherwise looks like any other
    "started_at": _timestamp,
    "ended_at": _timestamp,
}
"""Columns of `trials`, without those of the searched fields, which are named by their dotted path, stand
after `seed` and are typed by the field: float64, int64, bool, or string (a list of layers as JSON)."""

STEP_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),  # steps done: 1 is after the first
        ("num_tokens", pa.int64()),
        ("loss", pa.float64()),  # lm_loss + weight x dispersion_loss
        ("lm_loss", pa.float64()),  # nats per token
        ("dispersion_loss", pa.float64()),  # unweighted; null where the weight is 0
        ("grad_norm", pa.float64()),  # before clipping
        ("learning_rate", pa.float64()),
        ("elapsed_s", pa.float64()),  # training time since the trial's first step, over its attempts
    ]
)

EVAL_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),  # 0 is before training
        ("num_tokens", pa.int64()),
        ("split", pa.string()),
        ("name", pa.string()),  # loss, perplexity, bits_per_byte, layer_cosine_mean, spearman, kendall
        ("value", pa.float64()),
        ("num_items", pa.int64()),  # predicted tokens for losses, sequences for condensation
        ("stderr", pa.float64()),  # over sequences; null where it is not defined
    ]
)

LAYER_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),
        ("num_tokens", pa.int64()),
        ("layer", pa.int32()),  # 0 is the embedding output, n is after the final norm
        ("cosine_mean", pa.float64()),
        ("cosine_centred_mean", pa.float64()),
        ("cosine_p05", pa.float64()),
        ("cosine_p50", pa.float64()),
        ("cosine_p95", pa.float64()),
        ("effective_rank", pa.float64()),
        ("histogram", pa.list_(pa.int64())),  # NUM_HISTOGRAM_BINS counts of pairwise cosines on [-1, 1]
    ]
)

ROW_SCHEMAS = {"steps": STEP_SCHEMA, "evals": EVAL_SCHEMA, "layers": LAYER_SCHEMA}


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


def write_table(location: str, table: pa.Table) -> None:
    """Write one Parquet file whole or not at all, with this version of the schema in its metadata."""
    metadata = {**(table.schema.metadata or {}), b"raydisp.schema_version": str(SCHEMA_VERSION).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())


def write_trial(study_dir: str, row: Mapping[str, Any], searched: Mapping[str, pa.DataType]) -> None:
    """Write the row of one attempt of one trial; writing it again replaces it.

    Args:
        row: column -> value; what is left out, and any number that is not finite, becomes null.
        searched: dotted field name -> Arrow type of the columns that this study adds.
    """
    schema = trial_schema(searched)
    unknown = set(row) - set(schema.names)
    assert not unknown, f"not columns of trials: {sorted(unknown)}"
    clean = {name: _null_if_not_finite(row.get(name)) for name in schema.names}
    name = f"{trial_name(row['trial'])}-attempt-{row['attempt']}.parquet"
    write_table(storage.join(study_dir, "trials", name), pa.Table.from_pylist([clean], schema=schema))


def read_trial(study_dir: str, trial: int, attempt: int) -> dict[str, Any] | None:
    """The row of one attempt; None if it has not been written."""
    filesystem, path = storage.resolve(
        storage.join(study_dir, "trials", f"{trial_name(trial)}-attempt-{attempt}.parquet")
    )
    try:
        with filesystem.open_input_file(path) as file:
            return pq.ParquetFile(file).read().to_pylist()[0]
    except FileNotFoundError:
        return None


def read_attempts(study_dir: str, trial: int) -> list[dict[str, Any]]:
    """The rows of all attempts of a trial, in order."""
    rows: list[dict[str, Any]] = []
    while (row := read_trial(study_dir, trial, len(rows) + 1)) is not None:
        rows.append(row)
    return rows


def now() -> datetime.datetime:
    """The present, in UTC, as rows have it."""
    return datetime.datetime.now(tz=datetime.UTC)


def _null_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowWriter:
    """Collects the `steps`, `evals` and `layers` rows of one trial and writes them in whole files.

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
        """Add a row to one of the three tables; `trial` and `attempt` are filled in."""
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
    filesystem, path = storage.resolve(folder)
    for info in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
        match = re.fullmatch(r"until-(\d+)\.parquet", info.base_name)
        if match is None or step == 0 or int(match[1]) > step:
            filesystem.delete_file(info.path)


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


def read_tables(study_dir: str) -> Tables:
    """Read a study's four datasets; a table without a file yet is empty.

    A file that is not whole, or not ours, is named in a warning and left out.
    """
    attempts = read_table(study_dir, "trials")
    return Tables(
        trials=latest_attempts(attempts),
        attempts=attempts,
        **{name: read_table(study_dir, name) for name in ROW_SCHEMAS},
    )


def read_table(study_dir: str, name: str, *, trial: int | None = None) -> pa.Table:
    """Read one of the datasets, sorted by trial, attempt and, where there is one, step.

    Args:
        trial: read the rows of this one alone (not of `trials`).
    """
    base = pa.schema(list(TRIAL_COLUMNS.items())) if name == "trials" else ROW_SCHEMAS[name]
    folder = [name] if trial is None else [name, trial_name(trial)]
    tables = list(_read_files(storage.join(study_dir, *folder), base))
    if not tables:
        return base.empty_table()
    table = pa.concat_tables(tables, promote_options="default")
    keys = [key for key in ("trial", "attempt", "step", "layer") if key in table.column_names]
    return table.sort_by([(key, "ascending") for key in keys])


def _read_files(folder: str, base: pa.Schema) -> Iterator[pa.Table]:
    filesystem, path = storage.resolve(folder)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    for info in sorted(filesystem.get_file_info(selector), key=lambda info: info.path):
        if info.type != pafs.FileType.File or not info.base_name.endswith(".parquet"):
            continue
        try:
            with filesystem.open_input_file(info.path) as file:
                table = pq.ParquetFile(file).read()
        except FileNotFoundError:
            continue  # replaced by a writer since it was listed
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s is left out: it is not a whole Parquet file (%s)", info.path, error)
            continue
        missing = [field for field in base if field.name not in table.column_names]
        if missing and b"raydisp.schema_version" not in (table.schema.metadata or {}):
            names = ", ".join(field.name for field in missing)
            logger.warning("%s is left out: it has no column %s", info.path, names)
            continue
        for field in missing:  # written before there was this column
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        yield table.replace_schema_metadata(None)


def latest_attempts(attempts: pa.Table) -> pa.Table:
    """One row per trial, that of its highest attempt, sorted by trial."""
    if attempts.num_rows == 0:
        return attempts
    numbered = attempts.append_column("_row", pa.array(range(attempts.num_rows), pa.int64()))
    ordered = numbered.sort_by([("trial", "ascending"), ("attempt", "ascending")])
    last = ordered.group_by("trial", use_threads=False).aggregate([("_row", "last")])
    return attempts.take(last["_row_last"]).sort_by("trial")
