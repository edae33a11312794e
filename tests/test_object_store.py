"""A whole study whose results are in an object store: killed, continued, compacted, judged, exported."""

from __future__ import annotations

import copy
import glob
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pytest
import yaml
from aws_server import KEY_ID, SECRET, in_environment, make_bucket, running_aws
from conftest import run_command, start_command
from test_on_ray import descendants, wait_for

from raydisp import data, results, storage
from raydisp.config import StudyConfig
from raydisp.data import shared_blocks
from raydisp.errors import OutputError
from raydisp.results.compaction import compact
from raydisp.storage import lease

Row = dict[str, Any]
NUM_STEPS, CHECKPOINT_EVERY, EVALUATE_EVERY = 240, 60, 20


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with running_aws() as environment, in_environment(environment):
        make_bucket("results")
        yield "s3://results"


# --- files ----------------------------------------------------------------------------------------------


def test_files(bucket: str) -> None:
    folder = f"{bucket}/files"
    assert storage.list_files(folder) == []
    storage.check_writable(folder)
    assert storage.list_files(folder) == storage.list_leftovers(folder) == [], "nothing is left behind"
    place = storage.join(folder, "deep", "er", "x.bin")
    storage.write_bytes(place, b"abc")
    storage.write_bytes(storage.join(folder, "_hidden"), b"")
    assert storage.read_bytes(place) == b"abc"
    assert storage.file_size(place) == 3
    assert storage.modified_at(place) is not None
    assert storage.list_files(folder) == ["deep/er/x.bin"]
    assert storage.list_leftovers(folder) == ["_hidden"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"))
    storage.rename(place, storage.join(folder, "y.bin"))
    assert storage.read_bytes(storage.join(folder, "y.bin")) == b"abc"
    storage.delete_file(storage.join(folder, "y.bin"))
    storage.delete_file(storage.join(folder, "y.bin"))  # nothing happens
    storage.delete_dir(folder)
    storage.delete_dir(folder)
    assert not storage.exists(folder)


def test_a_bucket_that_is_not_there_is_said(bucket: str) -> None:
    with pytest.raises(OutputError, match=r"s3://nobodys/x/_probe cannot be written: .*bucket") as told:
        storage.check_writable("s3://nobodys/x")
    assert SECRET not in str(told.value)


def test_one_command_holds_the_folder(bucket: str) -> None:
    with lease.hold(f"{bucket}/held") as held:
        assert lease.still_held(f"{bucket}/held", held.id)
        with pytest.raises(OutputError, match="in use by another raydisp"), lease.hold(f"{bucket}/held"):
            pass
    assert not lease.still_held(f"{bucket}/held", held.id)


def test_token_blocks_are_made_once_and_fetched_by_each_node(
    bucket: str, study: StudyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = f"{bucket}/shared"
    made = data.prepare(study.trial, str(tmp_path / "here"))
    key = os.path.basename(made)
    elsewhere = str(tmp_path / "elsewhere" / key)
    assert not shared_blocks.fetch(elsewhere, output)
    assert not shared_blocks.fetch(elsewhere, str(tmp_path / "no store"))
    shared_blocks.publish(made, output)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: shared_blocks.fetch(elsewhere, output), range(4)))
    names = sorted(path.relative_to(made) for path in Path(made).rglob("*") if path.is_file())
    for name in names:
        assert (Path(elsewhere) / name).read_bytes() == (Path(made) / name).read_bytes()
    assert data.read_meta(elsewhere) == data.read_meta(made)
    left = {path.name for path in Path(elsewhere).parent.iterdir()}
    assert left == {key, f".fetching-{key}.lock"}

    storage.write_bytes(f"{output}/.cache/{key}/train.arrow", b"damaged")
    third = str(tmp_path / "third" / key)
    assert not shared_blocks.fetch(third, output), "they are made anew"
    assert "train.arrow is damaged" in caplog.text
    assert not os.path.exists(third)


# --- a study --------------------------------------------------------------------------------------------


def stored_study(tree: dict[str, Any], bucket: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["name"] = "stored"
    tree["output"] = f"{bucket}/studies"
    tree["train"].update(budget_tokens=128 * NUM_STEPS, learning_rate=2e-3)
    tree["search"] = {"num_trials": 1, "space": {"dispersion.weight": {"low": 0.1, "high": 1.0}}}
    tree["evaluate"].update(every_tokens=128 * EVALUATE_EVERY, max_tokens=64)
    tree["checkpoint"] = {"every_tokens": 128 * CHECKPOINT_EVERY}
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    tree["resources"] = {"max_concurrent_trials": 1}
    return tree


def saved_and_written(place: str, trial: int) -> tuple[int, int]:
    """Steps of a trial's last whole checkpoint and of its last written rows."""
    name = results.trial_name(trial)
    saved = [
        int(found.split("/")[0].removeprefix("step-"))
        for found in storage.list_files(f"{place}/checkpoints/{name}")
        if found.endswith("/COMPLETE")
    ]
    written = [
        int(found.removeprefix("until-").removesuffix(".parquet"))
        for found in storage.list_files(f"{place}/steps/{name}")
    ]
    return max(saved, default=-1), max(written, default=-1)


def rows_past_a_checkpoint(place: str, trial: int) -> bool:
    saved, written = saved_and_written(place, trial)
    return saved > 0 and written >= saved + EVALUATE_EVERY


def kill_everything(process: subprocess.Popen[str]) -> None:
    """As a machine that loses its power: the driver, its Ray and its trials at once."""
    victims = [*descendants(process.pid), psutil.Process(process.pid)]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGSTOP)  # none may notice that the others die
        except psutil.Error:
            continue
    for victim in victims:
        try:
            victim.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(victims, timeout=20)


