"""Which trials of another study compare with this one's, and why the others do not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from raydisp import results
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.dispatch import Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.search.warm_start import read_warm_starts
from raydisp.trial.assignment import blank_row

VALUES = {"dispersion.weight": 0.5, "dispersion.layers": [1]}


@pytest.fixture
def other(tree: dict[str, Any], tmp_path: Path) -> Any:
    """Writes a trial of another study into its folder: other(1, values, tree changes, columns)."""
    folder = str(tmp_path / "other")

    def write(
        trial: int, values: dict[str, Any] | None = None, changes: Any = None, **columns: Any
    ) -> dict[str, Any]:
        changed = copy.deepcopy(tree)
        changed["name"], changed["seed"] = "earlier", 8
        for part, fields in (changes or {}).items():
            changed.setdefault(part, {}).update(fields)
        study = StudyConfig.model_validate(changed)
        launch = Launch(study, folder, "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1))
        row = blank_row(launch.assign(trial, 1, "search", VALUES if values is None else values), study, 0.0)
        row.update(status="completed", num_tokens=1280, val_loss=5.0, data_sha256="abc")
        row.update(columns)
        results.write_trial(folder, row, space.column_types(study))
        return row

    return write


def read(tree: dict[str, Any], tmp_path: Path, data_sha256: str | None = None, **search: Any) -> Any:
    changed = copy.deepcopy(tree)
    changed["search"].update({"warm_start": [str(tmp_path / "other")], **search})
    (found,) = read_warm_starts(StudyConfig.model_validate(changed), data_sha256)
    return found


LONGER = {"train": {"budget_tokens": 2560}}
WEIGHT_ONLY = {"dispersion.weight": {"low": 0.01, "high": 2.0, "log": True}}
TWO = [{"metric": "val_loss"}, {"metric": "tokens_per_s"}]


@pytest.mark.parametrize(
    ("columns", "changes", "values", "search", "reason"),
    [
        ({}, {}, VALUES, {}, None),
        ({}, {"evaluate": {"every_tokens": 256}, "checkpoint": {"every_tokens": 256}}, VALUES, {}, None),
        ({}, {"train": {"micro_batch_tokens": 32}}, VALUES, {}, None),
        ({"tokens_per_s": 9.0}, {}, VALUES, {"objective": TWO}, None),
        ({"data_sha256": None}, {}, VALUES, {}, None),
        ({"status": "pruned", "val_loss": None}, {}, VALUES, {}, "not completed"),
        ({"status": "failed"}, {}, VALUES, {}, "not completed"),
        ({"val_loss": None}, {}, VALUES, {}, "without the objective"),
        ({}, {}, VALUES, {"objective": TWO}, "without the objective"),
        ({"num_tokens": 2560}, LONGER, VALUES, {}, "with other tokens"),
        ({"data_sha256": "xyz"}, {}, VALUES, {}, "on other data"),
        ({}, {}, {**VALUES, "dispersion.layers": "early_half"}, {}, "outside the space"),
        ({}, {}, {**VALUES, "dispersion.weight": 5.0}, {}, "outside the space"),
        ({}, {}, VALUES, {"space": {"model.family": ["gpt2", "llama"], **WEIGHT_ONLY}}, "other settings"),
        ({}, {}, VALUES, {"space": WEIGHT_ONLY}, "with other settings"),
        ({}, {"train": {"learning_rate": 0.5}}, VALUES, {}, "with other settings"),
    ],
)
def test_what_compares(
    tree: dict[str, Any],
    tmp_path: Path,
    other: Any,
    columns: Any,
    changes: Any,
    values: Any,
    search: Any,
    reason: str | None,
) -> None:
    other(1, values, changes, **columns)
    found = read(tree, tmp_path, "abc", **search)
    assert [row["trial"] for row in found.rows] == ([1] if reason is None else [])
    if reason is None:
        assert found.left_out == {}
    else:
        ((told, number),) = found.left_out.items()
        assert reason in told
        assert number == 1


def test_trials_of_before_there_were_some_fields_compare(
    tree: dict[str, Any], tmp_path: Path, other: Any
) -> None:
    """As an older version wrote them: what it did not know is at its default."""
    config = json.loads(other(1)["config_json"])
    del config["noisy_embedding"], config["active_forgetting"], config["dispersion"]["allow_negative_weight"]
    other(1, config_json=json.dumps(config))
    assert [row["trial"] for row in read(tree, tmp_path).rows] == [1]
    tree["dispersion"]["allow_negative_weight"] = True
    space_of = copy.deepcopy(tree["search"]["space"])
    space_of["noisy_embedding.alpha"] = {"low": 0.0, "high": 5.0}
    assert [row["trial"] for row in read(tree, tmp_path, space=space_of).rows] == [1]
    tree["noisy_embedding"] = {"alpha": 1.0}
    assert read(tree, tmp_path).left_out == {"with other settings": 1}


def test_data_that_are_not_known_yet_are_no_reason(tree: dict[str, Any], tmp_path: Path, other: Any) -> None:
    other(1, data_sha256="xyz")
    assert len(read(tree, tmp_path, None).rows) == 1


def test_a_field_that_is_not_searched_here_must_be_as_here(
    tree: dict[str, Any], tmp_path: Path, other: Any
) -> None:
    """With variant `cosine` the temperature is the study file's: one with another does not compare."""
    dimensions = {
        "dispersion.variant": ["angular_spread", "cosine"],
        "dispersion.temperature": {
            "low": 0.1,
            "high": 9.0,
            "when": {"dispersion.variant": ["angular_spread"]},
        },
    }
    for trial, (variant, temperature) in enumerate(
        [("angular_spread", 4.0), ("cosine", 4.0), ("cosine", 1.0)]
    ):
        values = {"dispersion.variant": variant, "dispersion.temperature": temperature}
        other(trial + 1, {"dispersion.weight": 0.3, **values})
    found = read(tree, tmp_path, space=dimensions)
    assert [row["trial"] for row in found.rows] == [1, 3]


