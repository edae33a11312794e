"""Rows on disk: whole files, one reader or another, resuming, and what is left out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from raydisp import results
from raydisp.errors import OutputError

SEARCHED = {"dispersion.weight": pa.float64(), "dispersion.layers": pa.string()}


def trial(number: int, attempt: int = 1, status: str = "completed", **columns: Any) -> dict[str, Any]:
    return {"study": "s", "trial": number, "attempt": attempt, "status": status, **columns}


def step(number: int) -> dict[str, Any]:
    return {"step": number, "num_tokens": number * 8, "loss": 1.0 / number, "lm_loss": 1.0}


def test_trial_schema_puts_searched_columns_after_the_seed() -> None:
    names = results.trial_schema(SEARCHED).names
    assert names[names.index("seed") + 1 : names.index("config_json")] == list(SEARCHED)


def test_every_reader_sees_the_same_rows(tmp_path: Path) -> None:
    for number in range(3):
        results.write_trial(str(tmp_path), trial(number, val_loss=5.0 + number), SEARCHED)
    pattern = str(tmp_path / "trials" / "**" / "*.parquet")
    expected = [5.0, 6.0, 7.0]
    assert sorted(ds.dataset(tmp_path / "trials").to_table()["val_loss"].to_pylist()) == expected
    sql = duckdb.sql(f"select val_loss from '{pattern}' order by 1").fetchall()
    assert [value for (value,) in sql] == expected
    assert pl.read_parquet(pattern).sort("trial")["val_loss"].to_list() == expected
    assert sorted(pd.read_parquet(tmp_path / "trials")["val_loss"]) == expected
    assert results.read_tables(str(tmp_path)).trials["val_loss"].to_pylist() == expected


def test_types_are_explicit_even_where_all_is_null(tmp_path: Path) -> None:
    results.write_trial(str(tmp_path), trial(0), SEARCHED)
    table = pq.read_table(tmp_path / "trials" / "trial-00000-attempt-1.parquet")
    assert table.schema.remove_metadata() == results.trial_schema(SEARCHED)
    assert table.schema.metadata[b"raydisp.schema_version"] == b"1"
    assert table["val_loss"].to_pylist() == [None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_missing(tmp_path: Path, value: float) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=value), SEARCHED)
    assert results.read_trial(str(tmp_path), 0, 1)["val_loss"] is None


def test_a_row_written_again_replaces_itself(tmp_path: Path) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=1.0), SEARCHED)
    results.write_trial(str(tmp_path), trial(0, val_loss=2.0), SEARCHED)
    assert results.read_table(str(tmp_path), "trials")["val_loss"].to_pylist() == [2.0]


def test_a_column_that_does_not_exist_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="valloss"):
        results.write_trial(str(tmp_path), trial(0, valloss=1.0), SEARCHED)


def test_the_latest_attempt_counts(tmp_path: Path) -> None:
    for number, attempt, status in [(0, 1, "completed"), (1, 1, "interrupted"), (1, 2, "completed")]:
        results.write_trial(str(tmp_path), trial(number, attempt, status), SEARCHED)
    tables = results.read_tables(str(tmp_path))
    assert [(row["trial"], row["attempt"]) for row in tables.trials.to_pylist()] == [(0, 1), (1, 2)]
    assert tables.attempts.num_rows == 3


def test_resuming_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    first = results.RowWriter(str(tmp_path), 7, 1, resumed_step=0)
    for number in range(1, 11):
        first.add("steps", step(number))
        if number in (4, 6, 8):
            first.flush(number)
    first.flush(10)
    second = results.RowWriter(str(tmp_path), 7, 2, resumed_step=6)
    for number in range(7, 11):
        second.add("steps", step(number))
    second.flush(10)
    second.add("steps", step(10))
    with pytest.raises(AssertionError, match="rows were added after"):
        second.flush(10)
    table = results.read_table(str(tmp_path), "steps")
    assert sorted(table["step"].to_pylist()) == list(range(1, 11))
    assert dict(zip(table["step"].to_pylist(), table["attempt"].to_pylist(), strict=True)) == {
        **dict.fromkeys(range(1, 7), 1),
        **dict.fromkeys(range(7, 11), 2),
    }


def test_starting_over_drops_everything_of_that_trial_only(tmp_path: Path) -> None:
    for number in (1, 2):
        writer = results.RowWriter(str(tmp_path), number, 1, resumed_step=0)
        writer.add("steps", step(1))
        writer.flush(1)
    results.RowWriter(str(tmp_path), 1, 2, resumed_step=0)
    assert results.read_table(str(tmp_path), "steps")["trial"].to_pylist() == [2]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=1.0), SEARCHED)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device; make the folder writable"):
        results.write_trial(str(tmp_path), trial(0, val_loss=2.0), SEARCHED)
    assert results.read_trial(str(tmp_path), 0, 1)["val_loss"] == 1.0
    assert len(list((tmp_path / "trials").iterdir())) == 1, "no temporary file is left"


def test_foreign_and_truncated_files_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=1.0), SEARCHED)
    folder = tmp_path / "trials"
    whole = (folder / "trial-00000-attempt-1.parquet").read_bytes()
    (folder / "trial-00001-attempt-1.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"x": [1]}), folder / "other.parquet")
    (folder / "_tmp-123").write_bytes(whole)
    with caplog.at_level(logging.WARNING):
        assert results.read_table(str(tmp_path), "trials").num_rows == 1
    assert "trial-00001-attempt-1.parquet is left out: it is not a whole Parquet file" in caplog.text
    assert "other.parquet is left out: it has no column study" in caplog.text
    assert "_tmp-123" not in caplog.text


def test_a_study_without_rows_has_empty_tables(tmp_path: Path) -> None:
    tables = results.read_tables(str(tmp_path))
    assert [tables.trials.num_rows, tables.steps.num_rows, tables.layers.num_rows] == [0, 0, 0]


def test_a_truncated_attempt_hides_no_later_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for attempt in (1, 2, 3):
        results.write_trial(str(tmp_path), trial(3, attempt, "interrupted"), SEARCHED)
    file = tmp_path / "trials" / "trial-00003-attempt-1.parquet"
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "trials" / "trial-00003-attempt-2.parquet").write_bytes(b"")
    assert results.read_trial(str(tmp_path), 3, 1) is None
    assert [row["attempt"] for row in results.read_attempts(str(tmp_path), 3)] == [3]
    assert results.read_table(str(tmp_path), "trials")["attempt"].to_pylist() == [3]
    told = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert len(told) == 2, "once for each file, not for each reading"


def test_every_kind_of_foreign_file_is_named_and_none_is_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=1.0), SEARCHED)
    folder = tmp_path / "trials"
    table = pq.read_table(folder / "trial-00000-attempt-1.parquet")
    newer = table.replace_schema_metadata({b"raydisp.schema_version": b"2"})
    pq.write_table(newer, folder / "newer.parquet")
    text = table.set_column(table.schema.get_field_index("trial"), "trial", pa.array(["zero"]))
    pq.write_table(text, folder / "text.parquet")
    weight = table.schema.get_field_index("dispersion.weight")
    pq.write_table(
        table.set_column(weight, "dispersion.weight", pa.array(["heavy"])), folder / "words.parquet"
    )
    pq.write_table(pa.table({"trial": pa.array([1], pa.int32())}), folder / "short.parquet")
    (folder / "folder.parquet").mkdir()
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "garbage.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    (folder / "_hidden").mkdir()
    (folder / "_hidden" / "x.parquet").write_bytes(b"")
    (folder / ".x.parquet").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    (folder / "gone.parquet").symlink_to(tmp_path / "nowhere")
    assert results.read_table(str(tmp_path), "trials")["val_loss"].to_pylist() == [1.0]
    told = {
        record.getMessage().split(" is left out: ")[0].split("/")[-1]: record.getMessage()
        for record in caplog.records
        if "is left out" in record.getMessage()
    }
    assert set(told) == {
        "newer.parquet",
        "text.parquet",
        "words.parquet",
        "short.parquet",
        "folder.parquet",
        "empty.parquet",
        "garbage.parquet",
        "gone.parquet",
    }
    assert told["newer.parquet"].endswith(
        "a newer raydisp wrote it (schema_version 2, this one knows 1); update raydisp to read it"
    )
    assert "its column trial is string, not int32" in told["text.parquet"]
    assert "its column dispersion.weight is string, that of others double" in told["words.parquet"]


def test_a_column_that_an_older_file_has_not_is_null(tmp_path: Path) -> None:
    results.write_trial(str(tmp_path), trial(0, val_loss=1.0), SEARCHED)
    file = tmp_path / "trials" / "trial-00000-attempt-1.parquet"
    table = pq.read_table(file).drop_columns(["study_json", "note"])
    pq.write_table(table, file)
    [row] = results.read_table(str(tmp_path), "trials").to_pylist()
    assert row["note"] is None
    assert row["val_loss"] == 1.0


def test_many_files_are_read_in_order(tmp_path: Path) -> None:
    for number in range(80):
        results.write_trial(str(tmp_path), trial(number, val_loss=float(number)), SEARCHED)
    assert results.read_tables(str(tmp_path)).trials["val_loss"].to_pylist() == [float(n) for n in range(80)]
