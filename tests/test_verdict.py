"""The verdict from the rows alone: pairs, tables, every sentence, rows that do not belong, the command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from test_analysis import trial_row, trial_table
from test_report import traces

from raydisp import figures, results, storage, verdict
from raydisp.confirm import frozen_plan
from raydisp.errors import VerdictError
from raydisp.figures.interactive import draw
from raydisp.results import parts
from raydisp.verdict import pairs
from raydisp.verdict.command import main

SEEDS = (101, 102, 103, 104, 105, 106)
NOISE = (0.01, -0.01, 0.02, -0.02, 0.005, -0.005)
"""Mean 0, spread 0.0148; 90 % interval +-0.0122."""
BASELINE = (5.20, 5.30, 5.10, 5.25, 5.15, 5.22)


def plan(**changes: Any) -> dict[str, Any]:
    """A frozen plan of one arm and six seeds."""
    arm = {"from_trial": 5, "values": {"dispersion.weight": 0.8}, "description": "the search's best"}
    tree = {
        "schema_version": 1,
        "primary_outcome": "test_loss",
        "unit": "nats per token",
        "baseline": "baseline",
        "arms": {"best": arm},
        "seeds": list(SEEDS),
        "smallest_effect": 0.02,
        "alpha": 0.05,
        "first_trial": 9,
        "pretrained": False,
        "test": "paired t test, two-sided, Holm over the arms",
        "hypotheses": ["best has another test loss than the baseline"],
        "spread": None,
        "promise": None,
    }
    return tree | changes


def run(arm: str, seed: int, test_loss: float | None, tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of the confirm phase; its trial number follows from arm and seed."""
    arms = ["baseline", *tree["arms"]]
    trial = 9 + len(tree["seeds"]) * arms.index(arm) + list(tree["seeds"]).index(seed)
    return trial_row(
        trial,
        **{
            "phase": "confirm",
            "arm": arm,
            "seed": seed,
            "test_loss": test_loss,
            "confirm_json": json.dumps(tree),
            "initial_weights_sha256": f"w{seed}",
            "first_batch_sha256": f"f{seed}",
            "last_batch_sha256": f"l{seed}",
            "train_s": 100.0 if arm == "baseline" else 112.0,
            "peak_memory_bytes": 1000 if arm == "baseline" else 1030,
            "layer_cosine_mean": 0.6 if arm == "baseline" else 0.4 + seed % 3 / 100,
            "spearman": 0.9,
        }
        | changes,
    )


