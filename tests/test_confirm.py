"""The confirm phase below Ray: what is frozen, what may not change, what is run in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_arms import RATES, WEIGHTS, make, mistake

from raydisp import paired, results
from raydisp.arms import Arms
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.confirm import planning as confirm
from raydisp.confirm import runs as confirm_runs
from raydisp.confirm.frozen_plan import Frozen, read_frozen
from raydisp.confirm.planning import NothingToConfirmError
from raydisp.confirm.runs import ConfirmDispatcher
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.dispatch import Launch
from raydisp.trial.assignment import Assignment, blank_row
from raydisp.verdict import words as verdict_words

FULL = 1280


@pytest.fixture
def confirmed(tree: dict[str, Any]) -> dict[str, Any]:
    tree["search"] = {
        "num_trials": 4,
        "space": {"dispersion.weight": {**WEIGHTS, "low": 0.0, "log": False}},
        "sampler": "random",
    }
    tree["confirm"] = {"smallest_effect": 0.01}
    return tree


def launch_of(study: StudyConfig, study_dir: str) -> Launch:
    return Launch(study, study_dir, "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1), data_sha256="d" * 64)


def leave(study: StudyConfig, study_dir: str, trial: int, **columns: Any) -> dict[str, Any]:
    """The row of a search trial."""
    arm = Arms(study).of(trial)
    values = {**arm.fixed, **columns.pop("values", {})}
    row = blank_row(launch_of(study, study_dir).assign(trial, 1, arm.name, values), study, 0.0)
    row |= {"status": "completed", "num_tokens": FULL, "config_sha256": f"{trial:064x}", **columns}
    results.write_trial(study_dir, row, space.column_types(study))
    return row


def searched(study: StudyConfig, study_dir: str) -> None:
    """Four trials: the best has weight 0, the next was stopped early, then come trials 4 and 1."""
    leave(study, study_dir, 0, val_loss=5.0)
    leave(study, study_dir, 1, val_loss=4.9, values={"dispersion.weight": 0.1})
    leave(study, study_dir, 2, val_loss=4.0, values={"dispersion.weight": 0.0})
    leave(
        study, study_dir, 3, val_loss=4.1, values={"dispersion.weight": 0.3}, num_tokens=512, status="pruned"
    )
    leave(study, study_dir, 4, val_loss=4.8, values={"dispersion.weight": 0.2})


def freeze(study: StudyConfig, study_dir: str) -> Frozen:
    return confirm.freeze(study, results.read_tables(study_dir).trials)


def test_the_best_full_budget_trial_with_a_weight_is_frozen_beside_the_baseline(
    confirmed: dict[str, Any], tmp_path: Path
) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    frozen = freeze(study, study_dir)
    assert list(frozen.arms) == ["baseline", "dispersion"]
    assert frozen.arms["baseline"].values == {"dispersion.weight": 0.0}
    assert (frozen.arms["dispersion"].from_trial, frozen.arms["dispersion"].values) == (
        4,
        {"dispersion.weight": 0.2},
    )
    assert frozen.seeds == [4, 5, 6, 7, 8, 9], "six, after the seed of the search"
    assert (frozen.first_trial, frozen.num_trials) == (5, 12)
    assert frozen.hypotheses == ["the mean over seeds of test_loss(dispersion) - test_loss(baseline) is 0"]
    assert not frozen.pretrained
    assert frozen.data_sha256 == "d" * 64


def test_several_configurations_are_frozen_once_each(confirmed: dict[str, Any], tmp_path: Path) -> None:
    confirmed["confirm"]["top_k"] = 3
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    again = {"values": {"dispersion.weight": 0.2}, "config_sha256": f"{4:064x}"}
    leave(study, study_dir, 3, val_loss=4.8, **again)  # what trial 4 is, a second time
    frozen = freeze(study, study_dir)
    assert {name: arm.from_trial for name, arm in frozen.arms.items()} == {
        "baseline": None,
        "dispersion_1": 3,
        "dispersion_2": 1,
    }
    assert len(frozen.seeds) == paired.num_seeds_needed(2) == 7


def test_every_arm_is_frozen_at_its_own_best(armed_confirm: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(armed_confirm), str(tmp_path / "r")
    arms = Arms(study)
    for trial in range(arms.num_trials):
        arm = arms.of(trial)
        values = {"train.learning_rate": 0.001 * (trial + 1)} if arm.searched else {}
        if arm.name == "dispersion":
            values |= {"dispersion.weight": 0.5, "dispersion.layers": [1, 2]}
        leave(study, study_dir, trial, val_loss=6.0 - 0.1 * trial, values=values)
    frozen = freeze(study, study_dir)
    assert list(frozen.arms) == ["baseline", "dispersion", "noisy", "settled"]
    assert {name: arm.from_trial for name, arm in frozen.arms.items()} == {
        "baseline": 4,
        "dispersion": 5,
        "noisy": 6,
        "settled": None,
    }
    assert frozen.arms["dispersion"].values == {
        "train.learning_rate": 0.006,
        "dispersion.weight": 0.5,
        "dispersion.layers": [1, 2],
    }
    assert frozen.arms["noisy"].values == {
        "dispersion.weight": 0,
        "noisy_embedding.alpha": 5.0,
        "train.learning_rate": 0.007,
    }
    assert len(frozen.seeds) == 7


@pytest.fixture
def armed_confirm(tree: dict[str, Any]) -> dict[str, Any]:
    tree["search"] = {"num_trials": 2, "space": {"train.learning_rate": dict(RATES)}, "sampler": "random"}
    tree["arms"] = {
        "noisy": {"dispersion.weight": 0, "noisy_embedding.alpha": 5.0},
        "baseline": {"dispersion.weight": 0},
        "dispersion": {"dispersion.weight": dict(WEIGHTS), "dispersion.layers": {"choices": ["all", [1, 2]]}},
        "settled": {"dispersion.weight": 0.5, "train.learning_rate": 0.01},
    }
    # In the order of the file noisy comes first; its trials are 1 and 4, the baseline's 2 and 5, ...
    tree["arms"] = {name: tree["arms"][name] for name in ("baseline", "dispersion", "noisy", "settled")}
    tree["confirm"] = {"smallest_effect": 0.02}
    return tree


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"status": "failed", "val_loss": None, "num_tokens": None}, "4 failed"),
        ({"status": "pruned", "num_tokens": 512}, "4 pruned"),
        ({"val_loss": None}, "4 completed"),
    ],
    ids=["all failed", "all pruned", "none with the objective"],
)
def test_a_search_that_found_nothing_is_not_confirmed(
    confirmed: dict[str, Any], tmp_path: Path, columns: dict[str, Any], told: str
) -> None:
    confirmed["failures"] = {"max_failed_trials": None}
    study, study_dir = make(confirmed), str(tmp_path / "r")
    leave(study, study_dir, 0, val_loss=5.0)
    for trial in range(1, 5):
        leave(study, study_dir, trial, **{"values": {"dispersion.weight": 0.1}, "val_loss": 4.0, **columns})
    with pytest.raises(NothingToConfirmError, match=told):
        freeze(study, study_dir)


def test_a_broken_search_is_not_confirmed(confirmed: dict[str, Any], tmp_path: Path) -> None:
    confirmed["failures"] = {"max_failed_trials": 1}
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    for trial in (1, 3):
        leave(study, study_dir, trial, status="failed", values={"dispersion.weight": 0.1})
    with pytest.raises(NothingToConfirmError, match="2 trials of the search failed"):
        freeze(study, study_dir)


def test_the_plan_is_written_before_and_read_as_it_was(confirmed: dict[str, Any], tmp_path: Path) -> None:
    confirmed["confirm"]["spread"] = 0.004
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    work = confirm_runs.settle(study, study_dir)
    assert work.frozen == read_frozen(study_dir)
    assert work.frozen is not None
    text = (tmp_path / "r" / "confirm.yaml").read_text()
    told = yaml.safe_load(text)
    assert (told["primary_outcome"], told["alpha"], told["smallest_effect"]) == ("test_loss", 0.05, 0.01)
    promise = paired.promise(0.004, 6, 1, 0.01)
    assert told["promise"]["power"] == promise.power
    assert work.search.num_trials == 0
    assert work.confirm is not None
    assert work.confirm.fixed == list(range(5, 17))
    assert work.num_trials(study) == 12
    # A second look changes nothing, not even the time at which it was frozen.
    assert confirm_runs.read_work(study, study_dir).frozen == work.frozen
    assert (tmp_path / "r" / "confirm.yaml").read_text() == text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tree: tree["confirm"].update(smallest_effect=0.02), "confirm.smallest_effect (0.01 -> 0.02)"),
        (lambda tree: tree["confirm"].update(num_seeds=9), "confirm.num_seeds (null -> 9)"),
        (lambda tree: tree["confirm"].update(top_k=2), "confirm.top_k (1 -> 2)"),
        (lambda tree: tree["search"].update(num_trials=6), "search.num_trials (4 -> 6)"),
        (
            lambda tree: tree["confirm"].update(keep_models="all"),
            'confirm.keep_models ("first_seed" -> "all")',
        ),
        (lambda tree: tree.pop("confirm"), "has no confirm section any more"),
    ],
    ids=["another effect", "more seeds", "more arms", "a longer search", "other models", "no section"],
)
def test_a_settled_plan_does_not_change(
    confirmed: dict[str, Any], tmp_path: Path, change: Any, told: str
) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    change(confirmed)
    with pytest.raises(OutputError) as caught:
        confirm_runs.read_work(make(confirmed), study_dir)
    assert told in str(caught.value)
    assert "--fork NAME" in str(caught.value)


@pytest.mark.parametrize("content", ["[1, 2]", "seeds: [1]", ": :", "study: \x00"])
def test_a_plan_that_is_not_ours_is_refused(confirmed: dict[str, Any], tmp_path: Path, content: str) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    (tmp_path / "r" / "confirm.yaml").write_text(content)
    with pytest.raises(OutputError, match=r"confirm\.yaml"):
        confirm_runs.read_work(study, study_dir)


class Runner:
    """Plays the search's adaptor: takes assignments and leaves rows."""

    def __init__(self, study: StudyConfig, study_dir: str) -> None:
        work = confirm_runs.read_work(study, study_dir)
        assert work.frozen is not None
        assert work.confirm is not None
        self.study, self.study_dir, self.frozen = study, study_dir, work.frozen
        self.dispatcher = ConfirmDispatcher(launch_of(study, study_dir), work.frozen, work.confirm)

    def begin(self) -> Assignment:
        assignment = self.dispatcher.next()
        assert assignment is not None
        self.write(assignment)
        return assignment

    def write(self, assignment: Assignment, **columns: Any) -> dict[str, Any]:
        row = {**blank_row(assignment, self.study, 0.0), **columns}
        results.write_trial(self.study_dir, row, space.column_types(self.study))
        return row

    def end(self, assignment: Assignment, **columns: Any) -> None:
        done = {"status": "completed", "test_loss": 5.0, "num_tokens": FULL, **columns}
        self.dispatcher.close(self.write(assignment, **done))


