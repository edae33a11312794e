"""Merging small files: every row once for every reader, at any moment and after any crash."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raydisp import results, storage
from raydisp.errors import OutputError
from raydisp.results import compaction, parts
from raydisp.storage import lease

SEARCHED = {"dispersion.weight": pa.float64()}
NUM_STEPS = 6


def write_attempt(folder: str, trial: int, attempt: int, status: str, steps: range, **columns: Any) -> None:
    writer = results.RowWriter(folder, trial, attempt, resumed_step=steps.start)
    for step in range(steps.start + 1, steps.stop + 1):
        writer.add("steps", {"step": step, "num_tokens": step * 8, "loss": 1.0 / step})
        writer.add("evals", {"step": step, "num_tokens": step * 8, "split": "validation", "name": "loss"})
        writer.add("layers", {"step": step, "layer": 0, "histogram": [step] * 128})
        writer.add("items", {"step": step, "benchmark": "quiz", "task": "quiz", "item": step, "value": 1.0})
        if step % 2 == 0:
            writer.flush(step)
    row = {"study": "s", "trial": trial, "attempt": attempt, "status": status, "val_loss": 5.0 + trial}
    results.write_trial(folder, {**row, **columns}, SEARCHED)


@pytest.fixture
def study_dir(tmp_path: Path) -> str:
    """Trials 0, 1 (in two attempts), 2 and 5 are ended, 3 failed, 4 is open."""
    folder = str(tmp_path / "study")
    write_attempt(folder, 0, 1, "completed", range(NUM_STEPS))
    write_attempt(folder, 1, 1, "interrupted", range(4))
    write_attempt(folder, 1, 2, "completed", range(2, NUM_STEPS))
    write_attempt(folder, 2, 1, "pruned", range(4))
    write_attempt(folder, 3, 1, "failed", range(4))
    write_attempt(folder, 4, 1, "interrupted", range(4))
    write_attempt(folder, 5, 1, "diverged", range(2))
    return folder


def glob_rows(folder: str, table: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Keys of the rows that DuckDB and pandas find by a plain glob."""
    keys = ["trial", "attempt"] if table == "trials" else ["trial", "step"]
    pattern = f"{folder}/{table}/**/*.parquet"
    by_duckdb = duckdb.sql(f"select {', '.join(keys)} from '{pattern}'").fetchall()
    frames = [pd.read_parquet(file) for file in sorted(Path(folder, table).rglob("*.parquet"))]
    frame = pd.concat([part[keys] for part in frames])
    return sorted(by_duckdb), sorted(frame.itertuples(index=False, name=None))


def our_rows(folder: str) -> dict[str, list[dict[str, Any]]]:
    tables = results.read_tables(folder)
    found = {name: getattr(tables, name) for name in ("attempts", "steps", "evals", "layers")}
    found["items"] = results.read_table(folder, "items")
    return {name: table.to_pylist() for name, table in found.items()}


def files(folder: str, table: str) -> list[str]:
    return sorted(str(file.relative_to(Path(folder, table))) for file in Path(folder, table).rglob("*.*"))


def test_rows_are_the_same_and_files_are_few(study_dir: str) -> None:
    before, plain = our_rows(study_dir), {name: glob_rows(study_dir, name) for name in compaction.TABLES}
    merged = compaction.compact(study_dir)
    assert [(one.table, one.num_files, one.num_rows) for one in merged] == [
        ("trials", 5, 5),
        ("steps", 9, 18),
        ("evals", 9, 18),
        ("layers", 9, 18),
        ("items", 9, 18),
    ]
    assert our_rows(study_dir) == before
    assert {name: glob_rows(study_dir, name) for name in compaction.TABLES} == plain
    assert files(study_dir, "trials") == [
        "_compaction.json",
        "compact-1.parquet",
        "trial-00003-attempt-1.parquet",
        "trial-00004-attempt-1.parquet",
    ]
    assert not Path(study_dir, "steps", "trial-00000").exists(), "no empty folder is left"
    assert [one.file for one in compaction.compact(study_dir)] == [None] * 5, "nothing left to do"
    file = pq.ParquetFile(Path(study_dir, "steps", "compact-1.parquet"))
    assert file.schema_arrow.metadata[parts.VERSION_KEY] == b"1"
    column = file.metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert "RLE_DICTIONARY" in column.encodings


