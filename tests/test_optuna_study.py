"""What Optuna is told: states and values exactly, the same live and from rows, and a file to look into."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.search.dispatch import Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.trial.assignment import blank_row

CURVE = [(512, {"val_loss": 6.0, "layer_cosine_mean": 0.5}), (1024, {"val_loss": 5.5})]
ONE = {"metric": "val_loss"}
TWO = [{"metric": "val_loss"}, {"metric": "tokens_per_s"}]


@pytest.fixture
def make(tree: dict[str, Any]) -> Any:
    def build(objective: Any = ONE, **search: Any) -> StudyConfig:
        tree["search"].update({"num_trials": 30, "objective": objective, **search})
        return StudyConfig.model_validate(tree)

    return build


def row_of(study: StudyConfig, trial: int, values: dict[str, Any], **columns: Any) -> dict[str, Any]:
    launch = Launch(study, "", "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1))
    row = blank_row(launch.assign(trial, 1, "search", values), study, 0.0)
    return {**row, "status": "completed", "num_tokens": 1280, **columns}


DONE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
SPEED = {"tokens_per_s": 100.0}
ENDINGS = [
    # objective, columns, curve, state, values, intermediate values
    (ONE, {"val_loss": 5.0}, CURVE, DONE, [5.0], {512: 6.0, 1024: 5.5}),
    (ONE, {"status": "pruned"}, CURVE, PRUNED, [5.5], {512: 6.0, 1024: 5.5}),
    (ONE, {"status": "pruned"}, [], PRUNED, None, {}),
    (ONE, {"status": "pruned", "val_loss": 4.0}, CURVE[:1], PRUNED, [6.0], {512: 6.0}),
    (ONE, {"status": "failed"}, CURVE, FAIL, None, {512: 6.0, 1024: 5.5}),
    (ONE, {"status": "diverged"}, [], FAIL, None, {}),
    (ONE, {"status": "failed", "val_loss": 5.0}, [], FAIL, None, {}),
    (ONE, {"val_loss": None}, [], FAIL, None, {}),
    (ONE, {"val_loss": math.nan}, [], FAIL, None, {}),
    (ONE, {"val_loss": math.inf}, [(512, {"val_loss": math.nan})], FAIL, None, {}),
    (TWO, {"val_loss": 5.0, **SPEED}, CURVE, DONE, [5.0, 100.0], {}),
    (TWO, {"val_loss": 5.0}, CURVE, FAIL, None, {}),
    (TWO, {"val_loss": math.nan, **SPEED}, [], FAIL, None, {}),
    (TWO, {"status": "pruned", **SPEED}, CURVE, PRUNED, None, {}),
    (TWO, {"status": "failed"}, [], FAIL, None, {}),
]


@pytest.mark.parametrize(("objective", "columns", "curve", "state", "values", "intermediate"), ENDINGS)
@pytest.mark.parametrize("live", [True, False], ids=["live", "from its row"])
def test_states_and_values_are_exact(
    make: Any,
    objective: Any,
    columns: Any,
    curve: Any,
    state: Any,
    values: Any,
    intermediate: Any,
    live: bool,
) -> None:
    study = make(objective)
    known = OptunaStudy(study, None)
    if live:
        row = row_of(study, 1, known.suggest(1), **columns)
        known.finish(row, curve)
    else:
        row = row_of(study, 1, {"dispersion.weight": 0.5, "dispersion.layers": [1]}, **columns)
        known.add_finished(row, curve)
    (trial,) = known.trials()
    assert (trial.state, trial.values, trial.intermediate_values) == (state, values, intermediate)
    assert trial.user_attrs["status"] == row["status"]
    assert trial.user_attrs["trial"] == 1
    if objective is TWO and state == PRUNED:
        assert trial.user_attrs["val_loss"] == 5.5, "what it had reached stands beside it"
    known.suggest(2)  # the search goes on
    known.close()


def test_nothing_stays_running(make: Any) -> None:
    known = OptunaStudy(make(), None)
    for trial in (1, 2, 3):
        known.suggest(trial)
    known.resume(9, {"dispersion.weight": 0.5, "dispersion.layers": "all"})
    assert [trial.state for trial in known.trials()] == [TrialState.RUNNING] * 4
    known.close()
    assert [trial.state for trial in known.trials()] == [FAIL] * 4


def test_an_end_without_a_beginning_is_no_trial(make: Any) -> None:
    """The baseline's row comes by here too."""
    study = make()
    known = OptunaStudy(study, None)
    known.report(0, 512, {"val_loss": 5.0})
    known.finish(row_of(study, 0, {"dispersion.weight": 0.0}, val_loss=6.0), CURVE)
    assert known.trials() == []


def facts(known: OptunaStudy) -> list[Any]:
    return [
        (
            trial.number,
            trial.state,
            trial.params,
            trial.distributions,
            trial.values,
            trial.intermediate_values,
            trial.user_attrs,
        )
        for trial in known.trials()
    ]


