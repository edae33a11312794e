"""The verdict of a study's confirm phase, from the `trials` table alone: tables in, tables and sentences out.

Only runs of the confirm phase are looked at: what the search scored is never a result. Runs are paired by
seed (`frozen_plan`), judged by `paired.judge`, and written as two tables beside the study's own:

    verdicts/verdicts.parquet   one row per arm: the verdict on the primary outcome and what it rests on
    effects/effects.parquet     one row per arm and metric: descriptive, without p-values

python -m raydisp.verdict DIR
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydisp import paired, storage
from raydisp.analysis import MEASURES
from raydisp.frozen_plan import Plan, confirm_rows, read_plan
from raydisp.pairs import SAME_WITHIN_A_PAIR, UNEQUAL_BUDGETS, Pair, Row, pair_up
from raydisp.results import write_table
from raydisp.trial_list import number_ranges

VERDICT_SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("arm", pa.string()),
        ("from_trial", pa.int32()),  # of the search, whose values the arm has; null where it has its own
        ("description", pa.string()),
        ("verdict", pa.string()),  # helps | hurts | no_effect_that_matters | inconclusive
        ("reason", pa.string()),  # of inconclusive: no pair | one pair | diverged | not shown; else null
        ("primary_outcome", pa.string()),  # column of trials; lower is better
        ("unit", pa.string()),  # of the columns from difference to high_90, and of smallest_effect
        ("difference", pa.float64()),  # arm minus baseline, mean over the pairs
        ("spread", pa.float64()),  # standard deviation over the pairs; null with fewer than 2
        ("low_95", pa.float64()),  # paired t interval
        ("high_95", pa.float64()),
        ("low_90", pa.float64()),  # inside +-smallest_effect: no effect that matters
        ("high_90", pa.float64()),
        ("p_value", pa.float64()),  # paired t test, two-sided
        ("holm_p_value", pa.float64()),  # adjusted over the arms; decides
        ("sign_flip_p_value", pa.float64()),  # two-sided
        ("sign_flip_holm_p_value", pa.float64()),
        ("is_sign_flip_exact", pa.bool_()),  # all signs were tried, not random ones
        ("tests_disagree", pa.bool_()),  # only one of the two adjusted p-values is at most alpha
        ("is_below_smallest_effect", pa.bool_()),  # helps or hurts, but by less than what would matter
        ("smallest_effect", pa.float64()),
        ("alpha", pa.float64()),
        ("num_arms", pa.int32()),  # the family that p-values are adjusted over
        ("num_pairs", pa.int32()),  # complete
        ("num_planned", pa.int32()),
        ("num_outstanding", pa.int32()),  # pairs that may still become complete; above 0 nothing is final
        ("num_diverged", pa.int32()),  # runs of the arm; with any it cannot help
        ("incomplete", pa.string()),  # which pairs are incomplete and why; null where none is
        ("train_s_ratio", pa.float64()),  # arm over baseline, medians over the pairs
        ("peak_memory_bytes_ratio", pa.float64()),
        ("layer_cosine_mean_difference", pa.float64()),  # arm minus baseline, mean over the pairs
        ("layer_cosine_mean_low_95", pa.float64()),
        ("layer_cosine_mean_high_95", pa.float64()),
        ("spearman_difference", pa.float64()),
        ("spearman_low_95", pa.float64()),
        ("spearman_high_95", pa.float64()),
        ("sentence", pa.string()),
    ]
)

EFFECT_SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("arm", pa.string()),
        ("metric", pa.string()),  # one of EFFECT_METRICS
        ("unit", pa.string()),  # empty where the quantity has none
        ("arm_mean", pa.float64()),  # over the pairs that have the metric on both sides
        ("baseline_mean", pa.float64()),
        ("difference", pa.float64()),  # arm minus baseline, mean over the pairs
        ("low_95", pa.float64()),  # paired t interval, not adjusted; null with fewer than 2 pairs
        ("high_95", pa.float64()),
        ("num_pairs", pa.int32()),
    ]
)

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
            "incomplete": _incomplete(group) or None,
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
        rows.append(row | {"sentence": _verdict_sentence(row)})
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
    told = [_plan_sentence(plan), _outstanding_sentence(plan, pairs)]
    rows = _verdict_table(trials, plan, pairs).to_pylist()
    for row, group in zip(rows, _by_arm(plan, pairs), strict=True):
        told += [row["sentence"], _incomplete_sentence(row), _cost_sentence(row), _condensation_sentence(row)]
        told += [_disagreement_sentence(row), *_no_pair_sentences(row["arm"], group)]
    if any(row["is_sign_flip_exact"] is False for row in rows):
        told.append(
            f"Beyond {paired.MAX_EXACT_PAIRS} pairs the sign-flip test does not try all signs, but "
            f"{paired.NUM_RANDOM_SIGNS:,} random ones from a fixed seed."
        )
    told += [_pretrained_sentence(plan), _code_sentence(trials), *_seed_sentences(trials, plan)]
    return tuple(sentence for sentence in told if sentence)


def _plan_sentence(plan: Plan) -> str:
    arms = _count(len(plan.compared), "arm")
    return (
        f"Compared on {_label(plan.primary_outcome)} in {plan.unit}, lower is better: {arms} with the "
        f"baseline, on {_seeds(plan.seeds)}, by a plan frozen before the runs; less than "
        f"{plan.smallest_effect:g} does not matter."
    )


def _outstanding_sentence(plan: Plan, pairs: Sequence[Pair]) -> str:
    number = sum(pair.is_outstanding for pair in pairs)
    if not number:
        return ""
    return (
        f"The confirm phase is not over: {number} of {_count(len(pairs), 'pair')} {_are(number)} "
        "outstanding, so no verdict is final; to stop where one looks good would make its p-value worthless."
    )


def _verdict_sentence(row: Row) -> str:
    """The verdict on one arm, from its row."""
    number, verdict = row["num_pairs"], row["verdict"]
    arm = row["arm"]
    if row["num_outstanding"]:
        arm = f"So far, with {_count(row['num_outstanding'], 'pair')} outstanding, {arm}"
    if number == 0:
        return f"{arm} is inconclusive: n = 0, none of {_count(row['num_planned'], 'pair')} is complete."
    size = _size(abs(row["difference"]))
    side = "equal to" if row["difference"] == 0 else f"{size} {row['unit']} {_side(row['difference'])}"
    shown = f"its {_label(row['primary_outcome'])} is {side} the baseline's"
    if number == 1:
        return f"{arm} is inconclusive: n = 1; {shown}, and one pair has neither a spread nor a test."
    shown += (
        f" (95 % interval {_interval(row['low_95'], row['high_95'])}, n = {number} pairs, "
        f"{_p_value(row['holm_p_value'])}{_adjusted(row['num_arms'])})"
    )
    bound = f"±{row['smallest_effect']:g}"
    narrow = f"90 % interval {_interval(row['low_90'], row['high_90'])}"
    if verdict in (paired.HELPS, paired.HURTS):
        if row["is_below_smallest_effect"]:
            lead = f"{arm} {verdict}, but less than what would matter"
            return f"{lead}: {shown}; the {narrow} lies within {bound}."
        return f"{arm} {verdict}: {shown}."
    if verdict == paired.NO_EFFECT:
        return f"{arm} has no effect that matters: {shown}; the {narrow} lies within {bound}."
    if row["reason"] == "diverged":
        runs = _count(row["num_diverged"], "run")
        return f"{arm} is inconclusive: {shown}, but {runs} of it diverged, and such an arm cannot help."
    return f"{arm} is inconclusive: {shown}; neither an effect nor its absence (within {bound}) is shown."


def _incomplete_sentence(row: Row) -> str:
    if not row["incomplete"]:
        return ""
    sentence = f"{row['arm']}: {row['num_pairs']} of {_count(row['num_planned'], 'pair')} complete"
    return f"{sentence}; left out: {row['incomplete']}."


def _incomplete(group: Sequence[Pair]) -> str:
    """`1 diverged (seed 103), 2 never started (seeds 104, 105)`; '' where all pairs are complete."""
    problems: dict[str, list[int]] = {}
    for pair in group:
        if pair.problem:
            problems.setdefault(pair.problem, []).append(pair.seed)
    return ", ".join(f"{len(seeds)} {problem} ({_seeds(seeds)})" for problem, seeds in problems.items())


def _cost_sentence(row: Row) -> str:
    costs = {"training time": row["train_s_ratio"], "peak memory": row["peak_memory_bytes_ratio"]}
    told = [f"{ratio:.2f} x the baseline's {name}" for name, ratio in costs.items() if ratio is not None]
    if not told:
        return ""
    return f"{row['arm']} takes {' and '.join(told)} (medians, {_pairs(row)})."


def _condensation_sentence(row: Row) -> str:
    names = {"layer_cosine_mean": "mean cosine over the layers", "spearman": "Spearman rho against the layer"}
    told = []
    for metric, name in names.items():
        change, low, high = (row[f"{metric}_{part}"] for part in ("difference", "low_95", "high_95"))
        if change is not None:
            interval = "" if low is None else f" (95 % interval {low:+.3f} to {high:+.3f})"
            told.append(f"{name} {change:+.3f}{interval}")
    if not told:
        return ""
    return f"Condensation in {row['arm']}, arm minus baseline, {_pairs(row)}: {'; '.join(told)}."


def _disagreement_sentence(row: Row) -> str:
    if not row["tests_disagree"]:
        return ""
    alpha = f"{100 * row['alpha']:g} %"
    kind = "exact sign-flip test" if row["is_sign_flip_exact"] else "sign-flip test of random signs"
    sentence = (
        f"{row['arm']}: the t test and the {kind} disagree at {alpha} "
        f"({_p_value(row['holm_p_value'])} and {_p_value(row['sign_flip_holm_p_value'])}"
        f"{_adjusted(row['num_arms'])}); the verdict is the t test's, and rests on normal differences"
    )
    needed = paired.num_seeds_needed(row["num_arms"], row["alpha"])
    if row["num_pairs"] < needed:
        sentence += f"; with fewer than {needed} pairs the other can show nothing"
    return f"{sentence}."


def _no_pair_sentences(arm: str, group: Sequence[Pair]) -> list[str]:
    """What two completed runs of the same seed differ in, so that they are no pair."""
    told = []
    unequal = [pair for pair in group if pair.problem == UNEQUAL_BUDGETS]
    if unequal:
        each = ", ".join(
            f"seed {pair.seed} (tokens {_tokens(pair.ours)}, baseline {_tokens(pair.baseline)})"
            for pair in unequal
        )
        told.append(f"{arm}: unequal budgets never compare, so these are no pairs: {each}.")
    for column, problem in SAME_WITHIN_A_PAIR.items():
        seeds = [pair.seed for pair in group if pair.problem == problem]
        if seeds:
            told.append(
                f"{arm}: {column} is not the baseline's with {_seeds(seeds)}, so the runs had more than the "
                "arm's values between them and are no pairs."
            )
    return told


def _pretrained_sentence(plan: Plan) -> str:
    if not plan.pretrained:
        return ""
    return (
        "The model is pretrained: the seed varied the order of the data and the noise of training only, not "
        "the initial weights, so the intervals say nothing about another model."
    )


def _code_sentence(trials: pa.Table) -> str:
    versions: dict[str, list[int]] = {}
    for row in confirm_rows(trials).select(["trial", "code_version"]).to_pylist():
        if row["code_version"] is not None:
            versions.setdefault(row["code_version"], []).append(row["trial"])
    if len(versions) < 2:
        return ""
    each = ", ".join(
        f"{version} ({'trials' if len(numbers) > 1 else 'trial'} {number_ranges(numbers)})"
        for version, numbers in versions.items()
    )
    return f"The runs were made by different versions of the code: {each}."


def _seed_sentences(trials: pa.Table, plan: Plan) -> list[str]:
    told = []
    rows = trials.select(["phase", "arm", "seed"]).to_pylist()
    searched = {row["seed"] for row in rows if row["phase"] == "search"}
    if used := sorted(searched & {*plan.seeds}):
        told.append(f"The search used {_seeds(used)} too: not all of these runs are fresh.")
    planned = {*plan.compared, plan.baseline}
    spare = [
        row
        for row in rows
        if row["phase"] == "confirm" and (row["arm"] not in planned or row["seed"] not in plan.seeds)
    ]
    if spare:
        told.append(f"{_count(len(spare), 'run')} of the confirm phase {_are(len(spare))} not in the plan.")
    return told


def _label(metric: str) -> str:
    return MEASURES[metric].label if metric in MEASURES else metric


def _size(value: float) -> str:
    """`0.0123`; two significant digits where four decimals would be too few."""
    return f"{value:.4f}" if value == 0 or value >= 0.001 else f"{value:.2g}"


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{_size(abs(value))}"


def _interval(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _side(difference: float) -> str:
    return "below" if difference < 0 else "above"


def _p_value(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


def _adjusted(num_arms: int) -> str:
    return f" adjusted over {num_arms} arms" if num_arms > 1 else ""


def _pairs(row: Row) -> str:
    """`n = 6`: never a spread of 0.0 where there is but one."""
    return f"n = {row['num_pairs']}"


def _tokens(row: Row | None) -> str:
    number = None if row is None else row["num_tokens"]
    return "unknown" if number is None else f"{number:,}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {number_ranges(sorted(seeds))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from raydisp import verdict_command

    return verdict_command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
