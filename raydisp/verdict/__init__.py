"""The verdict of a study's confirm phase, from the `trials` table alone: tables in, tables and sentences out.

Only runs of the confirm phase are looked at: what the search scored is never a result. Runs are paired by
seed (`confirm.frozen_plan`), judged by `paired.judge`, and written as two tables beside the study's own:

    verdicts/verdicts.parquet   one row per arm: the verdict on the primary outcome and what it rests on
    effects/effects.parquet     one row per arm and metric: descriptive, without p-values

What arms do to benchmarks is in `raydisp.tasks.effects`.

python -m raydisp.verdict DIR
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydisp import paired, storage
from raydisp.analysis import MEASURES
from raydisp.confirm.frozen_plan import Plan, confirm_rows, read_plan
from raydisp.results import write_table
from raydisp.results.columns import Column, Columns, make_schema
from raydisp.verdict import words
from raydisp.verdict.pairs import Pair, Row, pair_up

VERDICT_COLUMNS: Columns = {
    "study": Column(pa.string(), "name of the study"),
    "arm": Column(pa.string(), "name of the frozen arm"),
    "from_trial": Column(
        pa.int32(), "trial of the search whose values the arm has; null where it has its own"
    ),
    "description": Column(pa.string(), "its settings, in words"),
    "verdict": Column(pa.string(), "`helps`, `hurts`, `no_effect_that_matters` or `inconclusive`"),
    "reason": Column(
        pa.string(), "of `inconclusive`: `no pair`, `one pair`, `diverged` or `not shown`; else null"
    ),
    "primary_outcome": Column(pa.string(), "column of `trials` that is judged; lower is better"),
    "unit": Column(pa.string(), "of the columns from `difference` to `high_90`, and of `smallest_effect`"),
    "difference": Column(pa.float64(), "arm minus baseline, mean over the pairs", "`unit`"),
    "spread": Column(pa.float64(), "standard deviation over the pairs; null with fewer than 2", "`unit`"),
    "low_95": Column(pa.float64(), "lower end of the paired t interval", "`unit`"),
    "high_95": Column(pa.float64(), "its upper end", "`unit`"),
    "low_90": Column(
        pa.float64(), "lower end; both inside ± `smallest_effect`: no effect that matters", "`unit`"
    ),
    "high_90": Column(pa.float64(), "upper end", "`unit`"),
    "p_value": Column(pa.float64(), "paired t test, two-sided"),
    "holm_p_value": Column(pa.float64(), "the same, adjusted over the arms by Holm's procedure; decides"),
    "sign_flip_p_value": Column(pa.float64(), "sign-flip test, two-sided"),
    "sign_flip_holm_p_value": Column(pa.float64(), "the same, adjusted over the arms"),
    "is_sign_flip_exact": Column(pa.bool_(), "all signs were tried, not random ones"),
    "tests_disagree": Column(pa.bool_(), "only one of the two adjusted p-values is at most `alpha`"),
    "is_below_smallest_effect": Column(pa.bool_(), "helps or hurts, but by less than what would matter"),
    "smallest_effect": Column(pa.float64(), "that would matter, as the plan froze it", "`unit`"),
    "alpha": Column(pa.float64(), "level of the test"),
    "num_arms": Column(pa.int32(), "the family that p-values are adjusted over"),
    "num_pairs": Column(pa.int32(), "that are complete"),
    "num_planned": Column(pa.int32(), "pairs of the plan"),
    "num_outstanding": Column(pa.int32(), "pairs that may still become complete; above 0 nothing is final"),
    "num_diverged": Column(pa.int32(), "runs of the arm; with any it cannot help"),
    "incomplete": Column(pa.string(), "which pairs are incomplete and why; null where none is"),
    "train_s_ratio": Column(pa.float64(), "training time, arm over baseline, medians over the pairs"),
    "peak_memory_bytes_ratio": Column(pa.float64(), "memory, arm over baseline, medians over the pairs"),
    "layer_cosine_mean_difference": Column(pa.float64(), "arm minus baseline, mean over the pairs"),
    "layer_cosine_mean_low_95": Column(pa.float64(), "lower end of its paired t interval"),
    "layer_cosine_mean_high_95": Column(pa.float64(), "upper end"),
    "spearman_difference": Column(pa.float64(), "arm minus baseline, mean over the pairs"),
    "spearman_low_95": Column(pa.float64(), "lower end of its paired t interval"),
    "spearman_high_95": Column(pa.float64(), "upper end"),
    "sentence": Column(pa.string(), "the verdict for people"),
}
VERDICT_SCHEMA = make_schema(VERDICT_COLUMNS)

EFFECT_COLUMNS: Columns = {
    "study": Column(pa.string(), "name of the study"),
    "arm": Column(pa.string(), "name of the frozen arm"),
    "metric": Column(pa.string(), "the primary outcome, or one of those listed below"),
    "unit": Column(pa.string(), "of the metric; empty where it has none"),
    "arm_mean": Column(pa.float64(), "over the pairs that have the metric on both sides", "`unit`"),
    "baseline_mean": Column(pa.float64(), "over the same pairs", "`unit`"),
    "difference": Column(pa.float64(), "arm minus baseline, mean over the pairs", "`unit`"),
    "low_95": Column(
        pa.float64(),
        "lower end of the paired t interval, not adjusted; null with fewer than 2 pairs",
        "`unit`",
    ),
    "high_95": Column(pa.float64(), "its upper end", "`unit`"),
    "num_pairs": Column(pa.int32(), "that have the metric on both sides"),
}
EFFECT_SCHEMA = make_schema(EFFECT_COLUMNS)

EFFECT_METRICS = (
    "test_loss",
    "test_perplexity",  # exp(test_loss) of each run
    "val_loss",
    "val_bits_per_byte",
    "train_loss",
    "layer_cosine_mean",
    "spearman",
    "kendall",
    "train_s",
    "tokens_per_s",
    "peak_memory_bytes",
)

# --- tables --------------------------------------------------------------------------------------------


def verdicts(trials: pa.Table) -> pa.Table:
    """One row per arm of the frozen plan (VERDICT_SCHEMA).

    Args:
        trials: the `trials` table of a study, or its attempts; rows of the search are not looked at.
    Raises:
        VerdictError: there is no confirm phase, or its rows do not belong together.
    """
    plan = read_plan(trials)
    return _verdict_table(trials, plan, pair_up(trials, plan))


def _verdict_table(trials: pa.Table, plan: Plan, pairs: Sequence[Pair]) -> pa.Table:
    groups = _by_arm(plan, pairs)
    diverged = [
        sum(pair.ours is not None and pair.ours["status"] == "diverged" for pair in group) for group in groups
    ]
    judged = paired.judge(
        _differences(groups, plan.primary_outcome),
        plan.smallest_effect,
        plan.alpha,
        may_help=[number == 0 for number in diverged],
    )
    found = judged.summary
    condensation = {
        metric: paired.summarise(_differences(groups, metric)) for metric in ("layer_cosine_mean", "spearman")
    }
    rows = []
    for place, (arm, group) in enumerate(zip(plan.compared, groups, strict=True)):
        verdict, num_pairs = str(judged.verdict[place]), int(found.num_pairs[place])
        from_trial, description = (plan.arms[arm].from_trial, plan.arms[arm].description or None)
        row: Row = {
            "study": _study(trials),
            "arm": arm,
            "from_trial": from_trial if isinstance(from_trial, int) else None,
            "description": description if isinstance(description, str) else None,
            "verdict": verdict,
            "reason": None,
            "primary_outcome": plan.primary_outcome,
            "unit": plan.unit,
            "difference": found.mean[place],
            "spread": found.spread[place],
            "low_95": found.low_95[place],
            "high_95": found.high_95[place],
            "low_90": found.low_90[place],
            "high_90": found.high_90[place],
            "p_value": found.p_value[place],
            "holm_p_value": judged.holm_p[place],
            "sign_flip_p_value": judged.sign_flip_p[place],
            "sign_flip_holm_p_value": judged.sign_flip_holm_p[place],
            "is_sign_flip_exact": bool(judged.sign_flip_exact[place]) if num_pairs > 1 else None,
            "tests_disagree": bool(judged.tests_disagree[place]) if num_pairs > 1 else None,
            "is_below_smallest_effect": bool(judged.below_smallest_effect[place]),
            "smallest_effect": plan.smallest_effect,
            "alpha": plan.alpha,
            "num_arms": len(plan.compared),
            "num_pairs": num_pairs,
            "num_planned": len(plan.seeds),
            "num_outstanding": sum(pair.is_outstanding for pair in group),
            "num_diverged": diverged[place],
            "incomplete": words.incomplete(group) or None,
            "train_s_ratio": _ratio_of_medians(group, "train_s"),
            "peak_memory_bytes_ratio": _ratio_of_medians(group, "peak_memory_bytes"),
        }
        for metric, summary in condensation.items():
            row[f"{metric}_difference"] = summary.mean[place]
            row[f"{metric}_low_95"] = summary.low_95[place]
            row[f"{metric}_high_95"] = summary.high_95[place]
        if verdict == paired.INCONCLUSIVE:
            few = {0: "no pair", 1: "one pair"}
            row["reason"] = few.get(num_pairs, "diverged" if judged.barred[place] else "not shown")
        row = {name: _plain(value) for name, value in row.items()}
        rows.append(row | {"sentence": words.verdict_sentence(row)})
    return pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)


def effects(trials: pa.Table) -> pa.Table:
    """One row per arm of the frozen plan and metric (EFFECT_SCHEMA), all of them over complete pairs.

    They describe, and are not tested: one outcome was chosen beforehand to decide.

    Raises:
        VerdictError: as `verdicts` says.
    """
    plan = read_plan(trials)
    groups = _by_arm(plan, pair_up(trials, plan))
    rows = []
    for place, (arm, group) in enumerate(zip(plan.compared, groups, strict=True)):
        for metric in dict.fromkeys((plan.primary_outcome, *EFFECT_METRICS)):
            values = np.array([pair.values(metric) for pair in group])
            values = values[np.isfinite(values).all(axis=-1)]
            summary = paired.summarise(_differences(groups, metric)[place : place + 1])
            means = values.mean(axis=0) if len(values) else (None, None)
            measure = MEASURES.get(metric)
            row = {
                "study": _study(trials),
                "arm": arm,
                "metric": metric,
                "unit": measure.unit if measure else plan.unit,
                "arm_mean": means[0],
                "baseline_mean": means[1],
                "difference": summary.mean[0],
                "low_95": summary.low_95[0],
                "high_95": summary.high_95[0],
                "num_pairs": len(values),
            }
            rows.append({name: _plain(value) for name, value in row.items()})
    return pa.Table.from_pylist(rows, schema=EFFECT_SCHEMA)


def paired_differences(trials: pa.Table) -> dict[str, dict[int, float]]:
    """Arm -> seed -> difference of the primary outcome, arm minus baseline, of the complete pairs.

    Raises:
        VerdictError: as `verdicts` says.
    """
    plan = read_plan(trials)
    found: dict[str, dict[int, float]] = {arm: {} for arm in plan.compared}
    for pair in pair_up(trials, plan):
        if not pair.problem:
            found[pair.arm][pair.seed] = pair.difference(plan.primary_outcome)
    return found


def largest_spread(trials: pa.Table) -> float | None:
    """The largest standard deviation over seeds of an arm's paired differences; None: no arm has two pairs.

    Raises:
        VerdictError: as `verdicts` says.
    """
    found = [list(pairs.values()) for pairs in paired_differences(trials).values()]
    return max((float(np.std(values, ddof=1)) for values in found if len(values) > 1), default=None)


def write_verdicts(study_dir: str, trials: pa.Table) -> tuple[str, str]:
    """Write both tables into a results folder, in place of earlier ones; returns their places.

    No lease is needed: they follow from the rows, and whoever writes them last has seen the most of these.

    Raises:
        VerdictError: as `verdicts` says.
        OutputError: the folder cannot be written.
    """
    tables = {"verdicts": verdicts(trials), "effects": effects(trials)}
    places = [storage.join(study_dir, name, f"{name}.parquet") for name in tables]
    for place, table in zip(places, tables.values(), strict=True):
        write_table(place, table)
    return places[0], places[1]


def _by_arm(plan: Plan, pairs: Sequence[Pair]) -> list[list[Pair]]:
    return [[pair for pair in pairs if pair.arm == arm] for arm in plan.compared]


def _differences(groups: Sequence[Sequence[Pair]], metric: str) -> paired.Floats:
    """[arms, seeds]."""
    return np.array([[pair.difference(metric) for pair in group] for group in groups])


def _ratio_of_medians(group: Sequence[Pair], metric: str) -> float | None:
    values = np.array([pair.values(metric) for pair in group])
    values = values[np.isfinite(values).all(axis=-1)]
    if not len(values):
        return None
    ours, theirs = np.median(values, axis=0)
    return float(ours / theirs) if theirs > 0 else None


def _study(trials: pa.Table) -> str | None:
    name: str | None = confirm_rows(trials)["study"][0].as_py()
    return name


def _plain(value: Any) -> Any:
    """As a table has it: Python's own numbers, and null for what is not a number."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- sentences -----------------------------------------------------------------------------------------