@pytest.mark.parametrize("objective", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_made_anew_from_rows_it_is_as_it_was(make: Any, objective: Any, sampler: str) -> None:
    study = make(objective, sampler=sampler, num_startup_trials=2)
    live, again = OptunaStudy(study, None), OptunaStudy(study, None)
    endings = [ending for ending in ENDINGS if ending[0] is objective] * 2
    for trial, (_, columns, curve, *_) in enumerate(endings, 1):
        values = live.suggest(trial)
        for num_tokens, metrics in curve[:1]:
            live.report(trial, num_tokens, metrics)
        row = row_of(study, trial, values, error_message="boom", **columns)
        live.finish(row, curve)
        again.add_finished(row, curve)
    assert facts(again) == facts(live)
    number = len(endings) + 1
    assert again.suggest(number) == live.suggest(number)


def test_a_trial_that_goes_on_reports_nothing_twice(make: Any) -> None:
    study = make()
    known = OptunaStudy(study, None)
    values = {"dispersion.weight": 0.5, "dispersion.layers": [1]}
    known.resume(4, values)
    for loss in (6.0, 7.0):
        known.report(4, 512, {"val_loss": loss})
    known.report(4, 768, {"val_loss": None})
    known.report(4, 768, {})
    known.finish(row_of(study, 4, values, val_loss=5.0), CURVE)
    (trial,) = known.trials()
    assert trial.intermediate_values == {512: 6.0, 1024: 5.5}
    assert trial.params == {"dispersion.weight": 0.5, "dispersion.layers": "[1]"}
    assert trial.values == [5.0]


@pytest.mark.parametrize("objective", [ONE, TWO], ids=["one", "two"])
def test_tpe_learns_beside_trials_that_did_not_complete(make: Any, objective: Any) -> None:
    study = make(objective, num_startup_trials=5)
    known, weights = OptunaStudy(study, None), []
    for trial in range(1, 41):
        values = known.suggest(trial)
        weights.append(abs(math.log10(values["dispersion.weight"] / 0.3)))
        status = {0: "pruned", 1: "failed"}.get(trial % 5, "completed")
        loss = 5 + weights[-1] ** 2
        measured = {"val_loss": loss, **SPEED} if status == "completed" else {}
        known.finish(row_of(study, trial, values, status=status, **measured), [(512, {"val_loss": loss})])
    assert sum(weights[-15:]) / 15 < 0.5 * sum(weights[:10]) / 10


def test_a_warm_start_is_told_apart(make: Any) -> None:
    study = make()
    known = OptunaStudy(study, None)
    rows = [
        row_of(study, trial, {"dispersion.weight": 0.5, "dispersion.layers": "all"}, val_loss=5.0)
        for trial in (1, 2)
    ]
    known.add_foreign([{**row, "study": "other"} for row in rows], "results/other")
    known.suggest(1)
    attributes = [trial.user_attrs for trial in known.trials()]
    assert [(one.get("study"), one.get("warm_start")) for one in attributes] == [
        ("other", "results/other"),
        ("other", "results/other"),
        (None, None),
    ]


# --- snapshots -----------------------------------------------------------------------------------------


def load(study: StudyConfig, place: Path) -> optuna.Study:
    return optuna.load_study(study_name=study.name, storage=f"sqlite:///{place}")


def test_snapshots(make: Any, tmp_path: Path) -> None:
    study = make()
    local, out = tmp_path / "local", tmp_path / "out"
    local.mkdir()
    known = OptunaStudy(study, local)
    place = out / "optuna.db"
    known.finish(row_of(study, 1, known.suggest(1), val_loss=5.0), CURVE)
    known.snapshot(str(out))
    assert [trial.value for trial in load(study, place).trials] == [5.0]

    before = place.stat().st_ino
    with contextlib.closing(sqlite3.connect(place)) as reader:  # a dashboard
        count = "SELECT count(*) FROM trials"
        assert reader.execute(count).fetchone() == (1,)
        known.finish(row_of(study, 2, known.suggest(2), val_loss=4.0))
        known.snapshot(str(out), now=False)
        assert reader.execute(count).fetchone() == (1,), "the last copy is young"
        known.snapshot(str(out))
        assert reader.execute(count).fetchone() == (2,), "it sees the new state in the file that it has open"
    assert place.stat().st_ino == before

    place.write_bytes(b"no database at all" * 1000)
    known.suggest(3)
    known.close()
    known.snapshot(str(out))
    assert [trial.state for trial in load(study, place).trials] == [DONE, DONE, FAIL]


def test_a_study_in_memory_leaves_no_file(make: Any, tmp_path: Path) -> None:
    known = OptunaStudy(make(), None)
    known.suggest(1)
    known.snapshot(str(tmp_path))
    known.close()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_fails_does_not_stop_the_search(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = OptunaStudy(make(), tmp_path)
    (tmp_path / "file").write_text("")
    known.try_snapshot(str(tmp_path / "file" / "out"))
    known.close()
    assert caplog.records
