"""The command over results folders, and the folder of version 1 that must stay readable."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raydisp import analysis, results
from raydisp.__main__ import main as raydisp_main
from raydisp.config.search import Objective
from raydisp.results import trial_list
from raydisp.results.command import main
from raydisp.storage import lease
from raydisp.studyfile import parse_study

V1 = str(Path(__file__).parent / "results_v1")
"""Trials 0, 1 (two attempts), 2 and 4 compacted, 3 failed, 5 open; with the study's own file."""


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What the command prints: on stdout, or, where it refuses, its one sentence on stderr."""
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    if status == 0:
        return out
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("raydisp.results: ")
    return err


# --- version 1 -----------------------------------------------------------------------------------------


def test_results_of_version_1_are_read() -> None:
    tables = results.read_tables(V1)
    rows = tables.trials.to_pylist()
    statuses = ["completed", "completed", "pruned", "failed", "completed", "interrupted"]
    assert [row["status"] for row in rows] == statuses
    assert [row["attempt"] for row in rows] == [1, 2, 1, 1, 1, 1]
    assert tables.attempts.num_rows == 7
    assert [row["dispersion.weight"] for row in rows] == [0.0, 0.8, 0.02, 1.9, 0.3, 0.5]
    assert [row["dispersion.layers"] for row in rows] == ["all", "last", "[1]", "all", "all", "last"]
    best = rows[1]
    assert best["val_loss"] == pytest.approx(4.778, abs=1e-12)
    assert best["resumed_step"] == 4
    assert best["ended_at"].isoformat() == "2026-01-05T09:12:04+00:00"
    assert json.loads(best["config_json"])["dispersion"]["layers"] == "last"
    assert rows[3]["error_message"] == "No space left on device"
    steps = tables.steps.filter(pc.equal(tables.steps["trial"], 1)).to_pylist()
    assert [(row["step"], row["attempt"]) for row in steps] == [
        *((step, 1) for step in range(1, 5)),
        *((step, 2) for step in range(5, 9)),
    ]
    assert steps[-1]["lm_loss"] == pytest.approx(4.728, abs=1e-12)
    assert tables.evals.num_rows == 6 * (5 + 5 + 3 + 2 + 5 + 2)
    assert tables.layers.num_rows == 3 * (5 + 5 + 3 + 2 + 5 + 2)
    assert {sum(row["histogram"]) for row in tables.layers.to_pylist()} == {1920}
    assert results.read_attempts(V1, 1)[1] == best
    text = Path(V1, "study.yaml").read_text()
    assert parse_study(text, "study.yaml").search.num_trials == 5
    objective = Objective(metric="val_loss", mode="min")
    assert ": trial 1 with val_loss 4.778 (weight 0.8," in analysis.summarise(tables.trials, objective)[0]


def test_a_plain_glob_reads_version_1() -> None:
    count = duckdb.sql(f"select count(*), count(distinct (trial, attempt)) from '{V1}/trials/**/*.parquet'")
    assert count.fetchall() == [(7, 7)]


# --- show ----------------------------------------------------------------------------------------------


def test_trials_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "show", V1).splitlines()
    assert lines[0].split()[:7] == [
        "trial",
        "arm",
        "status",
        "attempt",
        "dispersion.weight",
        "dispersion.layers",
        "val_loss",
    ]
    assert [line.split()[0] for line in lines[1:]] == list("012345")
    assert lines[2].split()[:8] == ["1", "search", "completed", "2", "0.8", "last", "4.7780", "1024"]
    assert lines[4].split()[6:8] == ["-", "-"], "missing is no 0"


def test_sorted_and_chosen_columns(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(
        capsys, "show", V1, "--columns", "trial,attempt,val_loss,train.learning_rate", "--sort", "val_loss"
    )
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["1", "2", "4.7780", "0.01"]
    assert [row[0] for row in rows[1:]] == ["1", "4", "0", "2", "3", "5"], "those without a value are last"
    out = told(capsys, "show", V1, "--all", "--columns", "trial,attempt", "--sort", "attempt", "--reverse")
    assert [line.split() for line in out.splitlines()[1:3]] == [["1", "2"], ["0", "1"]]


def test_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "show", V1, "--json", "--all").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 7
    assert set(rows[0]) == {*results.TRIAL_COLUMNS, "dispersion.weight", "dispersion.layers"}
    assert rows[2]["started_at"] == "2026-01-05T09:12:00+00:00"
    assert rows[-1]["val_loss"] is None


def test_what_differs_between_two_trials(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "show", V1, "--diff", "1", "4")
    rows = [line.split() for line in out.splitlines()]
    assert ["setting", "dispersion.weight", "0.8", "0.3"] in rows
    assert ["setting", "dispersion.layers", "last", "all"] in rows
    assert ["origin", "hostname", "node1", "node2"] in rows
    assert ["package", "torch", "2.13.0", "2.13.1"] in rows
    assert ["val_loss", "4.7780", "4.8780", "+0.1000"] in rows
    assert "learning_rate" not in out, "what is the same is not told"
    assert "traceback" not in out
    out = told(capsys, "show", V1, "--diff", "1", "4", "--json")
    items = {item["field"]: item for item in map(json.loads, out.splitlines())}
    assert items["val_loss"]["difference"] == pytest.approx(0.1)
    assert items["dispersion.weight"] == {"kind": "setting", "field": "dispersion.weight", "a": 0.8, "b": 0.3}


def test_two_attempts_of_a_trial_compare(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "show", V1, "--diff", "1.1", "1")
    assert ["outcome", "status", "interrupted", "completed"] in [line.split() for line in out.splitlines()]
    assert "setting" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--columns", "trail"], '"trail" is no column of these trials. Did you mean "trial"?'),
        (["--sort", "val_los"], 'Did you mean "val_loss"?'),
        (["--columns", "train.learning_rat"], 'Did you mean "train.learning_rate"?'),
        (["--diff", "1", "9"], "has no trial 9; it has 0 to 5"),
        (["--diff", "1.3", "2"], "trial 1 has no attempt 3; it has 1 to 2"),
        (["--diff", "one", "2"], '"one" is not the number of a trial'),
        (["--diff", "1", "1"], "trial 1 does not differ from itself"),
    ],
)
def test_what_is_not_there(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert sentence in told(capsys, "show", V1, *arguments, status=2)


def test_no_such_folder_and_no_trials(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("show", "compact"):
        assert "does not exist" in told(capsys, command, str(tmp_path / "no"), status=2)
        (tmp_path / "file").write_text("")
        assert "is a file" in told(capsys, command, str(tmp_path / "file"), status=2)
    near = told(capsys, "show", V1.replace("results_v1", "results_v"), status=2)
    assert 'Did you mean "results_v1"?' in near
    shutil.copytree(V1, tmp_path / "output" / "weights")
    message = told(capsys, "show", str(tmp_path / "output"), status=2)
    assert "holds no trial" in message
    assert message.endswith(f"for example {tmp_path}/output/weights\n")


def test_without_arguments_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m raydisp.results" in capsys.readouterr().err
    assert raydisp_main(["results", "show", V1]) == 0


def test_a_table_fits_its_terminal() -> None:
    columns = ["trial", "status", "dispersion.weight", "note", "val_loss", "num_tokens"]
    row = {
        "trial": 1,
        "status": "interrupted",
        "dispersion.weight": 0.25,
        "note": "word " * 9,
        "val_loss": 4.5,
    }
    for width in (200, 80, 60, 40, 20):
        lines = trial_list.format_table([row], columns, width=width).splitlines()
        assert max(map(len, lines[:2])) <= width
    narrow = trial_list.format_table([row], columns, width=40)
    assert "0.25" in narrow, "a number is not cut"
    assert narrow.splitlines()[-1] == "(num_tokens did not fit; --columns chooses)"
    assert "…" not in trial_list.format_table([row], columns)


def start(*arguments: str, **streams: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "raydisp.results", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **streams)  # type: ignore[call-overload]


def test_a_terminal_gets_what_fits_and_a_pipe_everything() -> None:
    ours, theirs = pty.openpty()
    process = start("show", V1, stdout=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(ours)
    assert process.wait() == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].endswith("did not fit; --columns chooses)")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    process = start("show", V1, "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


# --- compact -------------------------------------------------------------------------------------------


def test_compact_tells_what_it_did(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "study")
    shutil.copytree(V1, folder)
    assert told(capsys, "compact", folder).splitlines()[0] == "trials: nothing to merge"
    row = {**results.read_attempts(folder, 3)[0], "status": "completed", "attempt": 2}
    results.write_trial(folder, row, {"dispersion.weight": pa.float64(), "dispersion.layers": pa.string()})
    before = results.read_tables(folder)
    assert told(capsys, "compact", folder).splitlines() == [
        "trials: 3 files -> compact-2.parquet (7 rows)",
        "steps: 3 files -> compact-2.parquet (31 rows)",
        "evals: 2 files -> compact-2.parquet (120 rows)",
        "layers: 2 files -> compact-2.parquet (60 rows)",
        "items: nothing to merge",
    ]
    assert results.read_tables(folder) == before


def test_a_folder_in_use_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with lease.hold(str(tmp_path)):
        message = told(capsys, "compact", str(tmp_path), status=2)
    assert f"is in use by another raydisp: process {os.getpid()} on " in message
