"""Recorded curves in the place of training: what is replayed, what is refused, and how long it takes."""

from __future__ import annotations

import copy
import gc
import math
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydisp import results, storage
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig, replace_fields
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.dispatch import Launch
from raydisp.simulate import Recorded, Simulation, load_recorded, simulate, simulate_study
from raydisp.trial.assignment import blank_row

FULL = 1280
RUNGS = (256, 512, 768, 1024)


def loss_of(weight: float, layers: Any, tokens: int) -> float:
    """A made-up response: best at weight 0.3 and with all layers."""
    penalty = 0.0 if layers == "all" else 0.2
    return 5 + (math.log10(weight / 0.3) ** 2 if weight else 1.0) + penalty + 100 / tokens


def record(study: StudyConfig, folder: Path, *, num_trials: int = 70, spoil: Any = None) -> str:
    """A results folder as a study of full budgets leaves it; `spoil` may change each row and its points."""
    draw = random.Random(0)
    launch = Launch(study, str(folder), "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1))
    rows, evals = [], []
    for trial in range(num_trials + 1):
        values = {
            "dispersion.weight": math.exp(draw.uniform(math.log(0.01), math.log(2.0))) if trial else 0.0,
            "dispersion.layers": draw.choice(["all", "last", [1]]) if trial else "all",
        }
        assignment = launch.assign(trial, 1, "search" if trial else "baseline", values)
        row = blank_row(assignment, study, 1000.0 * trial)
        at = (values["dispersion.weight"], values["dispersion.layers"])
        points = {tokens: {"loss": loss_of(*at, tokens), "layer_cosine_mean": at[0] / 10} for tokens in RUNGS}
        row.update(
            status="completed",
            num_tokens=FULL,
            num_steps=10,
            val_loss=loss_of(*at, FULL),
            train_loss=loss_of(*at, FULL) - 0.1,
            layer_cosine_mean=at[0] / 10,
            train_s=10.0 + trial % 3,
            tokens_per_s=100.0,
            peak_memory_bytes=10**9,
        )
        if spoil is not None:
            spoil(row, points)
        rows.append(row)
        for tokens, metrics in points.items():
            for name, value in metrics.items():
                evals.append(
                    {
                        "trial": trial,
                        "attempt": 1,
                        "step": tokens // 128,
                        "num_tokens": tokens,
                        "split": "validation",
                        "name": name,
                        "value": value,
                    }
                )
    schema = results.trial_schema(space.column_types(study))
    table = pa.Table.from_pylist(rows, schema=schema)
    results.write_table(storage.join(str(folder), "trials", "all.parquet"), table)
    table = pa.Table.from_pylist(evals, schema=results.EVAL_SCHEMA)
    results.write_table(storage.join(str(folder), "evals", "all.parquet"), table)
    return str(folder)


def with_search(tree: dict[str, Any], **search: Any) -> StudyConfig:
    changed = copy.deepcopy(tree)
    changed["evaluate"]["every_tokens"] = 256
    changed["search"].update(search)
    return StudyConfig.model_validate(changed)


@pytest.fixture
def folder(tree: dict[str, Any], tmp_path: Path) -> str:
    return record(with_search(tree), tmp_path / "recorded")


@pytest.fixture
def recorded(tree: dict[str, Any], folder: str) -> Recorded:
    return load_recorded(with_search(tree), folder)


# --- what is replayed ----------------------------------------------------------------------------------


def guess_at(study: StudyConfig, recorded: Recorded, **values: Any) -> Any:
    fields = {f"dispersion.{name}": value for name, value in values.items()}
    return recorded.guess(replace_fields(study.trial, fields).model_dump(mode="json"))


def test_a_recorded_point_gives_its_own_curve(tree: dict[str, Any], recorded: Recorded) -> None:
    study = with_search(tree)
    for index in (5, 17):
        point = recorded.points[index]
        weight, layers = point["dispersion.weight"], point["dispersion.layers"]
        guess = guess_at(study, recorded, weight=weight, layers=layers)
        assert (guess.distance, guess.nearest) == (0.0, index)
        assert [tokens for tokens, _ in guess.curve] == list(RUNGS)
        for tokens, metrics in guess.curve:
            assert metrics == {
                "val_loss": loss_of(weight, layers, tokens),
                "layer_cosine_mean": weight / 10,
            }
        assert guess.final["val_loss"] == loss_of(weight, layers, FULL)
    assert len(recorded) == 70
    assert recorded.describe(study) == (
        f"tiny: simulated from 70 recorded configurations of {recorded.origin} over dispersion.layers, "
        "dispersion.weight; 3 search trials and the baseline of 1,280 tokens each."
    )


def test_between_recorded_points_it_is_near_the_response(tree: dict[str, Any], recorded: Recorded) -> None:
    # Some 23 recorded points per choice of layers over 2.3 decades: neighbours are up to 0.1 decades away.
    study = with_search(tree)
    for weight in (0.03, 0.1, 0.3, 1.0):
        guess = guess_at(study, recorded, weight=weight, layers="all")
        assert 0 < guess.distance < 0.2
        assert guess.final["val_loss"] == pytest.approx(loss_of(weight, "all", FULL), abs=0.2)
        assert guess.curve[1][1]["val_loss"] == pytest.approx(loss_of(weight, "all", 512), abs=0.2)


def test_distances_are_on_the_axis_of_the_search(tree: dict[str, Any], recorded: Recorded) -> None:
    """The recorded baseline has weight 0, which must not undo the logarithm."""
    weights = sorted(point["dispersion.weight"] for point in recorded.points[1:])
    width = math.log(weights[-1] / weights[0])
    guess = guess_at(with_search(tree), recorded, weight=weights[0] / 2, layers=[2])
    assert guess.distance == pytest.approx(math.hypot(math.log(2) / width, 1)), "and other layers are 1 away"


def test_the_baseline_is_the_recorded_one(tree: dict[str, Any], recorded: Recorded) -> None:
    config = replace_fields(with_search(tree).trial, {"dispersion.weight": 0.0}).model_dump(mode="json")
    guess = recorded.guess(config, baseline=True)
    assert (guess.nearest, guess.final["val_loss"]) == (0, loss_of(0.0, "all", FULL))
    assert recorded.guess(config).nearest != 0, "no search trial is made of it"


def test_a_recording_without_a_baseline_will_do(tree: dict[str, Any], tmp_path: Path) -> None:
    def spoil(row: dict[str, Any], points: dict[int, Any]) -> None:
        if row["arm"] == "baseline":
            row["status"] = "failed"

    study = with_search(tree)
    recorded = load_recorded(study, record(study, tmp_path / "r", spoil=spoil))
    assert simulate(study, recorded).trials[0]["status"] == "completed"


def test_what_a_neighbour_lacks_is_not_made_up(tree: dict[str, Any], tmp_path: Path) -> None:
    def spoil(row: dict[str, Any], points: dict[int, Any]) -> None:
        if row["trial"] % 2:
            row["layer_cosine_mean"] = None
            points[512]["layer_cosine_mean"] = None

    study = with_search(tree)
    recorded = load_recorded(study, record(study, tmp_path / "r", spoil=spoil))
    guesses = [guess_at(study, recorded, weight=0.02 * n, layers="all") for n in range(1, 20)]
    assert all("val_loss" in guess.curve[1][1] for guess in guesses)
    lacking = [guess for guess in guesses if "layer_cosine_mean" not in guess.final]
    assert lacking
    assert all("layer_cosine_mean" not in guess.curve[1][1] for guess in lacking)
    assert all("layer_cosine_mean" in guess.curve[0][1] for guess in lacking)


def test_pruned_trials_are_left_out(tree: dict[str, Any], tmp_path: Path) -> None:
    def spoil(row: dict[str, Any], points: dict[int, Any]) -> None:
        if row["trial"] > 65:
            row.update(status="pruned", num_tokens=512)

    study = with_search(tree)
    assert len(load_recorded(study, record(study, tmp_path / "r", spoil=spoil))) == 65


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "num_trials", "sentence"),
    [
        ({}, 59, "59 completed trials of 1,280 tokens (train.budget_tokens), and it takes 60"),
        ({"train": {"budget_tokens": 2560}}, 70, "0 completed trials of 2,560 tokens (train.budget_tokens)"),
        ({"train": {"learning_rate": 0.5}}, 70, "it was recorded with train.learning_rate = 0.01"),
        (
            {"evaluate": {"every_tokens": 128}},
            70,
            "trial 0 was not evaluated at 128 tokens, as evaluate.every_tokens = 128 asks; recorded: ",
        ),
        (
            {"search": {"space": {"train.beta1": [0.8, 0.9]}}},
            70,
            'search.space["train.beta1"] is not among the fields in which its trials differ '
            "(dispersion.layers, dispersion.weight)",
        ),
    ],
    ids=["too few", "other budget", "other settings", "no evaluation", "not varied"],
)
def test_what_does_not_fit_is_refused(
    tree: dict[str, Any], tmp_path: Path, changes: dict[str, Any], num_trials: int, sentence: str
) -> None:
    folder = record(with_search(tree), tmp_path / "r", num_trials=num_trials)
    changed = copy.deepcopy(tree)
    changed["evaluate"]["every_tokens"] = 256
    for part, fields in changes.items():
        changed[part].update(fields)
    with pytest.raises(OutputError) as caught:
        load_recorded(StudyConfig.model_validate(changed), folder)
    assert str(caught.value).startswith(f"--simulate {folder}: ")
    assert sentence in str(caught.value)