def rows_of(
    differences: dict[str, tuple[float, ...]], tree: dict[str, Any] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """A whole confirm phase whose arms differ from the baseline by these, and two trials of the search."""
    tree = plan() if tree is None else tree
    rows = [trial_row(0), trial_row(1, val_loss=1.0)]
    for seed, loss in zip(tree["seeds"], BASELINE, strict=False):
        rows.append(run("baseline", seed, loss, tree, **changes))
    for arm, each in differences.items():
        for seed, loss, difference in zip(tree["seeds"], BASELINE, each, strict=False):
            rows.append(run(arm, seed, loss + difference, tree, **changes))
    return rows


def shifted(by: float, noise: float = 1.0) -> tuple[float, ...]:
    return tuple(by + noise * each for each in NOISE)


def change(rows: list[dict[str, Any]], arm: str, seed: int, **columns: Any) -> list[dict[str, Any]]:
    """The rows with one run changed."""
    hit = [row for row in rows if (row["phase"], row["arm"], row["seed"]) == ("confirm", arm, seed)]
    assert len(hit) == 1
    return [row | columns if row is hit[0] else row for row in rows]


def keep(rows: list[dict[str, Any]], arm: str, *seeds: int) -> list[dict[str, Any]]:
    """The rows, of one arm only the runs with these seeds."""
    return [row for row in rows if row["phase"] != "confirm" or row["arm"] != arm or row["seed"] in seeds]


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, had every run of the confirm phase failed."""
    changes = {"status": "failed", "test_loss": None}
    return [row | (changes if row["phase"] == "confirm" else {}) for row in rows]


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = verdict.verdicts(trial_table(rows))
    assert table.schema == verdict.VERDICT_SCHEMA
    return table.to_pylist()


def told(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return verdict.sentences(trial_table(rows))


# --- tables --------------------------------------------------------------------------------------------


def test_the_row_of_an_arm_against_numbers_by_hand() -> None:
    (row,) = judged(rows_of({"best": shifted(-0.1)}))
    test = stats.ttest_1samp(shifted(-0.1), 0.0)
    assert (row["study"], row["arm"], row["from_trial"]) == ("weight_search", "best", 5)
    assert row["description"] == "the search's best"
    assert (row["verdict"], row["reason"]) == ("helps", None)
    assert (row["primary_outcome"], row["unit"]) == ("test_loss", "nats per token")
    assert row["difference"] == pytest.approx(-0.1)
    assert row["spread"] == pytest.approx(np.std(NOISE, ddof=1))
    assert (row["low_95"], row["high_95"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (row["low_90"], row["high_90"]) == pytest.approx(tuple(test.confidence_interval(0.90)))
    assert row["p_value"] == row["holm_p_value"] == pytest.approx(test.pvalue)
    assert row["sign_flip_p_value"] == row["sign_flip_holm_p_value"] == 2 / 64
    assert (row["is_sign_flip_exact"], row["tests_disagree"]) == (True, False)
    assert not row["is_below_smallest_effect"]
    assert (row["smallest_effect"], row["alpha"], row["num_arms"]) == (0.02, 0.05, 1)
    assert (row["num_pairs"], row["num_planned"], row["num_outstanding"], row["num_diverged"]) == (6, 6, 0, 0)
    assert row["incomplete"] is None
    assert row["train_s_ratio"] == pytest.approx(1.12)
    assert row["peak_memory_bytes_ratio"] == pytest.approx(1.03)
    cosines = [0.4 + seed % 3 / 100 - 0.6 for seed in SEEDS]
    interval = stats.ttest_1samp(cosines, 0.0).confidence_interval(0.95)
    assert row["layer_cosine_mean_difference"] == pytest.approx(np.mean(cosines))
    assert row["layer_cosine_mean_low_95"] == pytest.approx(interval.low)
    assert row["layer_cosine_mean_high_95"] == pytest.approx(interval.high)
    assert [row[f"spearman_{part}"] for part in ("difference", "low_95", "high_95")] == [0.0] * 3


def test_two_arms_are_one_family() -> None:
    arms = {"best": {"from_trial": 5}, "plain": {"from_trial": None}}
    differences = {"best": shifted(-0.1), "plain": shifted(0.016)}
    best, plain = judged(rows_of(differences, plan(arms=arms)))
    assert (best["arm"], plain["arm"], plain["from_trial"], plain["description"]) == (
        "best",
        "plain",
        None,
        None,
    )
    assert best["holm_p_value"] == pytest.approx(2 * best["p_value"])
    assert plain["holm_p_value"] == pytest.approx(plain["p_value"]), "the second step"
    assert plain["verdict"] == "hurts"
    alone = judged(rows_of({"plain": shifted(0.016), "best": NOISE}, plan(arms=arms)))[1]
    assert (alone["holm_p_value"], alone["verdict"]) == (pytest.approx(2 * plain["p_value"]), "inconclusive")


def test_the_baseline_may_stand_among_the_arms_of_the_plan() -> None:
    tree = plan(arms={"baseline": {"from_trial": 0}, "best": {"from_trial": 5}})
    rows = [row | {"confirm_json": json.dumps(tree)} for row in rows_of({"best": shifted(-0.1)})]
    assert [row["arm"] for row in judged(rows)] == ["best"]


def test_only_the_latest_attempt_and_the_confirm_phase_count() -> None:
    rows = rows_of({"best": shifted(-0.1)})
    earlier = [row | {"test_loss": 99.0, "attempt": 1} for row in rows if row["phase"] == "confirm"]
    latest = [row | {"attempt": 2} for row in rows]
    assert judged(latest + earlier) == judged(rows)
    others = [row | {"val_loss": 77.0} if row["phase"] == "search" else row for row in rows]
    assert judged(others) == judged(rows)
    assert told(others) == told(rows)


def test_effects_are_means_and_intervals_of_each_metric() -> None:
    table = verdict.effects(trial_table(rows_of({"best": shifted(-0.1)})))
    assert table.schema == verdict.EFFECT_SCHEMA
    rows = {row["metric"]: row for row in table.to_pylist()}
    assert tuple(rows) == verdict.EFFECT_METRICS
    loss, perplexity = rows["test_loss"], rows["test_perplexity"]
    assert loss["baseline_mean"] == pytest.approx(np.mean(BASELINE))
    assert loss["arm_mean"] == pytest.approx(np.mean(BASELINE) - 0.1)
    assert loss["difference"] == pytest.approx(-0.1)
    ours = np.exp(np.add(BASELINE, shifted(-0.1)))
    changes = ours - np.exp(BASELINE)
    assert perplexity["arm_mean"] == pytest.approx(ours.mean())
    interval = stats.ttest_1samp(changes, 0.0).confidence_interval(0.95)
    assert (perplexity["low_95"], perplexity["high_95"]) == pytest.approx(tuple(interval))
    assert rows["train_s"]["difference"] == pytest.approx(12.0)
    assert (rows["train_s"]["unit"], loss["unit"], perplexity["unit"]) == ("s", "nats per token", "")
    assert {row["num_pairs"] for row in rows.values()} == {6}
    assert not [name for name in table.column_names if "p_value" in name]


def test_a_metric_that_a_run_lacks_has_fewer_pairs_and_never_a_zero() -> None:
    rows = rows_of({"best": shifted(-0.1)}, kendall=None)
    rows = change(rows, "best", 102, peak_memory_bytes=None)
    effects = {row["metric"]: row for row in verdict.effects(trial_table(rows)).to_pylist()}
    assert effects["peak_memory_bytes"]["num_pairs"] == 5
    missing = effects["kendall"]
    assert missing["num_pairs"] == 0
    assert (
        missing["arm_mean"] is missing["baseline_mean"] is missing["difference"] is missing["low_95"] is None
    )
    assert judged(rows)[0]["num_pairs"] == 6


def test_cost_is_a_ratio_of_medians() -> None:
    rows = change(rows_of({"best": shifted(-0.1)}), "best", 103, train_s=1e6)  # one slow run
    assert judged(rows)[0]["train_s_ratio"] == pytest.approx(1.12)
    assert judged(rows_of({"best": NOISE}, train_s=None))[0]["train_s_ratio"] is None


# --- incomplete pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["failed", "diverged", "interrupted", "pruned"])
@pytest.mark.parametrize("arm", ["best", "baseline"])
def test_a_run_that_did_not_complete_is_no_half_of_a_pair(arm: str, status: str) -> None:
    rows = change(rows_of({"best": shifted(0.1)}), arm, 103, status=status)  # even where it has a value
    (row,) = judged(rows)
    of_baseline = "baseline " if arm == "baseline" else ""
    assert row["num_pairs"] == 5
    assert row["incomplete"] == f"1 {of_baseline}{status} (seed 103)"
    assert row["num_outstanding"] == (status == "interrupted")
    assert row["num_diverged"] == (status == "diverged" and arm == "best")
    left = [each for each, seed in zip(shifted(0.1), SEEDS, strict=True) if seed != 103]
    assert row["difference"] == pytest.approx(np.mean(left))
    assert f"best: 5 of 6 pairs complete; left out: {row['incomplete']}." in told(rows)


def test_what_is_missing_is_counted_by_kind() -> None:
    rows = rows_of({"best": shifted(-0.1)})
    rows = change(rows, "best", 101, test_loss=None)
    rows = change(rows, "best", 102, status="failed")
    rows = keep(rows, "best", 101, 102, 103, 104)
    rows = keep(rows, "baseline", 101, 102, 103, 105, 106)
    assert judged(rows)[0]["incomplete"] == (
        "1 without test_loss (seed 101), 1 failed (seed 102), 1 baseline never started (seed 104), "
        "2 never started (seeds 105 to 106)"
    )
    both = keep(keep(rows_of({"best": NOISE}), "best", *SEEDS[:5]), "baseline", *SEEDS[:5])
    assert judged(both)[0]["incomplete"] == "1 never started (seed 106)"


def test_an_arm_that_diverged_cannot_help() -> None:
    rows = change(rows_of({"best": shifted(-0.1)}), "best", 103, status="diverged", test_loss=None)
    (row,) = judged(rows)
    assert (row["verdict"], row["reason"], row["num_diverged"]) == ("inconclusive", "diverged", 1)
    assert row["holm_p_value"] < 0.05
    assert row["sentence"].endswith(", but 1 run of it diverged: the others are those that went well.")
    hurts = change(rows_of({"best": shifted(0.1)}), "best", 103, status="diverged", test_loss=None)
    assert judged(hurts)[0]["verdict"] == "hurts"
    other = change(rows_of({"best": shifted(-0.1)}), "baseline", 103, status="diverged", test_loss=None)
    assert judged(other)[0]["verdict"] == "helps", "the baseline's divergence is not held against the arm"


def test_unequal_budgets_never_compare() -> None:
    rows = change(rows_of({"best": shifted(-0.1)}), "best", 103, num_tokens=102_400)
    rows = change(rows, "baseline", 104, num_tokens=None)
    (row,) = judged(rows)
    assert (row["num_pairs"], row["incomplete"]) == (4, "2 of unequal budgets (seeds 103 to 104)")
    assert (
        "best: unequal budgets never compare, so these are no pairs: seed 103 (tokens 102,400, baseline "
        "204,800), seed 104 (tokens 204,800, baseline unknown)."
    ) in told(rows)


@pytest.mark.parametrize(("column", "problem"), pairs.SAME_WITHIN_A_PAIR.items())
def test_runs_that_began_or_read_otherwise_are_no_pair(column: str, problem: str) -> None:
    rows = change(rows_of({"best": shifted(-0.1)}), "best", 103, **{column: "other"})
    rows = change(rows, "best", 105, **{column: "other"})
    rows = change(rows, "best", 106, **{column: None})  # not recorded: nothing is known against it
    (row,) = judged(rows)
    assert (row["num_pairs"], row["incomplete"]) == (4, f"2 {problem} (seeds 103, 105)")
    assert [line for line in told(rows) if line.startswith(f"best: {column} is not the baseline's")] == [
        f"best: {column} is not the baseline's with seeds 103, 105, so the runs had more than the arm's "
        "values between them and are no pairs."
    ]


# --- sentences -----------------------------------------------------------------------------------------


def test_the_whole_account_of_an_arm_that_helps() -> None:
    assert told(rows_of({"best": shifted(-0.1)})) == (
        "Compared on test loss in nats per token, lower is better: 1 arm with the baseline, on seeds 101 to "
        "106, by a plan frozen before the runs; less than 0.02 does not matter.",
        "best helps: its test loss is 0.1000 nats per token below the baseline's (95 % interval -0.1152 to "
        "-0.0848, n = 6 pairs, p < 0.0001).",
        "best takes 1.12 x the baseline's training time and 1.03 x the baseline's peak memory (medians, "
        "n = 6).",
        "Condensation in best, arm minus baseline, n = 6: mean cosine over the layers -0.190 (95 % interval "
        "-0.199 to -0.181); Spearman rho against the layer +0.000 (95 % interval +0.000 to +0.000).",
    )


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        (
            shifted(0.1),
            "best hurts: its test loss is 0.1000 nats per token above the baseline's (95 % interval +0.0848 "
            "to +0.1152, n = 6 pairs, p < 0.0001).",
        ),
        (
            shifted(-0.01, 0.1),
            "best helps, but less than what would matter: its test loss is 0.0100 nats per token below the "
            "baseline's (95 % interval -0.0115 to -0.0085, n = 6 pairs, p < 0.0001); the 90 % interval "
            "-0.0112 to -0.0088 lies within ±0.02.",
        ),
        (
            shifted(0.001),
            "best has no effect that matters: its test loss is 0.0010 nats per token above the baseline's "
            "(95 % interval -0.0142 to +0.0162, n = 6 pairs, p = 0.87); the 90 % interval -0.0109 to +0.0129 "
            "lies within ±0.02.",
        ),
        (
            shifted(-0.03, 3.0),
            "best is inconclusive: its test loss is 0.0300 nats per token below the baseline's (95 % "
            "interval -0.0756 to +0.0156, n = 6 pairs, p = 0.15); neither an effect nor its absence (within "
            "±0.02) is shown.",
        ),
        (
            (0.0,) * 6,
            "best has no effect that matters: its test loss is equal to the baseline's (95 % interval "
            "+0.0000 to +0.0000, n = 6 pairs, p = 1); the 90 % interval +0.0000 to +0.0000 lies within "
            "±0.02.",
        ),
        (
            shifted(0.0003, 0.001),
            "best hurts, but less than what would matter: its test loss is 0.0003 nats per token above the "
            "baseline's (95 % interval +0.00028 to +0.00032, n = 6 pairs, p < 0.0001); the 90 % interval "
            "+0.00029 to +0.00031 lies within ±0.02.",
        ),
    ],
    ids=["hurts", "less", "none", "inconclusive", "equal", "small"],
)
def test_the_sentence_of_each_verdict(differences: tuple[float, ...], sentence: str) -> None:
    rows = rows_of({"best": differences})
    assert judged(rows)[0]["sentence"] == sentence
    assert told(rows)[1] == sentence


def test_one_pair_says_n_is_one_and_has_no_spread() -> None:
    rows = rows_of({"best": (-0.1,)}, plan(seeds=[101]))
    (row,) = judged(rows)
    assert (row["verdict"], row["reason"], row["num_pairs"]) == ("inconclusive", "one pair", 1)
    assert row["difference"] == pytest.approx(-0.1)
    nothing = ("spread", "low_95", "high_95", "low_90", "high_90", "p_value", "holm_p_value")
    nothing += ("sign_flip_p_value", "sign_flip_holm_p_value", "is_sign_flip_exact", "tests_disagree")
    nothing += ("layer_cosine_mean_low_95", "spearman_high_95")
    assert {name: row[name] for name in nothing} == dict.fromkeys(nothing)
    assert row["sentence"] == (
        "best is inconclusive: n = 1; its test loss is 0.1000 nats per token below the baseline's, and one "
        "pair has neither a spread nor a test."
    )
    account = told(rows)
    assert account[-1] == (
        "Condensation in best, arm minus baseline, n = 1: mean cosine over the layers -0.180; Spearman rho "
        "against the layer +0.000."
    )
    assert "interval" not in " ".join(account)
    effects = verdict.effects(trial_table(rows)).to_pylist()
    assert {(row["num_pairs"], row["low_95"]) for row in effects} == {(1, None)}


def test_no_pair_at_all() -> None:
    rows = failed(rows_of({"best": NOISE}))
    (row,) = judged(rows)
    assert (row["verdict"], row["reason"], row["difference"]) == ("inconclusive", "no pair", None)
    assert told(rows)[1:] == (
        "best is inconclusive: n = 0, none of 6 pairs is complete.",
        "best: 0 of 6 pairs complete; left out: 6 failed (seeds 101 to 106).",
    )


def test_a_half_run_phase_is_reported_and_not_final() -> None:
    rows = keep(rows_of({"best": shifted(-0.1)}), "best", *SEEDS[:4])
    account = told(rows)
    assert account[1] == (
        "The confirm phase is not over: 2 of 6 pairs are outstanding, so no verdict is final; to stop where "
        "one looks good would make its p-value worthless."
    )
    assert account[2].startswith("So far, with 2 pairs outstanding, best helps: ")
    assert account[3] == "best: 4 of 6 pairs complete; left out: 2 never started (seeds 105 to 106)."
    one = told(keep(rows_of({"best": shifted(-0.1)}), "best", *SEEDS[:5]))
    assert "1 of 6 pairs is outstanding" in one[1]
    assert one[2].startswith("So far, with 1 pair outstanding, best helps: ")


def test_a_disagreement_of_the_tests_is_said() -> None:
    (line,) = [
        line for line in told(rows_of({"best": (-0.1, -0.1, -0.1, -0.1, -0.1, -4.0)})) if "disagr" in line
    ]
    assert line == (
        "best: the t test and the exact sign-flip test disagree at 5 % (p = 0.3 and p = 0.031); the verdict "
        "is the t test's, and rests on normal differences."
    )
    arms = {"best": {}, "other": {}}
    rows = rows_of({"best": shifted(-0.1), "other": NOISE}, plan(arms=arms))
    (line,) = [line for line in told(rows) if "disagr" in line]
    assert line == (
        "best: the t test and the exact sign-flip test disagree at 5 % (p < 0.0001 and p = 0.062 adjusted "
        "over 2 arms); the verdict is the t test's, and rests on normal differences; with fewer than 7 pairs "
        "the other can show nothing."
    )


def test_random_signs_are_said() -> None:
    tree = plan(seeds=list(range(101, 118)))
    draw = np.random.default_rng(0)
    losses, noise = draw.normal(5.0, 0.1, 17), draw.normal(0.0, 0.01, 17)
    rows = []
    for seed, loss, each in zip(tree["seeds"], losses, noise, strict=True):
        rows += [run("baseline", seed, loss, tree), run("best", seed, loss + each, tree)]
    sentence = (
        "Beyond 16 pairs the sign-flip test does not try all signs, but 99,999 random ones from a fixed seed."
    )
    assert judged(rows)[0]["is_sign_flip_exact"] is False
    assert sentence in told(rows)
    fewer = change(rows, "best", 117, status="failed")
    assert judged(fewer)[0]["is_sign_flip_exact"] is True
    assert sentence not in told(fewer)


def test_a_pretrained_model_is_pointed_out() -> None:
    sentence = (
        "The model is pretrained: the seed varied the order of the data and the noise of training only, not "
        "the initial weights, so the intervals say nothing about another model."
    )
    assert told(rows_of({"best": NOISE}, plan(pretrained=True)))[-1] == sentence
    assert sentence not in told(rows_of({"best": NOISE}))


def test_versions_of_the_code_that_differ_are_said() -> None:
    rows = change(rows_of({"best": NOISE}), "best", 106, code_version="0.2.0")
    assert told(rows)[-1] == (
        "The runs were made by different versions of the code: 0.1.0 (trials 9 to 19), 0.2.0 (trial 20)."
    )
    rows = change(rows_of({"best": NOISE}), "best", 106, code_version=None)
    assert "versions of the code" not in " ".join(told(rows))


def test_seeds_that_the_search_used_and_runs_outside_the_plan_are_said() -> None:
    rows = rows_of({"best": NOISE})
    rows[1] = rows[1] | {"seed": 104}
    assert told(rows)[-1] == "The search used seed 104 too: not all of these runs are fresh."
    rows = rows_of({"best": NOISE})
    extra = rows[-1] | {"trial": 90, "seed": 7}
    assert told([*rows, extra])[-1] == "1 run of the confirm phase is not in the plan."
    assert judged([*rows, extra]) == judged(rows)


# --- rows that do not belong ---------------------------------------------------------------------------


def refused(rows: list[dict[str, Any]]) -> str:
    table = trial_table(rows)
    messages = set()
    for function in (verdict.verdicts, verdict.effects, verdict.sentences, verdict.paired_differences):
        with pytest.raises(VerdictError) as caught:
            function(table)
        messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()


def test_other_data_are_refused() -> None:
    message = refused(change(rows_of({"best": NOISE}), "best", 106, data_sha256="ab" * 32))
    assert message.startswith(
        "the confirm runs are on different data (data_sha256 is 5f5f5f5f5f5f in trial 9 to "
    )
    assert "and abababababab in trial 20), so their losses do not compare" in message


def test_no_confirm_phase_is_refused() -> None:
    assert refused([trial_row(0), trial_row(1)]).startswith("there is no run of a confirm phase")
    assert refused([]).startswith("there is no run of a confirm phase")


def test_two_plans_and_no_plan_are_refused() -> None:
    other = json.dumps(plan(smallest_effect=0.1))
    message = refused(change(rows_of({"best": NOISE}), "best", 106, confirm_json=other))
    assert message.startswith("confirm_json differs between trials 9 to 19 and trials 20:")
    message = refused(change(rows_of({"best": NOISE}), "best", 106, confirm_json=None))
    assert message.startswith("confirm_json is null in trial 20:")


def test_the_same_run_twice_is_refused() -> None:
    rows = rows_of({"best": NOISE})
    assert refused([*rows, rows[-1] | {"trial": 30}]).startswith(
        "trials 20 and 30 are both the run of best with seed 106;"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "by a newer raydisp (schema_version 2, this one knows 1); update raydisp"),
        ({"schema_version": None}, "schema_version = null is not"),
        (
            {"primary_outcome": "vibes"},
            'primary_outcome = "vibes" is not a column of trials that holds numbers',
        ),
        ({"primary_outcome": "arm"}, 'primary_outcome = "arm" is not a column'),
        ({"primary_outcome": ["test_loss"]}, "primary_outcome"),
        ({"unit": 3}, "unit = 3 is not text"),
        ({"baseline": None}, "baseline = null is not text"),
        ({"arms": {}}, "arms has none beside baseline"),
        ({"arms": {"baseline": {}}}, "arms has none beside baseline"),
        ({"arms": {"best": 5}}, "arms.best = 5 is not a mapping"),
        ({"seeds": []}, "seeds = [] is not a list with at least one entry"),
        ({"seeds": [1, 1]}, "seeds = [1, 1] names a seed twice"),
        ({"seeds": [1.5]}, "seeds[0] = 1.5 is not a whole number"),
        ({"seeds": [True]}, "seeds[0] = true is not a whole number"),
        ({"smallest_effect": 0}, "smallest_effect = 0 is not above 0"),
        ({"smallest_effect": math.inf}, "smallest_effect = Infinity is not a finite number"),
        ({"alpha": 5}, "alpha = 5 is not below 1"),
        ({"alpha": True}, "alpha = true is not a number"),
        ({"pretrained": None}, "pretrained = null is not true or false"),
    ],
)
def test_a_plan_that_is_none_of_ours_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(VerdictError) as caught:
        frozen_plan.parse_plan(json.dumps(plan(**changes)))
    assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "is no JSON"), ("[]", "must be an object, not []")])
def test_a_plan_that_is_no_object_is_refused(text: str, words: str) -> None:
    with pytest.raises(VerdictError) as caught:
        frozen_plan.parse_plan(text)
    assert words in str(caught.value)


# --- the figure ----------------------------------------------------------------------------------------


def test_the_forest_plot_draws_the_rows() -> None:
    arms = {"best": {}, "<b>other</b>": {}, "single": {}, "none": {}}
    tree = plan(arms=arms)
    differences = {"best": shifted(-0.1), "<b>other</b>": NOISE, "single": (-0.3,)}
    trials = trial_table(rows_of(differences, tree))
    verdicts = verdict.verdicts(trials)
    panel = figures.verdict_panel(verdicts, trials)
    (plot,) = panel.plots
    figure, rows = draw(plot.chart), verdicts.to_pylist()
    drawn = traces(figure)
    points, means = drawn["one seed"], drawn["mean and 95 % interval"]
    assert points["x"] == pytest.approx([*shifted(-0.1), *NOISE, -0.3])
    assert points["y"] == [-0.15] * 6 + [-1.15] * 6 + [-2.15]
    assert points["hovertext"][0] == "best, seed 101: -0.0900"
    assert means["x"] == pytest.approx([-0.1, rows[1]["difference"], -0.3])
    assert means["y"] == [0.0, -1.0, -2.0]
    ends = [row["high_95"] - row["difference"] for row in rows[:2]]
    assert means["error_x"]["array"] == pytest.approx([*ends, None])
    assert means["error_x"]["arrayminus"] == pytest.approx([*ends, None])
    axis = figure.layout.yaxis
    assert list(axis.ticktext) == ["best", "&lt;b&gt;other&lt;/b&gt;", "single"]
    assert list(axis.tickvals) == means["y"]
    band, zero = figure.layout.shapes
    assert (band.type, band.x0, band.x1) == ("rect", -0.02, 0.02)
    assert (zero.type, zero.x0, zero.x1) == ("line", 0, 0)
    assert figure.layout.xaxis.title.text == "test loss, arm minus baseline (nats per token)"
    assert "±0.02" in panel.sentence
    assert "for want of a second pair: single." in panel.sentence
    assert "for want of a complete pair: none." in panel.sentence


def test_without_a_pair_there_is_no_forest_plot() -> None:
    trials = trial_table(failed(rows_of({"best": NOISE})))
    panel = figures.verdict_panel(verdict.verdicts(trials), trials)
    assert (panel.plots, panel.sentence) == ([], "No figure: the confirm phase has no complete pair of runs.")


# --- the command ---------------------------------------------------------------------------------------


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    results.write_table(storage.join(str(folder), "trials", "all.parquet"), trial_table(rows))
    return str(folder)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("raydisp.verdict: ")
    return err


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of({"best": shifted(-0.1)})
    place = write(tmp_path, rows)
    assert main([place]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *account, empty, head, line = out.splitlines()
    assert (tuple(account), empty) == (told(rows), "")
    assert head.split()[:4] == ["arm", "verdict", "n", "difference"]
    cells = "best helps 6/6 -0.1000 -0.1152 to -0.0848 0.0000 0.0312 1.12 x 1.03 x"
    assert line.split() == cells.split()
    written = pq.read_table(tmp_path / "verdicts" / "verdicts.parquet")
    assert written.to_pylist() == judged(rows)
    assert written.schema.equals(verdict.VERDICT_SCHEMA)
    assert written.schema.metadata[parts.VERSION_KEY] == b"1"
    effects = pq.read_table(tmp_path / "effects" / "effects.parquet")
    assert effects.to_pylist() == verdict.effects(trial_table(rows)).to_pylist()
    assert main([place]) == 0, "again, over its own tables"
    assert capsys.readouterr().out == out


def test_the_command_follows_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write(tmp_path, rows_of({"best": shifted(-0.1)}))
    assert main([place]) == 0
    write(tmp_path, rows_of({"best": shifted(0.1)}))
    assert main([place]) == 0
    assert "best hurts" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "verdicts")["verdict"].to_pylist() == ["hurts"]


def test_the_tables_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of({"best": shifted(-0.1)})
    rows = keep(rows, "best", 101)  # n = 1: many nulls
    assert main([write(tmp_path, rows), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["verdicts"] == judged(rows)
    assert tree["effects"] == verdict.effects(trial_table(rows)).to_pylist()
    assert tuple(tree["sentences"]) == told(rows)


def test_what_a_user_can_get_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refusal(capsys, str(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refusal(capsys, str(file))
    place = write(tmp_path / "searched", [trial_row(0), trial_row(1)])
    assert f"{place}: there is no run of a confirm phase" in refusal(capsys, place)
    assert not (tmp_path / "searched" / "verdicts").exists()
    (tmp_path / "empty").mkdir()
    assert "no run of a confirm phase" in refusal(capsys, str(tmp_path / "empty"))
    other = change(rows_of({"best": NOISE}), "best", 106, data_sha256="ab" * 32)
    assert "on different data" in refusal(capsys, write(tmp_path / "other", other))


def test_rows_of_a_newer_raydisp_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(results, "SCHEMA_VERSION", 2)
        place = write(tmp_path, rows_of({"best": NOISE}))
    assert "a newer raydisp wrote it (schema_version 2" in refusal(capsys, place)


def test_a_folder_that_cannot_be_written_is_still_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of({"best": shifted(-0.1)})
    place = write(tmp_path, rows)
    (tmp_path / "verdicts").write_text("in the way")  # root may write into folders that are read-only
    assert main([place]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(told(rows)[0])
    assert err.startswith("raydisp.verdict: the tables are not kept: ")
    assert err.count("\n") == 1


def test_results_of_version_1_have_no_confirm_phase(capsys: pytest.CaptureFixture[str]) -> None:
    v1 = str(Path(__file__).parent / "results_v1")
    assert "there is no run of a confirm phase" in refusal(capsys, v1)
    rows = results.read_tables(v1).trials.to_pylist()
    added = ("confirm_json", "test_loss", "initial_weights_sha256", "first_batch_sha256", "last_batch_sha256")
    assert {row[name] for row in rows for name in added} == {None}


def test_the_command_as_a_module_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    place = write(tmp_path, rows_of({"best": NOISE}))
    code = (
        "import sys; from raydisp.verdict.command import main; status = main(sys.argv[1:]); "
        "sys.exit(status or bool({'torch', 'ray'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "raydisp.verdict", place], capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_a_plain_reader_sees_each_arm_once(tmp_path: Path) -> None:
    place = write(tmp_path, rows_of({"best": NOISE}))
    verdict.write_verdicts(place, results.read_tables(place).trials)
    assert sorted(os.listdir(tmp_path)) == ["effects", "trials", "verdicts"]
    assert pa.parquet.read_table(tmp_path / "verdicts").num_rows == 1
