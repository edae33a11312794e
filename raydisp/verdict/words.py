"""The sentences of a verdict: rows of its tables, pairs and the plan in, text for people out."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from raydisp import paired
from raydisp.analysis import MEASURES
from raydisp.confirm.frozen_plan import Plan, confirm_rows, is_of_a_method
from raydisp.results.trial_list import number_ranges
from raydisp.verdict.pairs import SAME_WITHIN_A_PAIR, UNEQUAL_BUDGETS, Pair, Row


def plan_sentence(plan: Plan) -> str:
    arms = _count(len(plan.compared), "arm")
    return (
        f"Compared on {_label(plan.primary_outcome)} in {plan.unit}, lower is better: {arms} with the "
        f"baseline, on {_seeds(plan.seeds)}, by a plan frozen before the runs; less than "
        f"{plan.smallest_effect:g} does not matter."
    )


def outstanding_sentence(plan: Plan, pairs: Sequence[Pair]) -> str:
    number = sum(pair.is_outstanding for pair in pairs)
    if not number:
        return ""
    return (
        f"The confirm phase is not over: {number} of {_count(len(pairs), 'pair')} {_are(number)} "
        "outstanding, so no verdict is final; to stop where one looks good would make its p-value worthless."
    )


def verdict_sentence(row: Row) -> str:
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
        return (
            f"{arm} is inconclusive: {shown}, but {runs} of it diverged: the others are those that went well."
        )
    return f"{arm} is inconclusive: {shown}; neither an effect nor its absence (within {bound}) is shown."


def incomplete_sentence(row: Row) -> str:
    if not row["incomplete"]:
        return ""
    sentence = f"{row['arm']}: {row['num_pairs']} of {_count(row['num_planned'], 'pair')} complete"
    return f"{sentence}; left out: {row['incomplete']}."


def incomplete(group: Sequence[Pair]) -> str:
    """`1 diverged (seed 103), 2 never started (seeds 104, 105)`; '' where all pairs are complete."""
    problems: dict[str, list[int]] = {}
    for pair in group:
        if pair.problem:
            problems.setdefault(pair.problem, []).append(pair.seed)
    return ", ".join(f"{len(seeds)} {problem} ({_seeds(seeds)})" for problem, seeds in problems.items())


def cost_sentence(row: Row) -> str:
    costs = {"training time": row["train_s_ratio"], "peak memory": row["peak_memory_bytes_ratio"]}
    told = [f"{ratio:.2f} x the baseline's {name}" for name, ratio in costs.items() if ratio is not None]
    if not told:
        return ""
    return f"{row['arm']} takes {' and '.join(told)} (medians, {_pairs(row)})."


def condensation_sentence(row: Row) -> str:
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


def disagreement_sentence(row: Row) -> str:
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


def no_pair_sentences(arm: str, group: Sequence[Pair]) -> list[str]:
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


def pretrained_sentence(plan: Plan) -> str:
    if not plan.pretrained:
        return ""
    return (
        "The model is pretrained: the seed varied the order of the data and the noise of training only, not "
        "the initial weights, so the intervals say nothing about another model."
    )


SHOULD_BE_ONE = {
    "code_version": "versions of the code",
    "precision": "precisions",
    "device": "devices",
    "world_size": "numbers of workers",
}
"""Columns in which runs should not differ -> what they are called; a difference is said."""


def difference_sentences(trials: pa.Table) -> list[str]:
    """What the runs were not made alike in."""
    told = []
    rows = confirm_rows(trials).select(["trial", *SHOULD_BE_ONE]).to_pylist()
    for column, name in SHOULD_BE_ONE.items():
        values: dict[str, list[int]] = {}
        for row in rows:
            if row[column] is not None:
                values.setdefault(str(row[column]), []).append(row["trial"])
        if len(values) > 1:
            each = ", ".join(
                f"{value} ({'trials' if len(numbers) > 1 else 'trial'} {number_ranges(numbers)})"
                for value, numbers in values.items()
            )
            with_or_by = "by" if column == "code_version" else "with"
            told.append(f"The runs were made {with_or_by} different {name}: {each}.")
    return told


def unfair_sentences(plan: Plan) -> list[str]:
    """What else an arm differs from the baseline in, where the baseline was not tuned over it too."""
    told = []
    baseline = plan.arms[plan.baseline].values if plan.baseline in plan.arms else {}
    for name in plan.compared:
        values = plan.arms[name].values
        unfair = [field for field in values if not is_of_a_method(field) and field not in baseline]
        if unfair:
            own = " and ".join(f"{field} {values[field]}" for field in unfair)
            told.append(
                f"{name} has {own} of its own, which the baseline was not tuned over: the difference is not "
                "its method's alone."
            )
    return told


def tuned_sentences(plan: Plan) -> list[str]:
    """What both were tuned over, and came out apart in: a few trials find no optimum."""
    told = []
    baseline = plan.arms[plan.baseline].values if plan.baseline in plan.arms else {}
    for name in plan.compared:
        values = plan.arms[name].values
        apart = [
            f"{field} {_shown(values[field])} and the baseline {_shown(baseline[field])}"
            for field in values
            if not is_of_a_method(field) and field in baseline and values[field] != baseline[field]
        ]
        if apart:
            told.append(
                f"{name} was tuned to {'; '.join(apart)}: the comparison is of the two as tuned, and what a "
                "search too short for either missed is part of it."
            )
    return told


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def left_out_sentences(plan: Plan) -> list[str]:
    """Arms of the search that are not confirmed."""
    return [f"{arm} is not confirmed: {why}." for arm, why in plan.left_out.items()]


def seed_sentences(trials: pa.Table, plan: Plan) -> list[str]:
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
