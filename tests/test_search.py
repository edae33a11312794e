"""The searcher without Ray: what it suggests, how it closes trials, what it makes of earlier rows."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raydisp import results, storage
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.agenda import Agenda, read_agenda
from raydisp.search.curves import read_curves
from raydisp.search.dispatch import Dispatcher, Launch, refresh_optuna_copy
from raydisp.search.on_tune import Searcher, StudySearcher
from raydisp.search.optuna_study import OptunaStudy, copied_statuses
from raydisp.search.stopping import full_tokens
from raydisp.trial.assignment import Assignment, blank_row


def loss_of(values: dict[str, Any]) -> float:
    """A made-up response with its minimum at weight 0.3."""
    return 5 + (math.log10(values["dispersion.weight"]) - math.log10(0.3)) ** 2


class Driver:
    """Plays Tune: asks the searcher for trials and lets each leave a row."""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        self.study, self.study_dir = study, str(folder / "results")
        local = Path(tempfile.mkdtemp(dir=folder.parent))
        self.optuna = OptunaStudy(study, local)
        self.finished: list[dict[str, Any]] = []
        launch = Launch(study, self.study_dir, "", "", "", None, "0", {"torch": "x"}, Plan(1, 1.0, 0.0, 1))
        self.agenda = read_agenda(study, self.study_dir)
        curves = read_curves(results.read_table(self.study_dir, "evals"), before_tokens=full_tokens(study))
        self.dispatcher = Dispatcher(
            launch, self.agenda, self.optuna, curves=curves, on_finished=self.finished.append
        )
        self.searcher = StudySearcher(self.dispatcher, self.optuna)
        self.count = 0

    def start(self) -> tuple[str, Assignment] | None:
        self.count += 1
        suggested = self.searcher.suggest(str(self.count))
        if suggested in (Searcher.FINISHED, None):
            return None
        return str(self.count), Assignment(**suggested)

    def write(self, assignment: Assignment, **columns: Any) -> None:
        row = blank_row(assignment, self.study, 0.0)
        value = loss_of(assignment.values) if assignment.values.get("dispersion.weight") else 6.0
        row.update({"status": "completed", "val_loss": value, **columns})
        results.write_trial(self.study_dir, row, space.column_types(self.study))

    def begin(self, assignment: Assignment) -> None:
        row = blank_row(assignment, self.study, 0.0)
        results.write_trial(self.study_dir, row, space.column_types(self.study))

    def run_all(self) -> list[dict[str, Any]]:
        values = []
        while (started := self.start()) is not None:
            trial_id, assignment = started
            self.write(assignment)
            self.searcher.on_trial_complete(trial_id)
            values.append({"trial": assignment.trial, **assignment.values})
        return values

    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.optuna.trials()]


@pytest.fixture
def eight(tree: dict[str, Any]) -> StudyConfig:
    tree["search"]["num_trials"] = 8
    return StudyConfig.model_validate(tree)


def test_the_baseline_comes_first_then_the_search(eight: StudyConfig, tmp_path: Path) -> None:
    suggested = Driver(eight, tmp_path).run_all()
    assert suggested[0] == {"trial": 0, "dispersion.weight": 0.0}
    assert [values["trial"] for values in suggested] == list(range(9))
    for values in suggested[1:]:
        assert 0.01 <= values["dispersion.weight"] <= 2
        assert values["dispersion.layers"] in ("all", "last", [1])


def test_same_seed_same_results_same_suggestions(eight: StudyConfig, tmp_path: Path) -> None:
    first = Driver(eight, tmp_path / "a").run_all()
    assert Driver(eight, tmp_path / "b").run_all() == first
    other = eight.model_copy(update={"seed": 99})
    assert Driver(other, tmp_path / "c").run_all() != first


def test_startup_trials_differ_from_each_other(eight: StudyConfig, tmp_path: Path) -> None:
    weights = [values["dispersion.weight"] for values in Driver(eight, tmp_path).run_all()[1:]]
    assert len(set(weights)) == len(weights)


def test_tpe_learns(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["search"].update(num_trials=40, num_startup_trials=10)
    suggested = Driver(StudyConfig.model_validate(tree), tmp_path).run_all()
    losses = [loss_of(values) for values in suggested[1:]]
    assert sum(losses[-15:]) / 15 < sum(losses[:10]) / 10 - 0.1
    assert min(losses) < 5.01


def test_a_study_cut_in_two_suggests_what_a_whole_one_does(eight: StudyConfig, tmp_path: Path) -> None:
    whole = Driver(eight, tmp_path / "whole").run_all()
    half = eight.model_copy(update={"search": eight.search.model_copy(update={"num_trials": 5})})
    first = Driver(half, tmp_path / "cut").run_all()
    second = Driver(eight, tmp_path / "cut").run_all()
    assert first + second == whole


def test_nothing_left_to_do(eight: StudyConfig, tmp_path: Path) -> None:
    Driver(eight, tmp_path).run_all()
    assert read_agenda(eight, str(tmp_path / "results")).num_trials == 0
    assert Driver(eight, tmp_path).start() is None


@pytest.mark.parametrize(
    ("columns", "state"),
    [
        ({}, TrialState.COMPLETE),
        ({"val_loss": None}, TrialState.FAIL),
        ({"val_loss": math.nan}, TrialState.FAIL),
        ({"status": "failed", "val_loss": None, "error_message": "boom"}, TrialState.FAIL),
        ({"status": "diverged", "val_loss": None}, TrialState.FAIL),
    ],
    ids=str,
)
def test_no_trial_stays_running_in_optuna(
    eight: StudyConfig, tmp_path: Path, columns: dict[str, Any], state: TrialState
) -> None:
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, assignment = driver.start()
    driver.write(assignment, **columns)
    driver.searcher.on_trial_complete(trial_id)
    assert driver.states() == [state]
    assert driver.start() is not None, "the search goes on"


@pytest.mark.parametrize("begun", [False, True])
def test_a_trial_that_lost_its_process_goes_on(eight: StudyConfig, tmp_path: Path, begun: bool) -> None:
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, assignment = driver.start()
    for attempt in (1, 2):
        if begun:
            driver.begin(assignment)
        driver.searcher.on_trial_complete(trial_id, error=True)
        row = results.read_trial(driver.study_dir, assignment.trial, attempt)
        assert (row["status"], row["error_type"]) == ("interrupted", "ProcessLost")
        assert row["dispersion.weight"] == assignment.values["dispersion.weight"]
        trial_id, again = driver.start()
        assert (again.trial, again.attempt, again.values) == (
            assignment.trial,
            attempt + 1,
            assignment.values,
        )
        assignment = again
    assert driver.states() == [TrialState.RUNNING], "one trial of the search, whatever its attempts"
    driver.searcher.on_trial_complete(trial_id, error=True)
    row = results.read_trial(driver.study_dir, assignment.trial, 3)
    assert (row["status"], row["error_type"]) == ("failed", "ProcessLost"), "failures.max_failures is 2"
    assert driver.states() == [TrialState.FAIL]
    assert driver.finished[0]["trial"] == assignment.trial


def test_attempts_that_the_trial_made_by_itself_are_seen(eight: StudyConfig, tmp_path: Path) -> None:
    """A driver goes on with a lost worker on its own; then it is lost itself."""
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, first = driver.start()
    driver.write(first, status="interrupted", error_type="WorkerLost", val_loss=None, ended_at=results.now())
    driver.begin(dataclasses.replace(first, attempt=2))
    driver.searcher.on_trial_complete(trial_id, error=True)
    assert results.read_trial(driver.study_dir, first.trial, 1)["error_type"] == "WorkerLost"
    assert results.read_trial(driver.study_dir, first.trial, 2)["error_type"] == "ProcessLost"
    assert driver.start()[1].attempt == 3


def test_a_trial_that_had_notice_goes_on_elsewhere(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, first = driver.start()
    driver.write(
        first, status="interrupted", error_type="PreemptedError", val_loss=None, ended_at=results.now()
    )
    driver.searcher.on_trial_complete(trial_id, error=True)
    assert results.read_trial(driver.study_dir, first.trial, 1)["error_type"] == "PreemptedError"
    assert driver.start()[1].attempt == 2


def test_the_search_is_not_over_while_a_trial_may_come_back(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    while (started := driver.start()) is not None:
        trial_id, assignment = started
        if assignment.trial < 8:
            driver.write(assignment)
            driver.searcher.on_trial_complete(trial_id)
    assert driver.searcher.suggest("x") is None
    driver.searcher.on_trial_complete(trial_id, error=True)
    trial_id, assignment = driver.start()
    assert (assignment.trial, assignment.attempt) == (8, 2)
    driver.write(assignment)
    driver.searcher.on_trial_complete(trial_id)
    assert driver.searcher.suggest("x") == Searcher.FINISHED


def test_a_disk_that_is_full_does_not_stop_the_search(
    eight: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(eight, tmp_path)
    trial_id, _ = driver.start()

    def full(location: str, content: bytes) -> None:
        raise OutputError(f"{location} cannot be written: No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    for _ in range(3):
        driver.searcher.on_trial_complete(trial_id, error=True)
        trial_id, _ = driver.start()
    monkeypatch.undo()
    assert driver.start() is not None


def test_interrupted_trials_go_on_under_their_number(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    trial_id, baseline = driver.start()
    driver.write(baseline)
    driver.searcher.on_trial_complete(trial_id)
    open_trials = [driver.start()[1] for _ in range(2)]
    for assignment in open_trials:
        driver.begin(assignment)
    driver.searcher.stop()
    for number in (2, 3):
        driver.searcher.on_trial_complete(str(number))
    driver.optuna.close()
    assert TrialState.RUNNING not in driver.states()

    again = Driver(eight, tmp_path)
    assert [row["trial"] for row in again.agenda.resumed] == [1, 2]
    resumed = [again.start()[1] for _ in range(2)]
    assert [(a.trial, a.attempt, a.values) for a in resumed] == [(a.trial, 2, a.values) for a in open_trials]
    assert again.start()[1].trial == 3


def test_a_trial_that_never_began_is_suggested_anew(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    for _ in range(3):
        driver.start()
    again = Driver(eight, tmp_path)
    assert again.agenda.resumed == []
    assert [again.start()[1].trial for _ in range(3)] == [0, 1, 2]


def test_an_interrupted_baseline_goes_on_too(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    driver.begin(driver.start()[1])
    assignment = Driver(eight, tmp_path).start()[1]
    assert (assignment.trial, assignment.attempt, assignment.arm) == (0, 2, "baseline")
    assert assignment.values == {"dispersion.weight": 0.0}


def test_the_snapshot_is_an_optuna_study_of_all_trials(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    suggested = driver.run_all()
    driver.optuna.close()
    driver.optuna.snapshot(driver.study_dir)
    loaded = optuna.load_study(study_name="tiny", storage=f"sqlite:///{driver.study_dir}/optuna.db")
    assert [trial.user_attrs["trial"] for trial in loaded.trials] == list(range(1, 9))
    assert [trial.params["dispersion.weight"] for trial in loaded.trials] == [
        values["dispersion.weight"] for values in suggested[1:]
    ]
    assert loaded.best_value == min(loss_of(values) for values in suggested[1:])


def test_max_objectives_are_maximised(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["search"]["objective"] = {"metric": "val_loss", "mode": "max"}
    driver = Driver(StudyConfig.model_validate(tree), tmp_path)
    driver.run_all()
    best = driver.optuna._studies["search"]._study.best_trial
    assert best.value == max(trial.value for trial in driver.optuna.trials())


def test_agenda_of_a_fresh_study(eight: StudyConfig, tmp_path: Path) -> None:
    agenda = read_agenda(eight, str(tmp_path))
    assert agenda == Agenda(finished=[], resumed=[], fixed=[0], new=list(range(1, 9)))
    assert agenda.num_trials == 9


def test_a_row_after_a_gap_is_seen(eight: StudyConfig, tmp_path: Path) -> None:
    """A full disk lost the row of attempt 2; attempt 3 completed, and is not run again."""
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, first = driver.start()
    driver.begin(first)
    third = dataclasses.replace(first, attempt=3)
    driver.searcher.running[trial_id] = third
    driver.write(third)
    driver.searcher.on_trial_complete(trial_id)
    assert driver.finished[-1]["attempt"] == 3
    assert driver.states() == [TrialState.COMPLETE]


def test_a_row_that_cannot_be_read_is_not_written_over(
    eight: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(eight, tmp_path)
    driver.start()
    trial_id, assignment = driver.start()
    driver.write(assignment)
    read = storage.read_bytes

    def stale(location: str) -> bytes:
        if location.endswith("trial-00001-attempt-1.parquet"):
            raise OutputError(f"{location} cannot be read: Stale file handle")
        return read(location)

    monkeypatch.setattr(storage, "read_bytes", stale)
    driver.searcher.on_trial_complete(trial_id, error=True)
    with pytest.raises(OutputError, match="Stale file handle"):
        read_agenda(eight, driver.study_dir)
    monkeypatch.undo()
    assert results.read_trial(driver.study_dir, 1, 1)["status"] == "completed"
    assert [row["trial"] for row in read_agenda(eight, driver.study_dir).finished] == [1]


def test_the_copy_for_dashboards_is_made_anew_where_it_lags(eight: StudyConfig, tmp_path: Path) -> None:
    driver = Driver(eight, tmp_path)
    driver.run_all()
    driver.optuna.snapshot(driver.study_dir)
    agenda = read_agenda(eight, driver.study_dir)
    statuses = dict.fromkeys(range(1, 9), "completed")
    place = Path(driver.study_dir, "optuna.db")
    assert copied_statuses(driver.study_dir) == statuses
    before = place.stat().st_mtime_ns
    refresh_optuna_copy(eight, driver.study_dir, agenda)
    assert place.stat().st_mtime_ns == before, "it said what the rows do"
    place.unlink()
    refresh_optuna_copy(eight, driver.study_dir, agenda)
    assert copied_statuses(driver.study_dir) == statuses
    loaded = optuna.load_study(study_name="tiny", storage=f"sqlite:///{place}")
    assert {trial.state for trial in loaded.trials} == {TrialState.COMPLETE}
    running = sqlite3.connect(place)
    running.execute("update trials set state = 'RUNNING' where number = 3")
    running.commit()
    running.close()
    refresh_optuna_copy(eight, driver.study_dir, agenda)
    assert copied_statuses(driver.study_dir) == statuses