def test_whole_numbers_and_floats_are_the_same_values(
    tree: dict[str, Any], tmp_path: Path, other: Any
) -> None:
    other(1, {**VALUES, "dispersion.weight": 1.0})
    dimensions = {"dispersion.weight": [0, 1], "dispersion.layers": ["all", [1]]}
    found = read(tree, tmp_path, space=dimensions)
    changed = copy.deepcopy(tree)
    changed["search"]["space"] = dimensions
    known = OptunaStudy(StudyConfig.model_validate(changed), None)
    known.add_foreign(found.rows, found.origin)
    (trial,) = known.trials()
    assert trial.params == {"dispersion.weight": 1, "dispersion.layers": "[1]"}
    assert trial.value == 5.0


def test_it_is_told_in_a_line(tree: dict[str, Any], tmp_path: Path, other: Any) -> None:
    other(1)
    assert read(tree, tmp_path).describe() == f"1 trial of {tmp_path / 'other'}"
    for trial in (2, 3):
        other(trial, status="failed")
    other(4, val_loss=None)
    assert read(tree, tmp_path).describe() == (
        f"1 trial of {tmp_path / 'other'} (left out: 2 not completed, 1 without the objective)"
    )


def test_a_later_attempt_counts(tree: dict[str, Any], tmp_path: Path, other: Any) -> None:
    other(1, status="interrupted", val_loss=None)
    other(1, attempt=2, val_loss=4.0)
    assert [row["val_loss"] for row in read(tree, tmp_path).rows] == [4.0]


@pytest.mark.parametrize(("make", "sentence"), [(False, "is no folder"), (True, "holds no trials")])
def test_folders_without_trials(tree: dict[str, Any], tmp_path: Path, make: bool, sentence: str) -> None:
    if make:
        (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match=f"search.warm_start names .*other, which {sentence}"):
        read(tree, tmp_path)


def test_tpe_knows_them_from_the_start(tree: dict[str, Any], tmp_path: Path, other: Any) -> None:
    """Twenty trials whose best is at weight 0.3: what is suggested first is near it already."""
    for trial in range(1, 21):
        weight = 0.01 * 200 ** (trial / 21)
        other(trial, {**VALUES, "dispersion.weight": weight}, val_loss=5 + abs(weight - 0.3))
    tree["search"].update(num_trials=20, num_startup_trials=10)
    study = StudyConfig.model_validate(tree)
    rows = read(tree, tmp_path).rows
    away = {"warm": 0.0, "cold": 0.0}
    for trial in range(1, 9):
        for name in away:
            known = OptunaStudy(study, None)
            known.add_foreign(rows if name == "warm" else [], "other")
            away[name] += abs(math.log10(known.suggest(trial)["dispersion.weight"] / 0.3)) / 8
    assert away["warm"] < 0.5 * away["cold"]