def test_no_folder(study: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no such folder"):
        load_recorded(study, str(tmp_path / "nowhere"))


# --- running -------------------------------------------------------------------------------------------

ASHA = {"asha": {"grace_tokens": 256, "reduction_factor": 2}}


def tokens_of(found: Simulation) -> int:
    return sum(row["num_tokens"] for row in found.trials)


def test_every_trial_leaves_its_row(tree: dict[str, Any], recorded: Recorded, tmp_path: Path) -> None:
    study = with_search(tree, num_trials=30, scheduler=ASHA)
    assert simulate_study(study, str(tmp_path / "out"), recorded) is None
    tables = results.read_tables(str(tmp_path / "out"))
    rows = tables.trials.to_pylist()
    assert [row["trial"] for row in rows] == list(range(31))
    assert rows[0]["status"] == "completed", "nobody stops the baseline"
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert len(pruned) > 10
    for row in pruned:
        assert row["num_tokens"] in (256, 512, 1024)
        assert row["num_steps"] * 128 == row["num_tokens"]
        assert (row["val_loss"], row["train_loss"]) == (None, None)
        seen = [e["num_tokens"] for e in tables.evals.to_pylist() if e["trial"] == row["trial"]]
        assert max(seen) == row["num_tokens"]
    for row in rows:
        assert row["note"].startswith("simulated; the nearest recorded point, trial ")
        span = (row["ended_at"] - row["started_at"]).total_seconds()
        assert span == pytest.approx(row["train_s"], abs=1e-3)
    assert (tmp_path / "out" / "study.yaml").is_file()


def test_stopping_early_takes_fewer_tokens_for_a_value_as_good(
    tree: dict[str, Any], recorded: Recorded
) -> None:
    whole = simulate(with_search(tree, num_trials=40), recorded)
    stopped = simulate(with_search(tree, num_trials=40, scheduler=ASHA), recorded)
    assert tokens_of(whole) == 41 * FULL
    assert tokens_of(stopped) < 0.65 * tokens_of(whole)
    best = [min(row.get("val_loss") or 99 for row in found.trials) for found in (whole, stopped)]
    assert best[1] < best[0] + 0.1


@pytest.mark.parametrize("concurrent", [1, 4])
def test_a_simulation_repeats_itself(tree: dict[str, Any], recorded: Recorded, concurrent: int) -> None:
    tree["resources"]["max_concurrent_trials"] = concurrent
    study = with_search(tree, num_trials=25, scheduler=ASHA)
    first, second = (simulate(study, recorded) for _ in range(2))
    drop = {"hostname"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in first.trials] == [
        {k: v for k, v in row.items() if k not in drop} for row in second.trials
    ]
    assert first.evals == second.evals
    other = simulate(study.model_copy(update={"seed": 4}), recorded)
    assert [row["config_sha256"] for row in other.trials] != [row["config_sha256"] for row in first.trials]
    ends = [row["ended_at"] for row in first.trials]
    assert ends == sorted(ends)
    most = max(
        sum(one["started_at"] <= row["started_at"] < one["ended_at"] for one in first.trials)
        for row in first.trials
    )
    assert most == concurrent


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        ({"max_tokens_total": 5 * FULL}, "search.max_tokens_total"),
        ({"max_hours": 0.01}, "search.max_hours = 0.01: trials ran for 0.01 hours"),
        ({"stop_when": {"no_improvement_trials": 4}}, "search.stop_when: the best val_loss did not improve"),
    ],
)
def test_budgets_end_a_simulation_too(
    tree: dict[str, Any], recorded: Recorded, search: dict[str, Any], reason: str
) -> None:
    found = simulate(with_search(tree, num_trials=200, **search), recorded)
    assert found.over.startswith(reason)
    assert 4 <= len(found.trials) < 60