def test_the_study_goes_on_after_it(study_dir: str) -> None:
    compaction.compact(study_dir)
    assert [row["attempt"] for row in results.read_attempts(study_dir, 1)] == [1, 2]
    assert results.read_trial(study_dir, 1, 2)["val_loss"] == 6.0
    assert results.read_trial(study_dir, 1, 3) is None
    assert results.read_attempts(study_dir, 77) == []
    assert results.read_table(study_dir, "steps", trial=1)["step"].to_pylist() == list(range(1, 7))
    with pytest.raises(OutputError, match="trial 1, attempt 2 has ended and its row lies in a compact file"):
        results.write_trial(study_dir, {"trial": 1, "attempt": 2, "status": "failed"}, SEARCHED)
    # The open one, the failed one and a new one go on; the next compaction takes them in.
    write_attempt(study_dir, 4, 2, "completed", range(2, NUM_STEPS))
    write_attempt(study_dir, 3, 2, "completed", range(NUM_STEPS))
    write_attempt(study_dir, 6, 1, "completed", range(NUM_STEPS))
    before = our_rows(study_dir)
    assert compaction.compact(study_dir)[0].file == "compact-2.parquet"
    assert our_rows(study_dir) == before
    assert files(study_dir, "trials") == ["_compaction.json", "compact-2.parquet"]
    assert files(study_dir, "layers") == ["_compaction.json", "compact-2.parquet"]
    found, same = glob_rows(study_dir, "steps")
    assert found == same
    assert len(set(found)) == len(found) == 5 * NUM_STEPS + 4 + 2


def test_a_column_that_came_later_is_null_in_earlier_rows(study_dir: str) -> None:
    row = {"study": "s", "trial": 6, "attempt": 1, "status": "completed", "train.learning_rate": 0.5}
    results.write_trial(study_dir, row, {**SEARCHED, "train.learning_rate": pa.float64()})
    compaction.compact(study_dir)
    tables = results.read_tables(study_dir)
    assert tables.trials["train.learning_rate"].to_pylist() == [None] * 6 + [0.5]


class CrashError(Exception):
    """What a killed process does not do: everything after this."""


CRASHING = ("write_bytes", "delete_file", "rename", "sync_folder", "remove_empty_folders")


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """Make the number-th change of the folder the last one; returns whether it came that far."""
    left = [number]

    def wrap(name: str) -> None:
        real = getattr(storage, name)

        def wrapped(location: str, *rest: Any) -> None:
            if ".lease" in location:
                return real(location, *rest)
            left[0] -= 1
            if left[0] < 0:
                raise CrashError
            real(location, *rest)
            if left[0] == 0:
                raise CrashError
            return None

        monkeypatch.setattr(storage, name, wrapped)

    for name in CRASHING:
        wrap(name)
    return lambda: left[0] <= 0


def test_a_crash_anywhere_loses_and_doubles_nothing(study_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compaction.compact(study_dir)
    write_attempt(study_dir, 6, 1, "completed", range(NUM_STEPS))
    write_attempt(study_dir, 7, 1, "completed", range(NUM_STEPS))
    original = Path(study_dir)
    expected = our_rows(study_dir)
    plain = {name: glob_rows(study_dir, name)[0] for name in compaction.TABLES}
    num_points = 0
    while True:
        num_points += 1
        folder = str(original.with_name(f"crash-{num_points}"))
        copy_tree(original, Path(folder))
        with monkeypatch.context() as broken:
            crashed = crash_at(broken, num_points)
            with contextlib.suppress(CrashError):
                compaction.compact(folder)
            if not crashed():
                break
        assert our_rows(folder) == expected
        for name, rows in plain.items():
            by_duckdb, by_pandas = glob_rows(folder, name)
            assert by_duckdb == by_pandas
            assert len(set(by_duckdb)) == len(by_duckdb), "never a row twice"
            assert set(by_duckdb) <= set(rows)
        assert [row["attempt"] for row in results.read_attempts(folder, 1)] == [1, 2]
        with lease.hold(folder):
            compaction.finish(folder)
        assert our_rows(folder) == expected
        assert {name: glob_rows(folder, name)[0] for name in compaction.TABLES} == plain
        assert not list(Path(folder).rglob("*.tmp"))
        compaction.compact(folder)
        assert our_rows(folder) == expected
        assert files(folder, "trials")[0] == "_compaction.json"
        assert len(files(folder, "steps")) == 2 + 4, "one merged file, and those of trials 3 and 4"
    assert num_points > 30, "the test must have crashed at every step"


def copy_tree(origin: Path, to: Path) -> None:
    for file in origin.rglob("*"):
        if file.is_file():
            place = to / file.relative_to(origin)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())