def command(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"raydisp.{module}", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_study_is_killed_and_continued(
    tree: dict[str, Any], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = stored_study(tree, bucket)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    place = f"{bucket}/studies/stored"
    sessions = set(glob.glob("/tmp/ray/session_2*"))
    process = start_command(path, "--address", "local")
    try:
        wait_for(lambda: rows_past_a_checkpoint(place, 1))
        saved, written = saved_and_written(place, 1)
    finally:
        kill_everything(process)
    out, err = process.communicate()
    assert storage.exists(f"{place}/.lease.json"), "nobody gave it back"

    done = run_command(path, "--address", "local")
    assert done.returncode == 0, done.stderr
    said = out + err + done.stdout + done.stderr

    tables = results.read_tables(place)
    trials = tables.trials.to_pylist()
    assert [row["status"] for row in trials] == ["completed"] * len(trials)
    assert [row["phase"] for row in trials] == ["search"] * 2 + ["confirm"] * 4
    attempts = [row for row in tables.attempts.to_pylist() if row["trial"] == 1]
    assert [(row["attempt"], row["status"]) for row in attempts] == [(1, "interrupted"), (2, "completed")]
    assert attempts[1]["resumed_step"] >= saved > 0, "from its checkpoint"
    for row in trials:
        steps = [step for step in tables.steps.to_pylist() if step["trial"] == row["trial"]]
        assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1)), "none lost, none doubled"
        evals = [
            one["step"]
            for one in tables.evals.to_pylist()
            if (one["trial"], one["name"], one["split"]) == (row["trial"], "loss", "validation")
        ]
        assert evals == list(range(0, NUM_STEPS + 1, EVALUATE_EVERY))
    replayed = [step for step in tables.steps.to_pylist() if step["trial"] == 1 and step["attempt"] == 2]
    assert replayed[0]["step"] <= written, "rows past the checkpoint were written anew"
    assert storage.list_files(f"{place}/checkpoints") == []
    assert not storage.exists(f"{place}/.lease.json")
    for name in ("study.yaml", "confirm.yaml", "report.html", "optuna.db"):
        assert storage.file_size(f"{place}/{name}"), name
    assert storage.list_files(f"{place}/verdicts"), "judged"

    # Any tool that reads S3 sees each row once.
    plain = pads.dataset("results/studies/stored/trials", filesystem=storage.resolve(place)[0]).to_table()
    assert sorted(zip(*(plain[name].to_pylist() for name in ("trial", "attempt")), strict=True)) == [
        (row["trial"], row["attempt"]) for row in tables.attempts.to_pylist()
    ]
    copy_ = tmp_path / "optuna.db"
    copy_.write_bytes(storage.read_bytes(f"{place}/optuna.db"))
    told = optuna.load_study(study_name=None, storage=f"sqlite:///{copy_}")
    assert [trial.state.name for trial in told.trials] == ["COMPLETE"]

    # All the commands that read and write a results folder.
    said += command("verdict", place)
    said += command("report", place)
    said += command("export", place, "--arm", "best", "--to", str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").is_file()
    assert sum(merged.num_files for merged in compact(place)) > len(trials)
    assert results.read_tables(place).steps.num_rows == NUM_STEPS * len(trials)
    said += command("results", "show", place)
    again = run_command(path, "--address", "local")
    assert again.returncode == 0, again.stderr
    assert "trials are done already" in again.stdout

    # A secret is nowhere: not in what was said, not in what was written, not in what Ray has logged.
    assert KEY_ID not in said
    assert SECRET not in said
    for name in storage.list_files(place):
        content = storage.read_bytes(f"{place}/{name}")
        assert SECRET.encode() not in content, name
        assert KEY_ID.encode() not in content, name
    for row in tables.attempts.to_pylist():
        assert SECRET not in json.dumps(row, default=str)
    for session in set(glob.glob("/tmp/ray/session_2*")) - sessions:
        for log in glob.glob(f"{session}/logs/**", recursive=True):
            if os.path.isfile(log):
                assert SECRET.encode() not in Path(log).read_bytes(), log


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_trials_of_two_workers_are_stored(
    tree: dict[str, Any], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker writes its share of a checkpoint; what Ray Train keeps there is gone at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = stored_study(tree, bucket)
    del tree["confirm"]
    tree["name"] = "two"
    tree["train"]["budget_tokens"] = 128 * 40
    tree["checkpoint"] = {"every_tokens": 128 * 20}
    tree["resources"] = {"num_workers": 2}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = run_command(path, "--address", "local")
    assert done.returncode == 0, done.stderr
    place = f"{bucket}/studies/two"
    tables = results.read_tables(place)
    assert [(row["trial"], row["status"], row["world_size"]) for row in tables.trials.to_pylist()] == [
        (0, "completed", 2),
        (1, "completed", 2),
    ]
    assert tables.steps["step"].to_pylist() == [*range(1, 41)] * 2
    assert storage.list_files(f"{place}/checkpoints") == []
    filesystem, folder = storage.resolve(f"{place}/.ray")
    left = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    assert [info.path for info in left if info.type == pafs.FileType.File] == []
    assert SECRET not in done.stdout + done.stderr
