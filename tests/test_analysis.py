"""Tables to tables and sentences: against numbers worked out by hand or by plain loops."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydisp import analysis
from raydisp.config.search import Objective
from raydisp.results import LAYER_SCHEMA, NUM_HISTOGRAM_BINS, Tables, trial_schema

SEARCHED = {
    "dispersion.weight": pa.float64(),
    "dispersion.temperature": pa.float64(),
    "dispersion.layers": pa.string(),
}
VAL_LOSS = Objective(metric="val_loss", mode="min")
STARTED = datetime.datetime(2026, 3, 1, 9, 30, tzinfo=datetime.UTC)


def trial_row(trial: int, **changes: Any) -> dict[str, Any]:
    """A completed trial that looks like a real one; `changes` are columns to set."""
    draw = np.random.default_rng(trial)
    weight = float(np.exp(draw.uniform(np.log(0.01), np.log(2.0)))) if trial else 0.0
    temperature = float(np.exp(draw.uniform(np.log(0.1), np.log(2.0)))) if trial else 1.0
    layers = ["all", "last", "early_half", "late_half"][trial % 4]
    gain = 0.04 * np.log1p(10 * weight) - 0.02 * weight**2 + draw.normal(0, 0.01) if trial else 0.0
    loss = float(5.235 - gain)
    started = STARTED + datetime.timedelta(seconds=80 * trial)
    row = {
        "study": "weight_search",
        "phase": "search",
        "trial": trial,
        "attempt": 1,
        "arm": "search" if trial else "baseline",
        "status": "completed",
        "seed": 0,
        "dispersion.weight": weight,
        "dispersion.temperature": temperature,
        "dispersion.layers": layers if trial else "all",
        "num_steps": 50,
        "num_tokens": 204_800,
        "train_loss": loss - 0.1,
        "val_loss": loss,
        "val_perplexity": float(np.exp(loss)),
        "val_bits_per_byte": loss * 0.47,
        "layer_cosine_mean": float(0.61 - 0.1 * np.log1p(10 * weight)),
        "spearman": 0.9 - weight,
        "kendall": 0.8 - weight,
        "train_s": 70.0 + draw.uniform(0, 8),
        "startup_s": 6.0,
        "tokens_per_s": 2900.0,
        "peak_memory_bytes": 900_000_000,
        "world_size": 1,
        "strategy": "ddp",
        "precision": "fp32",
        "device": "cpu",
        "hostname": "host",
        "data_sha256": "5f" * 32,
        "code_version": "0.1.0",
        "started_at": started,
        "ended_at": started + datetime.timedelta(seconds=78),
    }
    row |= changes
    dispersion = {key.split(".")[1]: row.get(key) for key in SEARCHED}
    return {"config_json": json.dumps({"dispersion": dispersion})} | row


def failed_row(trial: int, status: str = "failed", **changes: Any) -> dict[str, Any]:
    """A trial that ended without any measure."""
    missing = ("num_tokens", "num_steps", "train_loss", "val_loss", "val_perplexity", "val_bits_per_byte")
    missing += ("layer_cosine_mean", "spearman", "kendall", "train_s", "tokens_per_s")
    error = {"error_type": "RuntimeError", "error_message": "the worker died"}
    return trial_row(trial, status=status, **dict.fromkeys(missing), **error) | changes


def trial_table(rows: list[dict[str, Any]], searched: dict[str, pa.DataType] | None = None) -> pa.Table:
    """Rows as `trials`; every key must be a column."""
    schema = trial_schema(SEARCHED if searched is None else searched)
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in schema.names} for row in rows], schema=schema
    )


def layer_rows(trial: int, *, num_layers: int = 6, weight: float = 0.0) -> list[dict[str, Any]]:
    """Two evaluations of a trial; cosines rise with depth, less so where the weight is large."""
    draw = np.random.default_rng(trial)
    rows = []
    for step in (25, 50):
        for layer in range(num_layers + 1):
            centre = 0.05 + (0.12 * layer) / (1 + 4 * weight) * (step / 50)
            cosines = np.clip(draw.normal(centre, 0.13, 20_000), -1, 1)
            counts, _ = np.histogram(cosines, bins=NUM_HISTOGRAM_BINS, range=(-1, 1))
            counts[-1] += 160  # the diagonal
            rows.append(
                {
                    "trial": trial,
                    "attempt": 1,
                    "step": step,
                    "num_tokens": step * 4096,
                    "layer": layer,
                    "cosine_mean": float(cosines.mean()),
                    "histogram": counts.tolist(),
                }
            )
    return rows


def sample_tables(
    rows: list[dict[str, Any]] | None = None, searched: dict[str, pa.DataType] | None = None
) -> Tables:
    """A study of a baseline and eight trials of a six-layer model, or of the given rows."""
    rows = [trial_row(trial) for trial in range(9)] if rows is None else rows
    trials = trial_table(rows, searched)
    measured = [row for row in rows if row["status"] == "completed"]
    layers = [
        layer
        for row in measured
        for layer in layer_rows(row["trial"], weight=row.get("dispersion.weight") or 0.0)
    ]
    empty = pa.table({})
    return Tables(
        trials=trials,
        attempts=trials,
        steps=empty,
        evals=empty,
        layers=pa.Table.from_pylist(layers, schema=LAYER_SCHEMA),
    )


# --- rows ----------------------------------------------------------------------------------------------


def test_best_is_the_completed_search_trial_with_the_best_objective():
    trials = trial_table(
        [
            trial_row(0, val_loss=4.0),  # the baseline, better than all
            trial_row(1, val_loss=5.2),
            trial_row(2, val_loss=5.1),
            trial_row(3, val_loss=5.1),
            failed_row(4, val_loss=1.0),
            trial_row(5, val_loss=None),
            trial_row(6, val_loss=float("nan")),
        ]
    )
    assert analysis.best_trial(trials, VAL_LOSS)["trial"] == 2
    assert analysis.best_trial(trials, Objective(metric="val_loss", mode="max"))["trial"] == 1
    assert analysis.baseline_row(trials, Objective())["val_loss"] == 4.0


def test_no_best_and_no_baseline_are_none():
    trials = trial_table([failed_row(1), failed_row(2, "diverged")])
    assert analysis.best_trial(trials, VAL_LOSS) is None
    assert analysis.baseline_row(trials, Objective()) is None
    assert analysis.best_trial(trial_table([]), VAL_LOSS) is None


def test_statuses_are_counted_in_a_fixed_order():
    rows = [failed_row(1, "diverged"), failed_row(2), failed_row(3), trial_row(4)]
    assert list(analysis.count_statuses(trial_table(rows)).items()) == [
        ("completed", 1),
        ("failed", 2),
        ("diverged", 1),
    ]


def test_searched_fields_are_the_columns_that_a_study_adds():
    assert analysis.searched_fields(sample_tables().trials) == list(SEARCHED)


# --- tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "better"), [("min", min), ("max", max)])
def test_running_best_of_the_history(mode, better):
    rows = [trial_row(trial) for trial in (0, 3, 1, 2)] + [failed_row(4), trial_row(5)]
    history = analysis.search_history(trial_table(rows), Objective(metric="val_loss", mode=mode)).to_pylist()
    losses = {row["trial"]: row["val_loss"] for row in rows if row["trial"] and row["val_loss"]}
    assert [row["trial"] for row in history] == [1, 2, 3, 5]
    for row in history:
        assert row["value"] == losses[row["trial"]]
        assert row["best"] == better(value for trial, value in losses.items() if trial <= row["trial"])


def test_dose_of_each_completed_trial():
    rows = [trial_row(trial) for trial in range(4)] + [failed_row(4)]
    doses = analysis.dose_response(trial_table(rows), VAL_LOSS).to_pylist()
    assert [dose["trial"] for dose in doses] == [1, 2, 3]
    for dose, row in zip(doses, rows[1:4], strict=True):
        assert dose["weight"] == row["dispersion.weight"]
        assert dose["weight_per_temperature"] == row["dispersion.weight"] / row["dispersion.temperature"]
        assert (dose["layers"], dose["value"]) == (row["dispersion.layers"], row["val_loss"])


def test_a_field_that_is_not_searched_comes_from_the_trials_configuration():
    config = json.dumps({"dispersion": {"weight": 0.5, "temperature": 2, "layers": [1, 2]}})
    trials = trial_table(
        [trial_row(1, config_json=config), trial_row(2, config_json=None), trial_row(3, config_json="{")],
        searched={},
    )
    told, *untold = analysis.dose_response(trials, VAL_LOSS).to_pylist()
    assert (told["weight"], told["temperature"], told["weight_per_temperature"]) == (0.5, 2.0, 0.25)
    assert told["layers"] == "[1, 2]"
    for dose in untold:
        assert dose["weight"] is dose["weight_per_temperature"] is dose["layers"] is None


def test_profile_is_of_the_last_evaluation():
    layers = sample_tables([trial_row(0), trial_row(1)]).layers
    profile = analysis.layer_profile(layers, 1)
    expected = [row for row in layers.to_pylist() if row["trial"] == 1 and row["step"] == 50]
    assert (profile.trial, profile.step) == (1, 50)
    assert profile.layer == list(range(7))
    assert profile.depth_frac == pytest.approx([n / 6 for n in range(7)])
    assert profile.cosine_mean == [row["cosine_mean"] for row in expected]
    for row, density in zip(expected, profile.density(), strict=True):
        assert sum(density) * 2 / NUM_HISTOGRAM_BINS == pytest.approx(1.0)
        assert density[70] == pytest.approx(row["histogram"][70] / sum(row["histogram"]) * 64)
    assert analysis.layer_profile(layers, 2) is None


def test_a_layer_without_histogram_has_no_density():
    profile = analysis.LayerProfile(
        trial=1, step=1, layer=[0, 1], cosine_mean=[0.1, None], histogram=[None, []]
    )
    assert profile.density() == [None, None]


# --- sentences -----------------------------------------------------------------------------------------


def best_and_baseline(**changes: Any) -> pa.Table:
    chosen = {
        "dispersion.weight": 0.8,
        "dispersion.temperature": 1.2,
        "dispersion.layers": "all",
        "layer_cosine_mean": 0.352,
    }
    others = [trial_row(trial, val_loss=5.3) for trial in (1, 2, 3, 4, 6, 7, 8)]
    baseline = trial_row(0, val_loss=5.235, layer_cosine_mean=0.611)
    return trial_table([baseline, *others, trial_row(5, **(chosen | {"val_loss": 5.13} | changes))])


def test_summary_of_a_search_that_found_something():
    first, second = analysis.summarise(best_and_baseline(), VAL_LOSS)
    assert first == (
        "Best of 8: trial 5 with val_loss 5.130 (weight 0.8, temperature 1.2, layers all), 0.105 nats below "
        "the baseline's 5.235; one seed, so this is a lead and not a verdict."
    )
    assert second == (
        "Condensation, the mean cosine between tokens over the layers, is 0.352 in trial 5 and 0.611 in the "
        "baseline: the trial's layers are more dispersed."
    )


def test_summary_where_nothing_beat_the_baseline():
    first, second = analysis.summarise(best_and_baseline(val_loss=5.24, layer_cosine_mean=0.7), VAL_LOSS)
    assert "0.005 nats above the baseline's 5.235; no trial did better than the baseline; one seed" in first
    assert second.endswith("more condensed.")
    within, even = analysis.summarise(best_and_baseline(val_loss=5.2349, layer_cosine_mean=0.6111), VAL_LOSS)
    assert "within 0.001 nats of the baseline's 5.235; one seed" in within
    assert even.endswith("equally condensed.")


def test_summary_counts_what_did_not_complete():
    rows = [trial_row(0), trial_row(1), failed_row(2), failed_row(3, "diverged")]
    assert analysis.summarise(trial_table(rows), VAL_LOSS)[0].startswith(
        "Best of 1 completed (1 failed, 1 diverged): trial 1 with val_loss "
    )


def test_summary_without_a_completed_trial():
    trials = trial_table([trial_row(0, layer_cosine_mean=0.611), failed_row(1), failed_row(2)])
    first, second = analysis.summarise(trials, VAL_LOSS)
    assert first == "No search trial completed (2 failed): nothing can be said about dispersion."
    assert second.endswith("is 0.611 in the baseline; no best trial has one to compare with it.")


def test_summary_of_an_empty_study_and_of_one_without_values():
    first, second = analysis.summarise(trial_table([]), VAL_LOSS)
    assert first == "No search trial has ended yet: nothing was found so far."
    assert second.endswith("is known neither for a best trial nor for the baseline.")
    first, _ = analysis.summarise(trial_table([trial_row(1, val_loss=None)]), VAL_LOSS)
    assert first == "No completed search trial has a val_loss (1 completed): there is no best trial."


@pytest.mark.parametrize(
    ("baseline", "state"),
    [([], "has not run yet"), ([failed_row(0)], "is failed and has no val_loss")],
)
def test_summary_without_a_baseline(baseline, state):
    first, second = analysis.summarise(trial_table([*baseline, trial_row(1)]), VAL_LOSS)
    assert first.endswith(f"; the baseline {state}, so nothing can be said about dispersion's effect.")
    assert "the baseline has none" in second


def test_summary_does_not_compare_unequal_budgets():
    rows = [trial_row(0, val_loss=5.235), trial_row(1, val_loss=5.1, num_tokens=409_600)]
    first, _ = analysis.summarise(trial_table(rows), VAL_LOSS)
    assert (
        "after 409,600 tokens; the baseline's 5.235 after 204,800 tokens does not compare with it." in first
    )
    assert "below" not in first


def test_summary_names_other_fields_that_varied():
    searched = {"dispersion.weight": pa.float64(), "train.learning_rate": pa.float64()}
    rows = [trial_row(0), trial_row(1) | {"train.learning_rate": 0.00123}]
    first, _ = analysis.summarise(trial_table(rows, searched), VAL_LOSS)
    assert "learning_rate 0.00123)" in first
    assert "train.learning_rate varied too, so the difference is not dispersion's alone" in first


def test_summary_of_another_objective_says_what_the_loss_did():
    objective = Objective(metric="spearman", mode="max")
    rows = [trial_row(0, spearman=0.5, val_loss=5.2), trial_row(1, spearman=0.75, val_loss=5.3)]
    first, _ = analysis.summarise(trial_table(rows), objective)
    assert "with spearman 0.75 (" in first
    assert (
        "0.25 above the baseline's 0.50; its val_loss is 5.300, 0.100 nats above the baseline's 5.200"
        in first
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.81234, "0.812"),
        (2e-05, "2e-05"),
        (12345.6, "12346"),
        (7, "7"),
        (True, "True"),
        ("é", "é"),
    ],
)
def test_values_for_people(value, text):
    assert analysis.format_value(value) == text


def test_short_names_only_where_they_are_unique():
    row = {"a.size": 1, "b.size": 2, "c.rate": None}
    assert analysis.describe_trial(row, list(row)) == "a.size 1, b.size 2, rate null"


# --- several objectives --------------------------------------------------------------------------------

COSINE = Objective(metric="layer_cosine_mean", mode="min")
SPEED = Objective(metric="tokens_per_s", mode="max")


def pair(trial: int, loss: float | None, cosine: float | None, **changes: Any) -> dict[str, Any]:
    return trial_row(trial, val_loss=loss, layer_cosine_mean=cosine, **changes)


def front_of(rows: list[dict[str, Any]], *objectives: Objective) -> list[int]:
    return analysis.pareto_front(trial_table(rows), *objectives)["trial"].to_pylist()


def test_the_front_is_what_no_other_betters() -> None:
    rows = [
        pair(0, 1.0, 0.0),  # the baseline is not of the search
        pair(1, 5.0, 0.5),
        pair(2, 4.0, 0.6),
        pair(3, 5.0, 0.6),  # bettered by 1 and 2
        pair(4, 5.0, 0.5),  # as good as 1
        pair(5, 3.0, None),
        pair(6, 3.0, 0.1, status="pruned"),
        failed_row(7),
        pair(8, 6.0, 0.4),
        pair(9, 3.0, 0.1, num_tokens=100),  # fewer tokens
    ]
    table = analysis.pareto_front(trial_table(rows), VAL_LOSS, COSINE)
    assert table["trial"].to_pylist() == [2, 1, 4, 8]
    assert table["val_loss"].to_pylist() == [4.0, 5.0, 5.0, 6.0]
    assert table.column_names == [
        "study",
        "phase",
        "trial",
        "attempt",
        "num_tokens",
        "val_loss",
        "layer_cosine_mean",
    ]
    assert front_of([], VAL_LOSS, COSINE) == []


def test_the_front_follows_each_mode() -> None:
    rows = [trial_row(trial, val_loss=float(trial), tokens_per_s=10.0 * trial) for trial in (1, 2, 3)]
    assert front_of(rows, VAL_LOSS, SPEED) == [1, 2, 3]
    assert front_of(rows, SPEED, VAL_LOSS) == [3, 2, 1], "best first by the first"
    assert front_of(rows, VAL_LOSS, Objective(metric="tokens_per_s", mode="min")) == [1]
    assert front_of(rows, VAL_LOSS) == [1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_front_against_a_loop(number: int) -> None:
    objectives = (VAL_LOSS, SPEED, COSINE)[:number]
    draw = np.random.default_rng(number)
    rows = [
        trial_row(
            trial,
            val_loss=float(draw.integers(10)),
            tokens_per_s=float(draw.integers(10)),
            layer_cosine_mean=float(draw.integers(10)),
        )
        for trial in range(1, 60)
    ]
    signed = [[(1 if one.mode == "min" else -1) * row[one.metric] for one in objectives] for row in rows]
    expected = [
        row["trial"]
        for row, mine in zip(rows, signed, strict=True)
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in signed
        )
    ]
    assert sorted(front_of(rows, *objectives)) == expected


def test_a_summary_of_several_objectives() -> None:
    baseline = pair(0, 5.2, 0.6, tokens_per_s=100.0)
    rows = [pair(1, 5.1, 0.5), pair(2, 5.0, 0.7), pair(3, 5.3, 0.8)]
    front, loss, cosine, condensed = analysis.summarise(trial_table([baseline, *rows]), VAL_LOSS, COSINE)
    assert front == (
        "Pareto front over val_loss (min), layer_cosine_mean (min): trial 2 (val_loss 5.000, "
        "layer_cosine_mean 0.700); trial 1 (val_loss 5.100, layer_cosine_mean 0.500); trial 1 is better than "
        "the baseline in one of them and no worse in the others."
    )
    assert loss.startswith("Best of 3: trial 2 with val_loss 5.000")
    assert cosine.startswith("Best of 3: trial 1 with layer_cosine_mean 0.500")
    assert condensed.startswith("Condensation")


@pytest.mark.parametrize(
    ("baseline", "rows", "sentence"),
    [
        (None, [pair(1, 5.0, 0.5)], "; the baseline has no values to compare."),
        (pair(0, None, 0.5), [pair(1, 5.0, 0.5)], "; the baseline has no values to compare."),
        (pair(0, 6.0, 0.9, num_tokens=7), [pair(1, 5.0, 0.5)], "; the baseline has no values to compare."),
        (pair(0, 5.0, 0.4), [pair(1, 5.0, 0.5)], "; none is better than the baseline without being worse"),
        (pair(0, 5.0, 0.5), [pair(1, 5.0, 0.5)], "; none is better than the baseline without being worse"),
        (pair(0, 5.0, 0.5), [pair(1, 4.0, 0.5), pair(2, 5.0, 0.4)], "; trials 1, 2 are better than"),
        (pair(0, 5.0, 0.5), [failed_row(1), pair(2, 5.0, None)], "there is no Pareto front."),
        (
            pair(0, 9.0, 0.9),
            [pair(n, 5 + n, 0.5 - n / 100) for n in range(1, 12)],
            "; and 3 more; trials 1, ",
        ),
    ],
    ids=range(8),
)
def test_what_the_front_is_compared_with(
    baseline: dict[str, Any] | None, rows: list[dict[str, Any]], sentence: str
) -> None:
    table = trial_table([*([baseline] if baseline else []), *rows])
    assert sentence in analysis.summarise(table, VAL_LOSS, COSINE)[0]


def test_ten_thousand_rows_on_the_front() -> None:
    draw = np.random.default_rng(0)
    row = trial_row(1)
    rows = [
        {**row, "trial": trial, "val_loss": float(loss), "layer_cosine_mean": float(-loss)}
        for trial, loss in enumerate(draw.normal(5, 1, 10_000), 1)
    ]
    table = trial_table([trial_row(0), *rows])
    front = analysis.summarise(table, VAL_LOSS, COSINE)[0]  # the worst case: all are on the front
    assert "and 9992 more" in front