def test_readers_see_every_row_once_while_it_runs(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for trial in range(12):
        write_attempt(folder, trial, 1, "completed", range(NUM_STEPS))
    wanted = {name: rows for name, rows in our_rows(folder).items() if name in ("attempts", "steps")}
    done = threading.Event()
    problems: list[str] = []
    num_reads = [0, 0]

    def read() -> None:
        while not done.is_set():
            for name, rows in wanted.items():
                table = "trials" if name == "attempts" else name
                found = results.read_table(folder, table).to_pylist()
                if found[: len(rows)] != rows:
                    problems.append(f"{table}: {len(found)} rows")
            if len(results.read_attempts(folder, 3)) != 1:
                problems.append("read_attempts")
            num_reads[0] += 1

    def glob() -> None:
        while not done.is_set():
            try:
                keys = duckdb.connect().sql(f"select trial from '{folder}/trials/**/*.parquet'").fetchall()
            except (duckdb.IOException, duckdb.HTTPException):
                continue  # a file was gone before it was opened, or there was none for a moment
            if len(set(keys)) != len(keys):
                problems.append("a glob saw a row twice")
            num_reads[1] += 1

    threads = [threading.Thread(target=read), threading.Thread(target=read), threading.Thread(target=glob)]
    for thread in threads:
        thread.start()
    try:
        for trial in range(12, 20):
            write_attempt(folder, trial, 1, "completed", range(2))
            assert compaction.compact(folder)[0].num_files
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert min(num_reads) > 3


def test_a_file_that_cannot_be_read_stays_and_keeps_its_trial_open(study_dir: str) -> None:
    """Attempt 2 of trial 0 is broken: whether trial 0 has ended is not known."""
    broken = Path(study_dir, "trials", "trial-00000-attempt-2.parquet")
    broken.write_bytes(b"PAR1")
    step_file = Path(study_dir, "steps", "trial-00001", "until-00000004.parquet")
    step_file.write_bytes(step_file.read_bytes()[:40])
    before = our_rows(study_dir)
    compaction.compact(study_dir)
    assert our_rows(study_dir) == before
    assert broken.read_bytes() == b"PAR1"
    assert step_file.exists()
    assert "trial-00000-attempt-1.parquet" in files(study_dir, "trials")


def test_files_of_others_are_left_alone(study_dir: str) -> None:
    table = results.read_table(study_dir, "trials")
    foreign = Path(study_dir, "trials", "mine.parquet")
    pq.write_table(table.slice(0, 1), foreign)
    rows = results.read_table(study_dir, "trials").num_rows
    compaction.compact(study_dir)
    assert foreign.exists()
    assert results.read_table(study_dir, "trials").num_rows == rows


def test_a_copied_row_is_refused(study_dir: str) -> None:
    compaction.compact(study_dir)
    row = {"study": "s", "trial": 0, "attempt": 1, "status": "completed"}
    table = pa.Table.from_pylist([row], schema=results.trial_schema(SEARCHED))
    results.write_table(f"{study_dir}/trials/trial-00000-attempt-1.parquet", table)
    with pytest.raises(OutputError, match="row of trial 0, attempt 1 more than once; remove the file"):
        compaction.compact(study_dir)


def test_a_folder_in_use_is_not_compacted(study_dir: str) -> None:
    with lease.hold(study_dir), pytest.raises(OutputError, match="is in use by another raydisp"):
        compaction.compact(study_dir)


def test_it_stops_where_it_was_taken_over(study_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = our_rows(study_dir)
    monkeypatch.setattr(lease, "still_held", lambda folder, lease_id: False)
    with pytest.raises(OutputError, match="was taken over"):
        compaction.compact(study_dir)
    assert our_rows(study_dir) == before


def test_a_journal_without_its_file_is_an_error_and_deletes_nothing(study_dir: str) -> None:
    folder = Path(study_dir, "trials")
    journal = parts.Journal(
        1, parts.Move("_compact-1.tmp", "compact-1.parquet", 10, tuple(files(study_dir, "trials")))
    )
    (folder / parts.JOURNAL_NAME).write_bytes(journal.to_bytes())
    with pytest.raises(OutputError, match=r"names _compact-1.tmp, which is not there whole"):
        compaction.finish(study_dir)
    assert len(list(folder.glob("*.parquet"))) == 7


def test_a_journal_that_is_none(study_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    before = our_rows(study_dir)
    Path(study_dir, "trials", parts.JOURNAL_NAME).write_text("[]")
    assert our_rows(study_dir) == before
    assert "_compaction.json is left out" in caplog.text
    with pytest.raises(OutputError, match="cannot be read as a journal"):
        compaction.compact(study_dir)


def test_on_an_object_store(study_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As there: no local file system, and renaming is copying and removing."""
    before = our_rows(study_dir)
    parent, name = study_dir.rsplit("/", 1)
    store = pafs.SubTreeFileSystem(parent, pafs.LocalFileSystem())
    real = storage.resolve

    def resolve(location: str) -> tuple[pafs.FileSystem, str]:
        return (store, location[5:]) if location.startswith("s3://") else real(location)

    monkeypatch.setattr(storage, "resolve", resolve)
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    assert compaction.compact(f"s3://{name}")[0].num_rows == 5
    assert our_rows(f"s3://{name}") == before


def test_a_large_compact_file_is_left_alone(study_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compaction.compact(study_dir)
    monkeypatch.setattr(compaction, "MAX_COMPACT_BYTES", 10)
    write_attempt(study_dir, 6, 1, "completed", range(NUM_STEPS))
    before = our_rows(study_dir)
    assert compaction.compact(study_dir)[0].num_files == 1
    assert our_rows(study_dir) == before
    assert {"compact-1.parquet", "compact-2.parquet"} < set(files(study_dir, "trials"))
