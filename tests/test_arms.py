"""Arms: what each sets and searches, which trials are its own, and what a file may not say about them."""

from __future__ import annotations

import copy
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState
from test_search import Driver

from raydisp import analysis, results
from raydisp.arms import Arms, dimensions
from raydisp.config import StudyConfig
from raydisp.errors import ConfigError
from raydisp.search import space
from raydisp.search.agenda import read_agenda
from raydisp.search.stopping import StopRules
from raydisp.search.warm_start import read_warm_starts
from raydisp.studyfile import differences, parse_study

RATES = {"low": 1e-3, "high": 1e-1, "log": True}
WEIGHTS = {"low": 0.01, "high": 2.0, "log": True}


@pytest.fixture
def armed(tree: dict[str, Any]) -> dict[str, Any]:
    """Four arms, of which one is a single trial once the shared field is its own."""
    tree["search"] = {
        "num_trials": 3,
        "space": {"train.learning_rate": dict(RATES)},
        "num_startup_trials": 2,
    }
    tree["arms"] = {
        "baseline": {"dispersion.weight": 0},
        "dispersion": {"dispersion.weight": dict(WEIGHTS), "dispersion.layers": {"choices": ["all", [1, 2]]}},
        "noisy": {"dispersion.weight": 0, "noisy_embedding.alpha": 5.0},
        "settled": {"dispersion.weight": 0.5, "train.learning_rate": 0.01},
    }
    return tree


def make(tree: dict[str, Any]) -> StudyConfig:
    return parse_study(yaml.safe_dump(tree, sort_keys=False), "study.yaml")


