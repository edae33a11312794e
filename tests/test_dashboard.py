"""optuna-dashboard on the optuna.db of a study: what it shows over HTTP, while a study runs and after."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_search import Driver

from raydisp.config import StudyConfig

pytest.importorskip(
    "optuna_dashboard", reason="optuna-dashboard is not installed: pip install 'raydisp[test]'"
)

Get = Callable[[str], Any]


@contextlib.contextmanager
def dashboard(study_dir: str, log: Path) -> Iterator[Get]:
    """`optuna-dashboard sqlite:///...` on loopback; a function that asks it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The command, by its module: a script may not be on the path.
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    options = [f"sqlite:///{study_dir}/optuna.db", "--host", "127.0.0.1", "--port", str(port)]

    def get(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer:
            return json.load(answer)

    with log.open("w") as written:
        process = subprocess.Popen([*command, *options], stdout=written, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: process.poll() is not None or answers(get), log)
            yield get
        finally:
            process.terminate()
            process.wait(20)


def answers(get: Get) -> bool:
    try:
        get("studies")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def wait_for(condition: Callable[[], Any], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain; the dashboard said: {log.read_text()}"
        time.sleep(0.2)


def studies(get: Get) -> dict[str, dict[str, Any]]:
    return {one["study_name"]: one for one in get("studies")["study_summaries"]}


def details(get: Get, study_id: int) -> dict[str, Any]:
    found: dict[str, Any] = get(f"studies/{study_id}?after=0")
    return found


def states(get: Get, study_id: int) -> list[str]:
    return [trial["state"] for trial in details(get, study_id)["trials"]]


def test_a_study_is_shown_while_it_runs_and_after(tree: dict[str, Any], tmp_path: Path):
    tree["search"]["num_trials"] = 4
    driver = Driver(StudyConfig.model_validate(tree), tmp_path / "study")
    started = [driver.start() for _ in range(2)]  # the baseline, and the first of the search
    for one in started:
        assert one is not None
        driver.write(one[1])
        driver.searcher.on_trial_complete(one[0])
    running = driver.start()
    assert running is not None
    driver.begin(running[1])
    driver.optuna.snapshot(driver.study_dir)
    log = tmp_path / "dashboard.log"
    with dashboard(driver.study_dir, log) as get:
        (summary,) = studies(get).values()
        assert summary["study_name"] == "tiny"
        assert summary["directions"] == ["minimize"]
        study_id = summary["study_id"]
        assert states(get, study_id) == ["Complete", "Running"]
        shown = details(get, study_id)
        assert shown["objective_names"] == ["val_loss"]
        first = shown["trials"][0]
        rows = {row["trial"]: row for row in driver.finished}
        assert first["values"] == [rows[1]["val_loss"]]
        assert {one["name"]: float(one["param_internal_value"]) for one in first["params"]}[
            "dispersion.weight"
        ] == pytest.approx(rows[1]["dispersion.weight"])
        attributes = {one["key"]: one["value"] for one in first["user_attrs"]}
        assert (attributes["trial"], attributes["status"]) == ("1", "completed")

        # The study goes on while the dashboard has the file open.
        driver.write(running[1], status="failed", val_loss=None)
        driver.searcher.on_trial_complete(running[0])
        driver.run_all()
        wait_for(lambda: states(get, study_id) == ["Complete", "Fail", "Complete", "Complete"], log)
        driver.optuna.close()
        driver.optuna.snapshot(driver.study_dir)
        assert states(get, study_id) == ["Complete", "Fail", "Complete", "Complete"]
    with dashboard(driver.study_dir, log) as get:
        (summary,) = studies(get).values()
        assert states(get, summary["study_id"]) == ["Complete", "Fail", "Complete", "Complete"]


def test_several_objectives_have_their_names(tree: dict[str, Any], tmp_path: Path):
    tree["search"]["objective"] = [{"metric": "val_loss"}, {"metric": "tokens_per_s"}]
    driver = Driver(StudyConfig.model_validate(tree), tmp_path / "study")
    while (one := driver.start()) is not None:
        driver.write(one[1], tokens_per_s=1000.0 + one[1].trial)
        driver.searcher.on_trial_complete(one[0])
    driver.optuna.snapshot(driver.study_dir)
    with dashboard(driver.study_dir, tmp_path / "dashboard.log") as get:
        (summary,) = studies(get).values()
        assert summary["directions"] == ["minimize", "maximize"]
        shown = details(get, summary["study_id"])
        assert shown["objective_names"] == ["val_loss", "tokens_per_s"]
        assert [trial["values"][1] for trial in shown["trials"]] == [1001.0, 1002.0, 1003.0]


def test_several_arms_are_several_studies(tree: dict[str, Any], tmp_path: Path):
    space = {"train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
    tree["search"].update(num_trials=2, space=space)
    tree["arms"] = {
        "baseline": {"dispersion.weight": 0},
        "dispersion": {"dispersion.weight": {"low": 0.01, "high": 2.0, "log": True}},
    }
    driver = Driver(StudyConfig.model_validate(tree), tmp_path / "study")
    driver.run_all()
    driver.optuna.snapshot(driver.study_dir)
    with dashboard(driver.study_dir, tmp_path / "dashboard.log") as get:
        found = studies(get)
        assert sorted(found) == ["tiny: baseline", "tiny: dispersion"]
        for summary in found.values():
            assert states(get, summary["study_id"]) == ["Complete", "Complete"]
