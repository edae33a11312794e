"""When a search is over, worked out from rows; and what the dispatcher makes of it."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.search.agenda import Agenda
from raydisp.search.budget import Budget
from raydisp.search.dispatch import Dispatcher, Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.trial.assignment import Assignment, blank_row

NOON = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
FULL = 1280


def at(hours: float) -> datetime.datetime:
    return NOON + datetime.timedelta(hours=hours)


@pytest.fixture
def make(tree: dict[str, Any]) -> Any:
    def build(*, failures: dict[str, Any] | None = None, **search: Any) -> StudyConfig:
        tree["search"].update(num_trials=50, **search)
        tree["failures"] = failures or {}
        return StudyConfig.model_validate(tree)

    return build


def row_of(trial: int, status: str = "completed", **columns: Any) -> dict[str, Any]:
    return {
        "trial": trial,
        "arm": "search" if trial else "baseline",
        "status": status,
        "num_tokens": FULL,
        "val_loss": 5.0 - trial,
        "error_message": None,
        "started_at": None,
        "ended_at": None,
        **columns,
    }


# --- tokens --------------------------------------------------------------------------------------------


def test_tokens_count_those_of_trials_that_run(make: Any) -> None:
    budget = Budget(make(max_tokens_total=4 * FULL))
    assert budget.over(3, NOON) is None, "three run, and there is room for the fourth"
    assert budget.over(4, NOON) == (
        "search.max_tokens_total = 5,120: 0 tokens are used, 5,120 go to trials that run, and one more trial "
        "takes 1,280"
    )
    budget.add(row_of(0))
    budget.add(row_of(1))
    assert budget.over(1, NOON) is None
    assert budget.over(2, NOON) is not None


def test_what_a_stopped_trial_leaves_is_free(make: Any) -> None:
    budget = Budget(make(max_tokens_total=3 * FULL))
    for trial in (0, 1):
        budget.add(row_of(trial))
    assert budget.over(1, NOON) is not None
    budget.add(row_of(2, "pruned", num_tokens=512))
    assert budget.tokens == 2 * FULL + 512
    assert budget.over(0, NOON) is not None, "768 are left"
    roomy = Budget(make(max_tokens_total=4 * FULL))
    for trial in (0, 1):
        roomy.add(row_of(trial, "pruned", num_tokens=512))
    assert roomy.over(2, NOON) is None, "1,024 used, two run, and one more fits"
    assert roomy.over(3, NOON) is not None


def test_a_trial_whose_row_has_no_tokens_counts_by_its_curve(make: Any) -> None:
    budget = Budget(make())
    budget.add(row_of(1, "failed", num_tokens=None), num_tokens=512)
    budget.add(row_of(2, "failed", num_tokens=None))
    assert budget.tokens == 512


# --- hours ---------------------------------------------------------------------------------------------


def test_hours_are_those_in_which_any_trial_ran(make: Any) -> None:
    budget = Budget(make(max_hours=3.5))
    # an earlier run: two side by side, a gap of an hour, one within another
    spans = [(0, 1), (0.5, 1.5), (2.5, 3.5), (2.75, 3.0)]
    for trial, (start, end) in enumerate(spans, 1):
        budget.add(row_of(trial, started_at=at(start), ended_at=at(end)))
    assert budget.hours(at(100)) == pytest.approx(2.5)
    budget.begin(at(10))
    budget.begin(at(10.5))
    assert budget.hours(at(10.9)) == pytest.approx(3.4), "this run began at 10"
    assert budget.over(0, at(10.9)) is None
    assert budget.over(0, at(11)) == "search.max_hours = 3.5: trials ran for 3.50 hours"
    budget.add(row_of(9, started_at=at(10), ended_at=at(11)))
    assert budget.hours(at(11)) == pytest.approx(3.5), "trials of this run are within it"


def test_interrupted_attempts_took_time_too(make: Any) -> None:
    budget = Budget(make())
    budget.add_time(row_of(1, "interrupted", started_at=at(0), ended_at=at(1)))
    budget.add_time(row_of(1, "interrupted", started_at=at(5), ended_at=None))
    assert budget.hours(at(9)) == pytest.approx(1)


# --- no improvement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "least", "values", "over"),
    [
        ("min", 0.0, [5, 4, 4, 4], False),
        ("min", 0.0, [5, 4, 4, 4, 4], True),
        ("min", 0.0, [5, 4, 4, 4, 3.9], False),
        ("max", 0.0, [5, 4, 4, 4], True),
        ("max", 0.0, [4, 4, 5, 4], False),
        ("min", 0.25, [5, 4.9, 4.8, 4.75], True),
        ("min", 0.25, [5, 4.9, 4.8, 4.7], False),  # against the best that counted, not the last
        ("min", 0.0, [5, 6, None, 6], False),  # without a value it does not count
        ("min", 0.0, [5, 6, None, 6, 6], True),
    ],
)
def test_no_improvement(make: Any, mode: str, least: float, values: list[Any], over: bool) -> None:
    study = make(
        objective={"metric": "val_loss", "mode": mode},
        stop_when={"no_improvement_trials": 3, "min_improvement": least},
    )
    budget = Budget(study)
    budget.add(row_of(0, val_loss=0.0 if mode == "min" else 9.0))
    for trial, value in enumerate(values, 1):
        budget.add(row_of(trial, val_loss=value))
        budget.add(row_of(100 + trial, "pruned", val_loss=None))
        budget.add(row_of(200 + trial, "failed", val_loss=None))
    reason = budget.over(0, NOON) if over else None
    assert budget.over(0, NOON) == reason
    if over:
        by = f" by more than {least:g}" if least else ""
        assert reason == (
            f"search.stop_when: the best val_loss did not improve{by} in the last 3 completed trials"
        )


def test_of_several_objectives_the_named_one_counts(make: Any) -> None:
    study = make(
        objective=[{"metric": "val_loss"}, {"metric": "tokens_per_s"}],
        stop_when={"no_improvement_trials": 2, "metric": "tokens_per_s"},
    )
    budget = Budget(study)
    for trial, speed in enumerate((100.0, 200.0, 300.0), 1):
        budget.add(row_of(trial, val_loss=5.0 + trial, tokens_per_s=speed))
        assert budget.over(0, NOON) is None, "more tokens per second is better"
    for trial in (4, 5):
        budget.add(row_of(trial, val_loss=-trial, tokens_per_s=250.0))
    assert "the best tokens_per_s did not improve" in budget.over(0, NOON)


# --- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 2, None])
def test_failures(make: Any, limit: int | None) -> None:
    budget = Budget(make(failures={"max_failed_trials": limit}))
    for trial in range(1, 5):
        told = budget.failure()
        assert (told is not None) == (limit is not None and trial - 1 > limit)
        budget.add(row_of(trial, "failed", error_message=f"CUDA error\n  in trial {trial}"))
        budget.add(row_of(10 + trial, "diverged"))
    if limit is None:
        return
    assert budget.failure() == (
        f"4 trials failed, more than failures.max_failed_trials = {limit}; the first was trial 1: CUDA "
        "error in trial 1. Mend that and run the command with --retry-failed, or raise the limit"
    )
    assert budget.over(0, NOON) == budget.failure()


# --- the dispatcher ------------------------------------------------------------------------------------


class Runs:
    """A dispatcher whose trials end when a test says so."""

    def __init__(self, study: StudyConfig, agenda: Agenda | None = None) -> None:
        self.study = study
        self.launch = Launch(study, "", "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1))
        fresh = Agenda([], [], [0], list(range(1, study.search.num_trials + 1)))
        self.optuna = OptunaStudy(study, None)
        self.finished: list[int] = []
        self.dispatcher = Dispatcher(
            self.launch,
            agenda or fresh,
            self.optuna,
            on_finished=lambda row: self.finished.append(row["trial"]),
            now=lambda: NOON,
        )

    def row(self, assignment: Assignment, status: str = "completed", **columns: Any) -> dict[str, Any]:
        value = 5.0 if status == "completed" else None
        row = {**blank_row(assignment, self.study, 0.0), "num_tokens": FULL, "val_loss": value}
        return {**row, "status": status, "error_message": "boom", "ended_at": NOON, **columns}

    def end(self, assignment: Assignment, status: str = "completed", **columns: Any) -> None:
        self.dispatcher.close(self.row(assignment, status, **columns))


def test_a_spent_budget_lets_running_trials_end(make: Any) -> None:
    runs = Runs(make(max_tokens_total=3 * FULL))
    started = [runs.dispatcher.next() for _ in range(3)]
    assert [assignment.trial for assignment in started] == [0, 1, 2]
    assert runs.dispatcher.next() is None
    assert runs.dispatcher.over is None, "those that run may leave something"
    runs.end(started[0])
    runs.end(started[1], "pruned", num_tokens=0)
    fourth = runs.dispatcher.next()
    assert fourth.trial == 3, "what the stopped one left"
    assert runs.dispatcher.next() is None
    runs.end(started[2])
    runs.end(fourth)
    assert runs.dispatcher.next() is None
    assert runs.dispatcher.over.startswith("search.max_tokens_total = 3,840: 3,840 tokens are used")
    assert runs.finished == [0, 1, 2, 3]


def test_a_study_that_has_run_all_its_trials_is_not_cut_short(make: Any) -> None:
    runs = Runs(make(max_tokens_total=3 * FULL, stop_when={"no_improvement_trials": 1}))
    runs.dispatcher._new.clear()
    runs.end(runs.dispatcher.next())
    assert runs.dispatcher.next() is None
    assert runs.dispatcher.over is None


def test_too_many_failures_start_no_further_trial(make: Any) -> None:
    runs = Runs(make(failures={"max_failed_trials": 1}))
    started = [runs.dispatcher.next() for _ in range(4)]
    for assignment in started[1:3]:
        runs.end(assignment, "failed", num_tokens=None)
    assert runs.dispatcher.next() is None
    assert runs.dispatcher.over is None
    runs.dispatcher.put_back(started[3], 2)
    again = runs.dispatcher.next()
    assert (again.trial, again.attempt) == (3, 2), "what had begun goes on"
    for assignment in (started[0], again):
        runs.end(assignment)
    assert runs.dispatcher.next() is None
    assert "2 trials failed, more than failures.max_failed_trials = 1; the first was trial 1: boom" in (
        runs.dispatcher.over
    )


def test_the_last_trials_failure_does_not_say_that_others_are_missing(make: Any) -> None:
    runs = Runs(make(failures={"max_failed_trials": 0}))
    runs.dispatcher._new.clear()
    baseline = runs.dispatcher.next()
    runs.end(baseline, "failed")
    assert runs.dispatcher.next() is None
    assert runs.dispatcher.over is None


def test_trials_that_were_interrupted_go_on_beyond_the_budget(make: Any) -> None:
    study = make(max_tokens_total=2 * FULL)
    first = Runs(study)
    started = [first.dispatcher.next() for _ in range(2)]
    done = first.row(started[0])
    open_row = first.row(started[1], "interrupted", num_tokens=None)
    other = {**first.row(started[1]), "trial": 2}
    agenda = Agenda([done, other], [open_row], [], list(range(3, 51)))
    runs = Runs(study, agenda)
    resumed = runs.dispatcher.next()
    assert (resumed.trial, resumed.attempt, resumed.values) == (1, 2, started[1].values)
    assert runs.dispatcher.next() is None
    runs.end(resumed)
    assert runs.dispatcher.next() is None
    assert "3,840 tokens are used" in runs.dispatcher.over