def mistake(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make(tree)
    return str(caught.value)


def test_a_study_without_arms_has_two(study: StudyConfig) -> None:
    arms = Arms(study)
    assert [(arm.name, arm.searched) for arm in arms.all] == [("baseline", False), ("search", True)]
    assert arms["baseline"].study.dispersion.weight == 0
    assert arms["search"].study.search.space == study.search.space
    assert (list(arms.fixed_trials), list(arms.search_trials)) == ([0], [1, 2, 3])
    assert [arms.of(trial).name for trial in range(4)] == ["baseline", "search", "search", "search"]
    assert [arms.index(trial) for trial in (1, 2, 3)] == [1, 2, 3]


def test_arms_search_the_shared_fields_and_their_own(armed: dict[str, Any]) -> None:
    arms = Arms(make(armed))
    assert {arm.name: list(arm.study.search.space) for arm in arms.all} == {
        "baseline": ["train.learning_rate"],
        "dispersion": ["train.learning_rate", "dispersion.weight", "dispersion.layers"],
        "noisy": ["train.learning_rate"],
        "settled": [],
    }
    assert arms["noisy"].study.noisy_embedding.alpha == 5.0
    assert arms["settled"].study.train.learning_rate == 0.01
    assert [arm.name for arm in arms.all if arm.may_disperse] == ["dispersion", "settled"]
    assert list(dimensions(make(armed))) == ["train.learning_rate", "dispersion.weight", "dispersion.layers"]


def test_an_arm_of_weight_0_does_not_search_the_dispersion_term(armed: dict[str, Any]) -> None:
    armed["search"]["space"] |= {"dispersion.weight": WEIGHTS, "dispersion.temperature": WEIGHTS}
    del armed["arms"]["dispersion"]["dispersion.weight"]
    spaces = {arm.name: list(arm.study.search.space) for arm in Arms(make(armed)).all}
    assert spaces["baseline"] == ["train.learning_rate"]
    assert spaces["dispersion"] == [
        "train.learning_rate",
        "dispersion.weight",
        "dispersion.temperature",
        "dispersion.layers",
    ]
    assert spaces["settled"] == ["dispersion.temperature"]


def test_searched_arms_take_turns_and_a_longer_search_keeps_the_numbers(armed: dict[str, Any]) -> None:
    arms = Arms(make(armed))
    assert list(arms.fixed_trials) == [0]
    assert arms.of(0).name == "settled"
    names = [arms.of(trial).name for trial in arms.search_trials]
    assert names == ["baseline", "dispersion", "noisy"] * 3
    assert [arms.index(trial) for trial in arms.search_trials] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    armed["search"]["num_trials"] = 5
    longer = Arms(make(armed))
    for trial in arms.search_trials:
        assert (longer.of(trial).name, longer.index(trial)) == (arms.of(trial).name, arms.index(trial))
    assert longer.num_trials == 1 + 3 * 5


def test_each_arm_gets_the_same_number_of_trials_and_its_own_sampler(
    armed: dict[str, Any], tmp_path: Path
) -> None:
    armed["search"]["num_trials"] = 6
    driver = Driver(make(armed), tmp_path)

    def worth(values: dict[str, Any]) -> float:
        return 5 + values.get("dispersion.weight", 0) + values.get("train.learning_rate", 0)

    while (started := driver.start()) is not None:
        trial_id, assignment = started
        driver.write(assignment, val_loss=worth(assignment.values))
        driver.searcher.on_trial_complete(trial_id)
    rows = results.read_tables(driver.study_dir).trials.to_pylist()
    counts = {name: sum(row["arm"] == name for row in rows) for name in armed["arms"]}
    assert counts == {"baseline": 6, "dispersion": 6, "noisy": 6, "settled": 1}
    by_number = {row["trial"]: row for row in rows}
    for arm in ("baseline", "dispersion", "noisy"):
        trials = driver.optuna.trials(arm)
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
        assert [trial.value for trial in trials] == [
            by_number[t.user_attrs["trial"]]["val_loss"] for t in trials
        ]
    # Random at first, then learnt: each arm from its own trials, so the later ones differ.
    rates = {
        arm: [trial.params["train.learning_rate"] for trial in driver.optuna.trials(arm)]
        for arm in ("baseline", "dispersion", "noisy")
    }
    assert rates["baseline"] == rates["noisy"], "the same space, seed and losses up to a constant"
    assert rates["baseline"][2:] != rates["dispersion"][2:]
    for row in rows:
        config = json.loads(row["config_json"])
        assert config["noisy_embedding"]["alpha"] == (5.0 if row["arm"] == "noisy" else 0.0)
        assert (row["dispersion.layers"] is not None) == (row["arm"] == "dispersion")
        assert row["dispersion.weight"] == config["dispersion"]["weight"]
    driver.optuna.snapshot(driver.study_dir)
    with sqlite3.connect(f"{driver.study_dir}/optuna.db") as database:
        names = {name for (name,) in database.execute("select study_name from studies")}
    assert names == {"tiny: baseline", "tiny: dispersion", "tiny: noisy"}


def test_a_cut_search_of_arms_goes_on_as_a_whole_one(armed: dict[str, Any], tmp_path: Path) -> None:
    armed["search"]["num_trials"] = 5
    whole = Driver(make(armed), tmp_path / "whole").run_all()
    shorter = copy.deepcopy(armed)
    shorter["search"]["num_trials"] = 3
    first = Driver(make(shorter), tmp_path / "cut").run_all()
    second = Driver(make(armed), tmp_path / "cut").run_all()
    assert first + second == whole
    assert read_agenda(make(armed), str(tmp_path / "cut" / "results")).num_trials == 0


def test_points_go_to_the_arms_that_search_their_fields(armed: dict[str, Any], tmp_path: Path) -> None:
    armed["search"]["points_to_evaluate"] = [{"train.learning_rate": 0.05, "dispersion.weight": 1.5}]
    suggested = {values["trial"]: values for values in Driver(make(armed), tmp_path).run_all()}
    assert suggested[1]["train.learning_rate"] == suggested[2]["train.learning_rate"] == 0.05
    assert (suggested[1]["dispersion.weight"], suggested[2]["dispersion.weight"]) == (0, 1.5)


def test_a_scheduler_compares_trials_with_those_of_their_own_arm(armed: dict[str, Any]) -> None:
    armed["search"]["scheduler"] = {"asha": {"grace_tokens": 512, "reduction_factor": 2}}
    rules = StopRules(make(armed))
    # Trials 1, 4, 7 are the baseline's, 2, 5, 8 dispersion's, which is worse at all of them.
    assert not rules.report(1, 512, 3.0)
    assert not rules.report(2, 512, 9.0)
    assert not rules.report(4, 512, 2.0)
    assert not rules.report(5, 512, 8.0)
    assert rules.report(7, 512, 3.5)
    assert rules.report(8, 512, 9.5)
    rules.close(0, "completed")
    rules.close(7, "pruned")


def test_a_warm_start_reaches_the_arms_that_it_fits(armed: dict[str, Any], tmp_path: Path) -> None:
    Driver(make(armed), tmp_path / "old").run_all()
    old = str(tmp_path / "old" / "results")
    table = results.read_table(old, "trials").to_pylist()
    for row in table:
        results.write_trial(old, {**row, "num_tokens": 1280}, space.column_types(make(armed)))
    armed["name"] = "new"
    armed["search"]["warm_start"] = [old]
    found = {one.arm.name: [row["arm"] for row in one.rows] for one in read_warm_starts(make(armed))}
    assert found == {
        # The weight and the layers of `settled` lie in the space of dispersion.
        "baseline": ["baseline"] * 3,
        "dispersion": ["settled", *["dispersion"] * 3],
        "noisy": ["noisy"] * 3,
    }


def test_the_summary_speaks_of_each_arm(armed: dict[str, Any], tmp_path: Path) -> None:
    driver = Driver(make(armed), tmp_path)
    while (started := driver.start()) is not None:
        trial_id, assignment = started
        values = {"baseline": 5.0, "dispersion": 4.5, "noisy": 5.25, "settled": 5.5}
        loss = values[assignment.arm] + 0.01 * assignment.trial
        driver.write(assignment, val_loss=loss, num_tokens=1280)
        driver.searcher.on_trial_complete(trial_id)
    trials = results.read_tables(driver.study_dir).trials
    told = analysis.summarise(trials, make(armed).search.primary)
    assert analysis.baseline_row(trials, make(armed).search.primary)["trial"] == 1
    (dispersion,) = [text for text in told if text.startswith("dispersion: best")]
    assert "trial 2 with val_loss 4.520" in dispersion
    assert "0.490 nats below the baseline's 5.010" in dispersion
    assert "not dispersion's alone" not in dispersion, "the baseline was tuned over the same field"
    assert any(text.startswith("noisy: best of 3: trial 3 with val_loss 5.280") for text in told)
    assert any("0.490 nats above" in text for text in told if text.startswith("settled"))


def test_another_order_of_arms_is_another_study(armed: dict[str, Any]) -> None:
    """Trials are numbered by it."""
    turned = copy.deepcopy(armed)
    turned["arms"] = dict(reversed(armed["arms"].items()))
    (told,) = differences(make(armed), make(turned))
    assert told == (
        "the order of arms (baseline, dispersion, noisy, settled -> settled, noisy, dispersion, baseline)"
    )


def test_fields_of_arms_can_be_overridden(armed: dict[str, Any]) -> None:
    study = parse_study(
        yaml.safe_dump(armed, sort_keys=False),
        "study.yaml",
        [
            "arms.noisy.noisy_embedding.alpha=2.5",
            "arms.dispersion.dispersion.weight.high=0.5",
            "search.space.train.learning_rate.low=0.002",
        ],
    )
    assert study.arms is not None
    assert study.arms["noisy"]["noisy_embedding.alpha"] == 2.5
    assert study.arms["dispersion"]["dispersion.weight"].high == 0.5
    assert study.search.space["train.learning_rate"].low == 0.002


def test_a_study_that_gets_arms_is_another_study(armed: dict[str, Any], tree: dict[str, Any]) -> None:
    without = copy.deepcopy(armed)
    del without["arms"]
    changed = differences(make(without), make(armed))
    assert any(text.startswith("arms") for text in changed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda arms: arms.pop("baseline"), "arms has no baseline"),
        (lambda arms: arms.update(baseline={"dispersion.weight": 0.1}), "arms.baseline"),
        (
            lambda arms: arms.update(baseline={"train.learning_rate": 0.1}),
            "does not set dispersion.weight to 0",
        ),
        (
            lambda arms: arms["noisy"].update({"noisy_embeding.alpha": 1.0}),
            'arms.noisy["noisy_embeding.alpha"] cannot be set: it names no field of a trial. Did you mean',
        ),
        (lambda arms: arms["noisy"].update({"seed": 4}), "seed is the same in all trials of a study"),
        (lambda arms: arms["noisy"].update({"noisy_embedding.alpha": -1.0}), "arms.noisy is not allowed"),
        (
            lambda arms: arms["dispersion"].update({"dispersion.weight": {"low": -1.0, "high": 1.0}}),
            'arms.dispersion["dispersion.weight"].low = -1.0 is not allowed',
        ),
        (
            lambda arms: arms["dispersion"].update({"dispersion.wait": {"low": 0.0, "high": 1.0}}),
            'arms.dispersion["dispersion.wait"] cannot be searched',
        ),
        (
            lambda arms: arms.update({"bad name": {}}),
            'there is one called "bad name"; a name is made of letters',
        ),
        (lambda arms: arms.update({"best": {}}), 'there is one called "best", which means the winner'),
        (lambda arms: arms["noisy"].update({"dispersion.layers": ["all", "last"]}), "{choices: [...]}"),
        (lambda arms: arms["noisy"].update({"dispersion.weight": {"low": 2.0, "high": 1.0}}), "low = 2.0"),
        (
            lambda arms: [arms.pop(name) for name in ("dispersion", "noisy", "settled")],
            "there is 1 (baseline)",
        ),
    ],
    ids=[
        "no baseline",
        "a baseline with dispersion",
        "a baseline that says nothing of it",
        "an unknown field",
        "the seed",
        "a value out of range",
        "a searched value out of range",
        "an unknown searched field",
        "a name with a blank",
        "the winner's name",
        "a list of values",
        "low above high",
        "an arm alone",
    ],
)
def test_mistakes_are_told_with_their_place(armed: dict[str, Any], change: Any, told: str) -> None:
    change(armed["arms"])
    text = mistake(armed)
    assert told in text
    assert text.startswith("study.yaml:")
    assert "\n" not in text