def test_runs_come_seed_by_seed_and_carry_the_plan(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    runner = Runner(study, study_dir)
    first = [runner.begin() for _ in range(4)]
    assert [(one.trial, one.arm, one.values["seed"]) for one in first] == [
        (5, "baseline", 4),
        (6, "dispersion", 4),
        (7, "baseline", 5),
        (8, "dispersion", 5),
    ]
    assert {one.phase for one in first} == {"confirm"}
    assert [one.keep_model for one in first] == [True, True, False, False], "of the first seed"
    assert {one.stop_rule is None for one in first} == {True}, "no scheduler"
    rows = [row for row in results.read_tables(study_dir).trials.to_pylist() if row["phase"] == "confirm"]
    assert [row["seed"] for row in rows] == [4, 4, 5, 5]
    assert [json.loads(row["config_json"])["seed"] for row in rows] == [4, 4, 5, 5]
    assert [row["dispersion.weight"] for row in rows] == [0.0, 0.2, 0.0, 0.2]
    assert {row["confirm_json"] for row in rows} == {runner.frozen.to_json()}


def test_a_killed_phase_goes_on_where_it_was(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    runner = Runner(study, study_dir)
    one, two, three = (runner.begin() for _ in range(3))
    runner.end(two)
    again = Runner(study, study_dir)
    taken = [again.begin() for _ in range(11)]
    assert [(run.trial, run.attempt) for run in taken[:3]] == [(one.trial, 2), (three.trial, 2), (8, 1)]
    assert sorted(run.trial for run in taken) == [5, *range(7, 17)]
    assert again.dispatcher.next() is None


def test_a_search_that_was_longer_once_keeps_its_rows(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirmed["search"]["num_trials"] = 2
    shorter = make(confirmed)
    work = confirm_runs.settle(shorter, study_dir)
    assert work.frozen is not None
    assert work.frozen.first_trial == 5, "after all trials that there are"
    assert work.frozen.arms["dispersion"].from_trial == 4


def test_a_plan_that_is_not_that_of_its_runs_is_refused(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    Runner(study, study_dir).begin()
    place = tmp_path / "r" / "confirm.yaml"
    place.write_text(place.read_text().replace("0.01", "0.5"))
    confirmed["confirm"]["smallest_effect"] = 0.5
    with pytest.raises(OutputError, match="is not the plan that its runs carry"):
        confirm_runs.read_work(make(confirmed), study_dir)


def test_a_search_trial_that_has_not_ended_holds_up_the_plan(
    confirmed: dict[str, Any], tmp_path: Path
) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    leave(study, study_dir, 3, status="interrupted", values={"dispersion.weight": 0.1})
    with pytest.raises(NothingToConfirmError, match="trial 3 of the search has not ended"):
        confirm_runs.settle(study, study_dir)
    assert not (tmp_path / "r" / "confirm.yaml").exists()


def test_an_arm_that_found_nothing_is_left_out_and_said(
    armed_confirm: dict[str, Any], tmp_path: Path
) -> None:
    study, study_dir = make(armed_confirm), str(tmp_path / "r")
    arms = Arms(study)
    for trial in range(arms.num_trials):
        arm = arms.of(trial)
        values = {"train.learning_rate": 0.01} if arm.searched else {}
        if arm.name == "dispersion":
            values |= {"dispersion.weight": 0.5, "dispersion.layers": "all"}
        lost = {"status": "diverged", "val_loss": None} if arm.name == "noisy" else {"val_loss": 5.0}
        leave(study, study_dir, trial, values=values, **lost)
    frozen = freeze(study, study_dir)
    assert list(frozen.arms) == ["baseline", "dispersion", "settled"]
    assert list(frozen.left_out) == ["noisy"]
    assert "2 diverged" in frozen.left_out["noisy"]
    (told,) = verdict_words.left_out_sentences(frozen)
    assert told.startswith("noisy is not confirmed: no trial of arm noisy completed")


def test_what_both_were_tuned_to_is_said(armed_confirm: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(armed_confirm), str(tmp_path / "r")
    arms = Arms(study)
    for trial in range(arms.num_trials):
        arm = arms.of(trial)
        values = {"train.learning_rate": 0.02 if arm.name == "noisy" else 0.01} if arm.searched else {}
        if arm.name == "dispersion":
            values |= {"dispersion.weight": 0.5, "dispersion.layers": "all"}
        leave(study, study_dir, trial, val_loss=5.0, values=values)
    (told,) = verdict_words.tuned_sentences(freeze(study, study_dir))
    assert told.startswith("noisy was tuned to train.learning_rate 0.02 and the baseline 0.01:")


def test_what_only_an_arm_was_tuned_over_is_said(armed_confirm: dict[str, Any], tmp_path: Path) -> None:
    armed_confirm["search"]["space"] = {}
    armed_confirm["arms"]["dispersion"]["train.learning_rate"] = dict(RATES)
    study, study_dir = make(armed_confirm), str(tmp_path / "r")
    assert any("train.learning_rate is tuned for dispersion" in text for text in confirm.warnings(study))
    arms = Arms(study)
    for trial in range(arms.num_trials):
        values = {"train.learning_rate": 0.02, "dispersion.weight": 0.5, "dispersion.layers": "all"}
        leave(study, study_dir, trial, val_loss=5.0, values=values if arms.of(trial).searched else {})
    told = verdict_words.unfair_sentences(freeze(study, study_dir))
    assert verdict_words.tuned_sentences(freeze(study, study_dir)) == []
    assert [text.split(" of its own")[0] for text in told] == [
        "dispersion has train.learning_rate 0.02",
        "settled has train.learning_rate 0.01",
    ]


@pytest.mark.parametrize(
    "name", ["model.num_layers", "data.context_length", "train.global_batch_tokens", "model.vocab_size"]
)
def test_what_makes_pairs_impossible_is_refused(confirmed: dict[str, Any], name: str) -> None:
    choices = {"model.vocab_size": [320, 400], "train.global_batch_tokens": [128, 256]}
    confirmed["search"]["space"][name] = choices.get(name, [2, 4] if name == "model.num_layers" else [16, 32])
    assert f"{name} varies between trials, and the confirm phase pairs runs" in mistake(confirmed)
    del confirmed["confirm"]
    make(confirmed)


def test_a_lost_plan_is_restored_from_the_rows(confirmed: dict[str, Any], tmp_path: Path) -> None:
    """Not settled anew, which another smallest effect might slip through."""
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    plan = (tmp_path / "r" / "confirm.yaml").read_bytes()
    Runner(study, study_dir).begin()
    (tmp_path / "r" / "confirm.yaml").unlink()
    confirmed["confirm"]["smallest_effect"] = 1.0
    with pytest.raises(OutputError, match=r"confirm\.smallest_effect \(0\.01 -> 1\.0\)"):
        confirm_runs.read_work(make(confirmed), study_dir)
    assert confirm_runs.read_work(study, study_dir).frozen is not None
    assert (tmp_path / "r" / "confirm.yaml").read_bytes() == plan


def test_a_fork_is_tested_on_seeds_that_nobody_has_seen(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, old = make(confirmed), str(tmp_path / "old")
    searched(study, old)
    confirm_runs.settle(study, old)
    runner = Runner(study, old)
    for _ in range(12):
        runner.end(runner.begin())
    confirmed["search"]["warm_start"] = [old]
    fork, study_dir = make(confirmed), str(tmp_path / "r")
    searched(fork, study_dir)
    assert freeze(fork, study_dir).seeds == [10, 11, 12, 13, 14, 15], "4 to 9 were the old study's"


def test_too_many_failures_stop_the_phase_with_the_first(confirmed: dict[str, Any], tmp_path: Path) -> None:
    confirmed["failures"] = {"max_failed_trials": 1}
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirm_runs.settle(study, study_dir)
    runner = Runner(study, study_dir)
    for _ in range(2):
        runner.end(runner.begin(), status="failed", test_loss=None, error_message="disk\nfull")
    assert runner.dispatcher.next() is None
    assert runner.dispatcher.over is not None
    assert "2 confirm runs failed" in runner.dispatcher.over
    assert "trial 5: disk full" in runner.dispatcher.over
    retried = confirm_runs.read_work(study, study_dir, retry_failed=True)
    assert retried.confirm is not None
    assert [row["trial"] for row in retried.confirm.resumed] == [5, 6]


def test_seeds_of_the_search_are_not_used_again(confirmed: dict[str, Any], tmp_path: Path) -> None:
    confirmed["seed"] = 2**32 - 2
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    leave(study, study_dir, 1, val_loss=4.9, seed=1, values={"dispersion.weight": 0.1})
    assert freeze(study, study_dir).seeds == [2**32 - 1, 0, 2, 3, 4, 5]


def test_the_dry_run_says_what_can_be_shown(confirmed: dict[str, Any]) -> None:
    assert any("power: not known" in line for line in confirm.describe(make(confirmed)))
    confirmed["confirm"] |= {"spread": 0.01, "num_seeds": 5}
    study = make(confirmed)
    promise = paired.promise(0.01, 5, 1, 0.01)
    (line,) = [line for line in confirm.describe(study) if "spread" in line]
    assert f"an effect of {promise.effect_shown:.3g} is shown with 80% chance" in line
    (warning,) = confirm.warnings(study)
    assert "confirm.num_seeds = 5" in warning
    assert "smallest p-value is 0.0625; 6 seeds could" in warning
    confirmed["search"]["space"]["train.learning_rate"] = dict(RATES)
    assert any("unfair to the baseline" in text for text in confirm.warnings(make(confirmed)))


def test_the_spread_of_an_earlier_study(confirmed: dict[str, Any], tmp_path: Path) -> None:
    study, study_dir = make(confirmed), str(tmp_path / "r")
    searched(study, study_dir)
    confirmed["confirm"]["spread_from"] = study_dir
    with pytest.raises(OutputError, match=r"spread_from names .* has no confirm phase"):
        confirm.known_spread(make(confirmed))
    confirm_runs.settle(study, study_dir)
    runner = Runner(study, study_dir)
    for index in range(4):
        assignment = runner.begin()
        runner.end(assignment, test_loss=5.0 + (0.1 * index if assignment.arm == "dispersion" else 0.0))
    # Differences of 0.1 and 0.3: a standard deviation of 0.1414.
    assert confirm.known_spread(make(confirmed)) == pytest.approx(0.1414, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_seeds": 1}, "confirm.num_seeds = 1: one seed has no spread, so nothing can be tested"),
        ({"smallest_effect": None}, "confirm.smallest_effect is missing"),
        ({"smallest_effect": 0}, "confirm.smallest_effect = 0 is not above 0"),
        ({"top_k": 5}, "confirm.top_k = 5 is more than search.num_trials = 4"),
        ({"spread": 0.1, "spread_from": "x"}, "keep one of them"),
        ({"seeds": 3}, '"seeds" is not a key in confirm'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_of_the_section(confirmed: dict[str, Any], change: dict[str, Any], told: str) -> None:
    confirmed["confirm"].update(change)
    confirmed["confirm"] = {name: value for name, value in confirmed["confirm"].items() if value is not None}
    text = mistake(confirmed)
    assert told in text
    assert "\n" not in text


def test_a_confirm_phase_has_one_objective(confirmed: dict[str, Any]) -> None:
    confirmed["search"]["objective"] = [{"metric": "val_loss"}, {"metric": "train_s"}]
    assert "confirm tests the best configurations by one objective" in mistake(confirmed)
