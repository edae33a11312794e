"""What a confirm phase is going to test, settled when the search is over and before any of its runs.

A search keeps the luckiest of many trials on one seed, so its scores say nothing about an effect. The best
configurations and every other arm run again (`raydisp.confirm.runs`) by a plan that has been written down:
arms, seeds, outcome, test and the smallest effect that matters. From then on neither search nor plan changes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydisp import paired, results, storage
from raydisp.analysis import describe_trial, value_of
from raydisp.arms import SEARCH, Arm, Arms
from raydisp.config import StudyConfig
from raydisp.config.confirm import BASELINE
from raydisp.config.model import ScratchModel
from raydisp.config.section import MAX_SEED
from raydisp.confirm.frozen_plan import FILE, PLAN_VERSION, Frozen, FrozenArm, is_of_a_method
from raydisp.errors import OutputError, RaydispError, VerdictError
from raydisp.paired import ALPHA
from raydisp.search import space
from raydisp.search.agenda import Row
from raydisp.search.stopping import full_tokens

IMPLICIT_ARM = "dispersion"
"""What the best configurations of a study without arms are called."""


class NothingToConfirmError(RaydispError):
    """The search has not found what the confirm phase would run."""


def num_arms(study: StudyConfig) -> int:
    """Arms beside the baseline that the confirm phase has at the most."""
    assert study.confirm is not None
    return sum(
        study.confirm.top_k if arm.searched and arm.may_disperse else 1
        for arm in Arms(study).all
        if not arm.is_baseline
    )


def num_seeds(study: StudyConfig, arms: int) -> int:
    """Seeds of each arm: as the file has it, or as many as the sign-flip test needs to speak."""
    assert study.confirm is not None
    return study.confirm.num_seeds or paired.num_seeds_needed(arms)


def known_spread(study: StudyConfig) -> float | None:
    """The spread that the file gives, or that it says where to find; None: it says nothing.

    Raises:
        OutputError: there is none where it points to.
    """
    from raydisp import verdict

    assert study.confirm is not None
    origin = study.confirm.spread_from
    if origin is None:
        return study.confirm.spread
    try:
        found = verdict.largest_spread(results.read_table(origin, "trials"))
    except VerdictError:
        found = None
    if found is None:
        raise OutputError(
            f"confirm.spread_from names {origin}, which has no confirm phase with two seeds or more of an "
            "arm and its baseline; name another results folder, or give confirm.spread"
        )
    return found


def freeze(study: StudyConfig, trials: pa.Table) -> Frozen:
    """What the confirm phase runs and decides, by the rows of the search.

    Raises:
        NothingToConfirmError: an arm has no configuration to confirm, or the study is broken.
    """
    settings = study.confirm
    assert settings is not None
    rows = trials.filter(pc.equal(trials["phase"], "search")).to_pylist()
    _refuse_broken(study, rows)
    arms = Arms(study)
    chosen: dict[str, FrozenArm] = {}
    left_out: dict[str, str] = {}
    for arm in sorted(arms.all, key=lambda arm: not arm.is_baseline):
        found = _choose(study, arm, rows)
        if isinstance(found, dict):
            chosen |= found
        else:
            left_out[arm.name] = found
    if BASELINE in left_out or len(chosen) < 2:
        why = "; ".join(dict.fromkeys(left_out.values()))
        raise NothingToConfirmError(
            f"{why}; see the trials' errors, then raise search.num_trials or use --retry-failed"
        )
    used = {row["seed"] for row in rows} | {study.seed} | _seeds_seen_before(study)
    m = len(chosen) - 1
    seeds = _fresh_seeds(study.seed, used, num_seeds(study, m))
    spread = known_spread(study)
    return Frozen(
        schema_version=PLAN_VERSION,
        study=study.name,
        primary_outcome="test_loss",
        unit="nats per token",
        baseline=BASELINE,
        alpha=ALPHA,
        frozen_at=results.now().isoformat(timespec="seconds"),
        hypotheses=[
            f"the mean over seeds of test_loss({name}) - test_loss({BASELINE}) is 0"
            for name in chosen
            if name != BASELINE
        ],
        smallest_effect=settings.smallest_effect,
        seeds=seeds,
        arms=chosen,
        pretrained=not isinstance(study.model, ScratchModel),
        spread=spread,
        promise=None
        if spread is None
        else dataclasses.asdict(paired.promise(spread, len(seeds), m, settings.smallest_effect)),
        num_search_trials=study.search.num_trials,
        confirm=settings,
        # Beyond all that there are: a search may have been longer once.
        first_trial=max([arms.num_trials, *(row["trial"] + 1 for row in rows)]),
        left_out=left_out,
        data_sha256=next((row["data_sha256"] for row in rows if row["data_sha256"] is not None), None),
    )


def _refuse_broken(study: StudyConfig, rows: Sequence[Row]) -> None:
    failed = [row for row in rows if row["status"] == "failed"]
    limit = study.failures.max_failed_trials
    if limit is not None and len(failed) > limit:
        raise NothingToConfirmError(
            f"{len(failed)} trials of the search failed, more than failures.max_failed_trials = {limit}; "
            "mend what is broken and run the command with --retry-failed"
        )


def _choose(study: StudyConfig, arm: Arm, rows: Sequence[Row]) -> dict[str, FrozenArm] | str:
    """Confirm arm -> configuration: the best of a searched arm, or what an arm that is not searched says.

    Returns:
        Or why there is none.
    """
    name = arm.name
    if study.arms is None and arm.name == SEARCH and arm.may_disperse:
        name = IMPLICIT_ARM
    if not arm.searched:
        told = ", ".join(f"{field} {value}" for field, value in arm.fixed.items())
        return {name: FrozenArm(arm=arm.name, from_trial=None, values=arm.fixed, description=told)}
    ours = [row for row in rows if row["arm"] == arm.name]
    objective, full = study.search.primary, full_tokens(study)
    scored: dict[str, tuple[float, Row]] = {}
    for row in sorted(ours, key=lambda row: row["trial"]):
        value = value_of(row, objective.metric)
        config = json.loads(row["config_json"])
        if value is None or row["num_tokens"] != full:
            continue
        if arm.may_disperse and config["dispersion"]["weight"] == 0:
            continue
        scored.setdefault(row["config_sha256"], (value if objective.mode == "min" else -value, row))
    best = sorted(scored.values(), key=lambda pair: (pair[0], pair[1]["trial"]))
    assert study.confirm is not None
    best = best[: study.confirm.top_k if arm.may_disperse else 1]
    if not best:
        counts = collections.Counter(row["status"] for row in ours)
        told = ", ".join(f"{number} {status}" for status, number in counts.items()) or "none has ended"
        return (
            f"no trial of {'the search' if arm.name == SEARCH else f'arm {arm.name}'} completed its {full:,} "
            f"tokens with a {objective.metric}{' and a weight other than 0' if arm.may_disperse else ''} "
            f"({told})"
        )
    chosen = {}
    for index, (_, row) in enumerate(best, start=1):
        searched = space.searched_values(arm.study, json.loads(row["config_json"]))
        chosen[name if len(best) == 1 else f"{name}_{index}"] = FrozenArm(
            arm=arm.name,
            from_trial=row["trial"],
            values={**arm.fixed, **searched},
            description=describe_trial(row, list(searched)),
        )
    return chosen


def _seeds_seen_before(study: StudyConfig) -> set[int]:
    """Seeds of the studies that this one knows, their confirm phases included: what was picked or changed
    with their results in view is tested on others."""
    seen: set[int] = set()
    for origin in study.search.warm_start:
        seen |= set(results.read_table(origin, "trials")["seed"].to_pylist())
    return seen


def _fresh_seeds(seed: int, used: set[int], number: int) -> list[int]:
    fresh: list[int] = []
    candidate = seed
    while len(fresh) < number:
        candidate = (candidate + 1) % (MAX_SEED + 1)
        if candidate not in used:
            fresh.append(candidate)
    return fresh


def describe(study: StudyConfig) -> list[str]:
    """The plan of the phase in lines, for people, before anything runs."""
    settings = study.confirm
    if settings is None:
        return []
    m = num_arms(study)
    n = num_seeds(study, m)
    tokens = (m + 1) * n * full_tokens(study)
    lines = [
        f"{n} fresh seeds x {m + 1} arms = {n * (m + 1)} trials, {tokens:,} training tokens; outcome "
        "test_loss, on test text that nothing else sees",
        f"paired t-test, Holm over {m} arm{'s' if m > 1 else ''} at {ALPHA:g}; smallest effect that matters "
        f"{settings.smallest_effect:g} nats per token",
    ]
    spread = known_spread(study)
    if spread is None:
        lines.append("power: not known without a spread; give confirm.spread, or confirm.spread_from")
    else:
        promise = paired.promise(spread, n, m, settings.smallest_effect)
        lines.append(
            f"with a spread of {spread:.3g} nats over seeds: an effect of {promise.effect_shown:.3g} is "
            f"shown with {paired.PROMISED_POWER:.0%} chance, one of {settings.smallest_effect:g} with "
            f"{promise.power:.0%}; where there is none, that is found with {promise.no_effect_chance:.0%}"
        )
    return lines


def warnings(study: StudyConfig) -> list[str]:
    """What is allowed and limits what can be said."""
    if study.confirm is None:
        return []
    m = num_arms(study)
    n, needed = num_seeds(study, m), paired.num_seeds_needed(m)
    found = []
    if n < needed:
        found.append(
            f"with confirm.num_seeds = {n} the exact sign-flip test cannot reach {ALPHA:g} after Holm for "
            f"{m} arm{'s' if m > 1 else ''}: its smallest p-value is {min(1.0, 2 * m / 2**n):.3g}; {needed} "
            "seeds could"
        )
    arms = Arms(study).all
    tuned = {name for arm in arms if arm.is_baseline for name in arm.study.search.space}
    for arm in arms:
        unfair = [name for name in arm.study.search.space if not is_of_a_method(name) and name not in tuned]
        if unfair:
            who = "dispersion" if arm.name == SEARCH else arm.name
            found.append(
                f"{' and '.join(unfair)} is tuned for {who} and not for the baseline, which is unfair to the "
                "baseline; name the arms (arms:) with what all of them tune in search.space"
            )
    return found


def refuse_changes(study: StudyConfig, frozen: Frozen, study_dir: str) -> None:
    """A plan that has been settled is not changed by what came out, or by a longer search.

    Raises:
        OutputError: the study file asks for another one.
    """
    place = storage.join(study_dir, FILE)
    rest = "restore the file, or start a new study that knows the old trials, with --fork NAME"
    settings = study.confirm
    if settings is None:
        raise OutputError(f"{place} was settled, and the study file has no confirm section any more; {rest}")
    changed: list[tuple[str, Any, Any]] = []
    if study.search.num_trials != frozen.num_search_trials:
        changed.append(("search.num_trials", frozen.num_search_trials, study.search.num_trials))
    was_settled, now_asked = frozen.confirm.model_dump(), settings.model_dump()
    for name, was in was_settled.items():
        if now_asked[name] != was:
            changed.append((f"confirm.{name}", was, now_asked[name]))
    if changed:
        told = "; ".join(f"{name} ({json.dumps(was)} -> {json.dumps(now)})" for name, was, now in changed)
        raise OutputError(f"{place} was settled before its runs, and this differs from it: {told}; {rest}")