def test_a_shared_field_may_look_at_a_field_of_an_arm(armed: dict[str, Any]) -> None:
    """Where the arm searches it, behind it; where the arm sets it, always or never."""
    when = {"dispersion.variant": ["angular_spread", "l2_repel"]}
    rate, temperature = armed["search"]["space"], {"low": 0.1, "high": 2.0}
    armed["search"]["space"] = {"dispersion.temperature": {**temperature, "when": when}, **rate}
    armed["arms"]["dispersion"] = {
        "dispersion.variant": {"choices": ["angular_spread", "l2_repel", "cosine"]}
    }
    armed["arms"]["noisy"] = {"dispersion.variant": "l2_repel"}
    armed["arms"]["settled"] = {"dispersion.variant": "cosine"}
    spaces = {arm.name: arm.study.search.space for arm in Arms(make(armed)).all}
    assert list(spaces["baseline"]) == list(spaces["settled"]) == list(rate)
    assert list(spaces["dispersion"]) == [*rate, "dispersion.variant", "dispersion.temperature"]
    assert spaces["dispersion"]["dispersion.temperature"].when == when
    assert set(spaces["noisy"]) == {*rate, "dispersion.temperature"}
    assert spaces["noisy"]["dispersion.temperature"].when is None


def test_unequal_numbers_of_trials_are_refused(armed: dict[str, Any]) -> None:
    armed["search"]["stop_when"] = {"no_improvement_trials": 3}
    assert "each of which gets the same number of trials" in mistake(armed)


def test_a_point_that_no_arm_searches(armed: dict[str, Any]) -> None:
    armed["search"]["points_to_evaluate"] = [{"dispersion.temperature": 1.0}]
    assert 'names "dispersion.temperature", which no arm searches' in mistake(armed)


def test_arms_that_are_all_settled_need_no_space(armed: dict[str, Any]) -> None:
    armed["search"]["space"] = {}
    armed["arms"]["dispersion"] = {"dispersion.weight": 0.3}
    arms = Arms(make(armed))
    assert [arm.name for arm in arms.fixed] == ["baseline", "dispersion", "noisy", "settled"]
    assert (arms.num_trials, list(arms.search_trials)) == (4, [])