def sentences(trials: pa.Table) -> tuple[str, ...]:
    """What the confirm phase found, and all that a reader must know to believe it or not.

    First what was compared and whether it is over; then each arm: the verdict, its incomplete pairs, what it
    costs and what it does to condensation, and a test that disagrees; then what limits all of it.

    Raises:
        VerdictError: as `verdicts` says.
    """
    plan = read_plan(trials)
    pairs = pair_up(trials, plan)
    told = [words.plan_sentence(plan), words.outstanding_sentence(plan, pairs)]
    rows = _verdict_table(trials, plan, pairs).to_pylist()
    for row, group in zip(rows, _by_arm(plan, pairs), strict=True):
        told += [
            row["sentence"],
            words.incomplete_sentence(row),
            words.cost_sentence(row),
            words.condensation_sentence(row),
        ]
        told += [
            words.disagreement_sentence(row),
            *words.no_pair_sentences(row["arm"], group),
        ]
    if any(row["is_sign_flip_exact"] is False for row in rows):
        told.append(
            f"Beyond {paired.MAX_EXACT_PAIRS} pairs the sign-flip test does not try all signs, but "
            f"{paired.NUM_RANDOM_SIGNS:,} random ones from a fixed seed."
        )
    told += [words.pretrained_sentence(plan), *words.difference_sentences(trials)]
    told += [*words.seed_sentences(trials, plan), *words.unfair_sentences(plan)]
    told += [*words.tuned_sentences(plan), *words.left_out_sentences(plan)]
    return tuple(sentence for sentence in told if sentence)