def test_several_objectives(tree: dict[str, Any], recorded: Recorded) -> None:
    objective = [{"metric": "val_loss"}, {"metric": "layer_cosine_mean"}]
    watched = {"asha": {**ASHA["asha"], "metric": "val_loss"}}
    found = simulate(with_search(tree, num_trials=30, objective=objective, scheduler=watched), recorded)
    assert {row["status"] for row in found.trials} == {"completed", "pruned"}
    assert len(found.trials) == 31


@pytest.mark.parametrize("search", [{"sampler": "random"}, {}, {"scheduler": ASHA}], ids=str)
def test_overhead_and_memory_stay_small(
    tree: dict[str, Any], recorded: Recorded, search: dict[str, Any]
) -> None:
    """30 ms per trial, at a size that a test can bear; `benchmarks/scale.py` runs a thousand."""
    study = with_search(tree, num_trials=150, num_startup_trials=10, **search)
    simulate(with_search(tree, num_trials=12, **search), recorded)  # imports
    started = time.process_time()
    found = simulate(study, recorded)
    assert (time.process_time() - started) / 151 < 0.03
    assert len(found.trials) == 151


def test_nothing_but_rows_is_kept(tree: dict[str, Any], recorded: Recorded) -> None:
    study = with_search(tree, num_trials=60, sampler="random")
    simulate(study, recorded)
    gc.collect()
    tracemalloc.start()
    for _ in range(3):
        simulate(study, recorded)
    gc.collect()
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 2**20
