"""What the search, arms and confirm sections of a study file may say beyond the types of their fields.

Each rule looks at one part of a study and returns the place in the file and a sentence, or None.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from raydisp.arms import Arms, is_dimension
from raydisp.config import StudyConfig, TrialConfig, with_fields
from raydisp.config.confirm import BASELINE
from raydisp.config.search import Range, choices_of, condition, label
from raydisp.errors import suggest
from raydisp.schedules import FRACTIONS
from raydisp.search.space import (
    MAX_GRID,
    NOT_SEARCHED,
    KeyPath,
    contains,
    describe,
    grid_size,
    is_one_of,
    number_type,
    searchable_fields,
    values_of,
)

Explain = Callable[[ValidationError, Any], str]
Problem = tuple[KeyPath, str]


def find_problem(study: StudyConfig, explain: Explain) -> Problem | None:
    """The first mistake in the search section, as the place in the file and a sentence; None: there is none.

    Args:
        explain: makes a sentence of a validation error and the tree of values that it is about.
    """
    if study.arms is not None:
        problem = _problem_of_distillation(study) or _problem_of_arms(study, explain)
    elif not study.search.space:
        return ("search", "space"), (
            "search.space is empty: there is nothing to search; name at least one field of a trial"
        )
    else:
        problem = _problem_of_distillation(study) or _problem_of_search(study, explain)
    return problem or _problem_of_confirm(study)


def _problem_of_search(study: StudyConfig, explain: Explain) -> Problem | None:
    for name, dimension in study.search.space.items():
        # What holds for a value is asked where it is searched: conditions first.
        problem = _problem_of_condition(study, name) or _problem_of_dimension(study, name, dimension, explain)
        if problem:
            return problem
    if not study.search.space:
        return None
    return (
        _problem_of_schedule(study)
        or _problem_of_sampler(study)
        or _problem_of_points(study)
        or _problem_of_scheduler(study)
    )


def _problem_of_arms(study: StudyConfig, explain: Explain) -> Problem | None:
    assert study.arms is not None
    if BASELINE not in study.arms:
        return ("arms",), (
            f"arms has no {BASELINE}: without one there is nothing to compare with; add "
            f"{BASELINE}: {{dispersion.weight: 0}}"
        )
    known = [*searchable_fields(study)]
    for arm, fields in study.arms.items():
        for name, value in fields.items():
            place: KeyPath = ("arms", arm, name)
            if name not in known and not is_dimension(value):
                why = next(
                    (
                        f"{part} is the same in all trials of a study, so that they compare"
                        for part in NOT_SEARCHED
                        if f"{name}.".startswith(f"{part}.")
                    ),
                    f"it names no field of a trial.{suggest(name, known)}",
                )
                return place, f'arms.{arm}["{name}"] cannot be set: {why}'
        problem = _problem_of_fixed(study, arm, explain)
        if problem:
            return problem
    if study.arms[BASELINE].get("dispersion.weight") != 0:
        return ("arms", BASELINE), (
            f"arms.{BASELINE} is what training without dispersion gives, and it does not set "
            "dispersion.weight to 0; add dispersion.weight: 0"
        )
    arms = Arms(study)
    for one in arms.all:
        found = _problem_of_search(one.study, explain)
        if found:
            return _in_arm(study, one.name, found)
    return _problem_of_several(study, arms)


def _problem_of_fixed(study: StudyConfig, arm: str, explain: Explain) -> Problem | None:
    """Values that an arm sets, one by one and then together."""
    assert study.arms is not None
    fixed = {name: value for name, value in study.arms[arm].items() if not is_dimension(value)}
    for name, value in fixed.items():
        problem = _problem_with(study, {name: value}, explain)
        if problem and len(fixed) == 1:
            return ("arms", arm, name), (
                f'arms.{arm}["{name}"] = {json.dumps(value)} is not allowed: {problem}'
            )
    problem = _problem_with(study, fixed, explain)
    return (("arms", arm), f"arms.{arm} is not allowed: {problem}") if problem else None


def _in_arm(study: StudyConfig, arm: str, problem: Problem) -> Problem:
    """A mistake found in the space of an arm, with its place in the file."""
    assert study.arms is not None
    (*place, sentence) = (*problem[0], problem[1])
    if place[:2] == ["search", "space"] and len(place) > 2 and place[2] in study.arms[arm]:
        name = place[2]
        sentence = str(sentence).replace(f'search.space["{name}"]', f'arms.{arm}["{name}"]')
        return ("arms", arm, *place[2:]), sentence
    return tuple(place), f"in arm {arm}, {sentence}"


def _problem_of_several(study: StudyConfig, arms: Arms) -> Problem | None:
    """What would give searched arms unequal numbers of trials, or cannot be split among them."""
    search = study.search
    names = {name for arm in arms.all for name in arm.study.search.space}
    for index, point in enumerate(search.points_to_evaluate):
        for name in point:
            if name not in names:
                return ("search", "points_to_evaluate", index), (
                    f'search.points_to_evaluate[{index}] names "{name}", which no arm searches.'
                    f"{suggest(name, names)}"
                )
    if len(arms.searched) > 1 and search.stop_when is not None:
        return ("search", "stop_when"), (
            f"search.stop_when is given with {len(arms.searched)} searched arms, each of which gets the same "
            "number of trials, so that none is tuned more than another; leave it out"
        )
    return None


def _problem_of_distillation(study: StudyConfig) -> Problem | None:
    """What a teacher decides, and what means nothing without one."""
    places: list[KeyPath] = [("search", "space", name) for name in study.search.space]
    places += [("arms", arm, name) for arm, fields in (study.arms or {}).items() for name in fields]
    for place in places:
        name = str(place[-1])
        if study.distillation.teacher is None and name.startswith("distillation."):
            return place, (
                f"{name} varies between trials, and there is no distillation.teacher; name one, "
                "such as {source: hub, id: gpt2}, or leave it out"
            )
        if study.distillation.teacher is not None and name == "model.vocab_size":
            return place, (
                "model.vocab_size varies between trials, and a student has the vocabulary of its teacher "
                "(distillation.teacher); leave it out"
            )
    return None


def _unpairs(name: str) -> bool:
    """Whether two trials that differ in a field have other initial weights, data or batches."""
    part = name.split(".")[0]
    return (
        part == "data" or name == "train.global_batch_tokens" or (part == "model" and name != "model.dropout")
    )


def _problem_of_confirm(study: StudyConfig) -> Problem | None:
    confirm = study.confirm
    if confirm is None:
        return None
    if len(study.search.objectives) > 1:
        return ("confirm",), (
            "confirm tests the best configurations by one objective, and search.objective names "
            f"{len(study.search.objectives)}; name one"
        )
    if confirm.spread is not None and confirm.spread_from is not None:
        return ("confirm", "spread_from"), (
            "confirm.spread and confirm.spread_from both say how far seeds differ; keep one of them"
        )
    arms = Arms(study)
    for arm in arms.all:
        for name in [*arm.study.search.space, *arm.fixed]:
            if _unpairs(name):
                place = ("arms", arm.name, name) if name in (study.arms or {}).get(arm.name, {}) else None
                return place or ("search", "space", name), (
                    f"{name} varies between trials, and the confirm phase pairs runs that have the same "
                    "initial weights, data and batches; leave it out, or leave out confirm"
                )
    searched = [arm for arm in arms.searched if arm.may_disperse]
    for arm in searched:
        for index in range(1, confirm.top_k + 1 if confirm.top_k > 1 else 1):
            if f"{arm.name}_{index}" in (study.arms or {}):
                return ("arms", f"{arm.name}_{index}"), (
                    f"arms.{arm.name}_{index} has the name of a configuration of {arm.name} that is "
                    f"confirmed (confirm.top_k = {confirm.top_k}); choose another name"
                )
    if confirm.top_k > study.search.num_trials and searched:
        return ("confirm", "top_k"), (
            f"confirm.top_k = {confirm.top_k} is more than search.num_trials = {study.search.num_trials}; "
            "lower it"
        )
    return None


def _problem_of_dimension(study: StudyConfig, name: str, dimension: Any, explain: Explain) -> Problem | None:
    fields = searchable_fields(study)
    place: KeyPath = ("search", "space", name)
    shown = f'search.space["{name}"]'
    if name not in fields:
        fixed = next((part for part in NOT_SEARCHED if f"{name}.".startswith(f"{part}.")), None)
        if fixed:
            reason = f"{fixed} is the same in all trials of a study, so that they compare"
        else:
            reason = f"it names no field of a trial.{suggest(name, fields)}"
        return place, f"{shown} cannot be searched: {reason}"
    if isinstance(dimension, Range):
        kind = number_type(fields[name])
        if kind is None:
            return place, f"{shown} is a range, but {name} is not a number; give a list of its values"
        for part in ("low", "high", "step"):
            end = getattr(dimension, part)
            if kind is int and isinstance(end, float) and not end.is_integer():
                return (*place, part), f"{shown}.{part} = {end} is not a whole number, and {name} is one"
    elif len({label(value) for value in values_of(dimension)}) < len(values_of(dimension)):
        return place, f"{shown} names a value twice; keep one of each"
    for where in _where_searched(study, name):
        for key, value in _corners(dimension):
            problem = _problem_with(study, {**where, name: value}, explain)
            if problem:
                at = f"{shown}[{key}]" if isinstance(key, int) else f"{shown}.{key}"
                return (*place, key), f"{at} = {json.dumps(value)} is not allowed: {problem}"
    return None


def _where_searched(study: StudyConfig, name: str) -> Iterator[dict[str, Any]]:
    """Values of other fields with which a dimension is searched: all combinations that a condition names."""
    parents = condition(study.search.space[name])
    for values in itertools.product(*parents.values()):
        above = [next(_where_searched(study, parent)) for parent in parents]
        yield {key: value for one in above for key, value in one.items()} | dict(
            zip(parents, values, strict=True)
        )


def _problem_of_condition(study: StudyConfig, name: str) -> Problem | None:
    """A condition may look at dimensions that stand before its own, and at values that they can have."""
    place: KeyPath = ("search", "space", name, "when")
    shown = f'search.space["{name}"].when'
    names = list(study.search.space)
    before = names[: names.index(name)]
    for parent, values in condition(study.search.space[name]).items():
        if parent not in before:
            known = f"; before it stand {', '.join(before)}" if before else "; it is the first"
            where = "stands after it: move it up" if parent in names else "is not searched"
            return place, f'{shown} looks at "{parent}", which {where}{known}.{suggest(parent, before)}'
        choices = choices_of(study.search.space[parent])
        if choices is None:
            return place, f'{shown} looks at "{parent}", which is a range; a condition needs a list of values'
        allowed = {label(choice) for choice in choices}
        for value in values:
            if label(value) not in allowed:
                told = ", ".join(map(str, choices))
                return place, f'{shown}["{parent}"] = {json.dumps(value)} is not one of its values ({told})'
    return None


def _problem_of_schedule(study: StudyConfig) -> Problem | None:
    """A fraction of one schedule is searched with that schedule alone."""
    schedules = choices_of(study.search.space.get("dispersion.schedule", [])) or []
    for setting, schedule in FRACTIONS.items():
        name = f"dispersion.{setting}"
        dimension = study.search.space.get(name, [])
        others = [other for other in schedules if other != schedule]
        if name in study.search.space and others and "dispersion.schedule" not in condition(dimension):
            return ("search", "space", name), (
                f'search.space["{name}"] is of schedule {schedule} alone, and dispersion.schedule may be '
                f"{', '.join(others)} too; add when: {{dispersion.schedule: [{schedule}]}}"
            )
    return None


def _problem_of_sampler(study: StudyConfig) -> Problem | None:
    search, place = study.search, ("search", "sampler")
    ranges = {name: dim for name, dim in search.space.items() if isinstance(dim, Range)}
    if search.sampler == "cma-es":
        if len(search.space) < 2:
            return place, "search.sampler = cma-es needs at least two searched fields; use tpe, random or qmc"
        for name, dimension in search.space.items():
            if name not in ranges or condition(dimension):
                why = "has a condition" if name in ranges else "is a list of values"
                return place, (
                    f"search.sampler = cma-es needs a space of ranges, and {name} {why}; use tpe, random or "
                    "qmc"
                )
    if search.sampler != "grid":
        return None
    fields = searchable_fields(study)
    for name, dimension in ranges.items():
        whole = number_type(fields[name]) is int and not dimension.log
        if dimension.step is None and not whole:
            return place, (
                f"search.sampler = grid needs values one by one, and {name} is a range without steps; give "
                "it a step, or a list of values"
            )
    size = grid_size(study)
    if size > MAX_GRID:
        return place, (
            f"search.sampler = grid has up to {size:,} combinations, more than {MAX_GRID:,}; name fewer "
            "values, or use random or qmc"
        )
    if search.num_trials > size:
        return ("search", "num_trials"), (
            f"search.num_trials = {search.num_trials} is more than the {size} combinations of the grid; "
            "lower it, or widen search.space"
        )
    return None


def _problem_of_points(study: StudyConfig) -> Problem | None:
    search = study.search
    if search.points_to_evaluate and search.sampler == "grid":
        return ("search", "points_to_evaluate"), (
            "search.points_to_evaluate is given with sampler = grid, which visits every point anyway; leave "
            "it out"
        )
    for index, point in enumerate(search.points_to_evaluate):
        place: KeyPath = ("search", "points_to_evaluate", index)
        shown = f"search.points_to_evaluate[{index}]"
        for name, value in point.items():
            if name not in search.space:
                hint = suggest(name, search.space)
                return place, f'{shown} names "{name}", which is not in search.space.{hint}'
            if not contains(study, name, value):
                return place, (
                    f'{shown}["{name}"] = {json.dumps(value)} is outside search.space '
                    f"({describe(search.space[name])})"
                )
            for parent, values in condition(search.space[name]).items():
                if parent in point and not is_one_of(point[parent], values):
                    return place, (
                        f'{shown} gives "{name}", which is searched only where {parent} is '
                        f"{' or '.join(map(str, values))}, and it is {point[parent]}; leave it out"
                    )
    return None


def _problem_of_scheduler(study: StudyConfig) -> Problem | None:
    """Trials compare at equal tokens: every trial must be evaluated at every rung."""
    rule = study.search.stopping
    if rule is None:
        return None
    place: KeyPath = ("search", "scheduler", study.search.scheduler_name)
    shown = f"search.scheduler.{study.search.scheduler_name}"
    every = study.evaluate.every_tokens
    if every is None:
        return place, (
            f"{shown} decides at evaluations, and evaluate.every_tokens is null; give it, as a part of "
            f"grace_tokens = {rule.grace_tokens}"
        )
    batches = [study.train.global_batch_tokens]
    dimension = study.search.space.get("train.global_batch_tokens")
    if isinstance(dimension, Range):
        return ("search", "space", "train.global_batch_tokens"), (
            f'search.space["train.global_batch_tokens"] is a range, and {shown} compares trials at equal '
            "tokens, which they then do not reach; give a list of values that divide evaluate.every_tokens"
        )
    if dimension is not None:
        batches = [int(value) for value in values_of(dimension)]
        for batch in batches:
            if every % batch:
                return ("search", "space", "train.global_batch_tokens"), (
                    f"{shown} compares trials at equal tokens, and evaluate.every_tokens = {every} is no "
                    f"multiple of train.global_batch_tokens = {batch}; change one of them"
                )
    between = -(-every // batches[0]) * batches[0]
    if rule.grace_tokens % between:
        below = rule.grace_tokens // between * between
        near = f"{below} or {below + between}" if below else f"{between}"
        return (*place, "grace_tokens"), (
            f"{shown}.grace_tokens = {rule.grace_tokens} is not a multiple of the {between} tokens between "
            f"two evaluations; the nearest that is: {near}"
        )
    if rule.grace_tokens >= study.num_steps * study.train.global_batch_tokens:
        return (*place, "grace_tokens"), (
            f"{shown}.grace_tokens = {rule.grace_tokens} is not below train.budget_tokens = "
            f"{study.train.budget_tokens}, so no trial would ever be stopped; lower it, or use scheduler: "
            "none"
        )
    return None


def _corners(dimension: Any) -> Iterator[tuple[str | int, Any]]:
    """The values that are tried out against the rules: both ends of a range, every entry of a list."""
    if isinstance(dimension, Range):
        yield from (("low", dimension.low), ("high", dimension.high))
    else:
        yield from enumerate(values_of(dimension))


def _problem_with(study: StudyConfig, values: dict[str, Any], explain: Explain) -> str | None:
    tree = with_fields(study.trial, values)
    try:
        trial = TrialConfig.model_validate(tree)
    except ValidationError as error:
        return explain(error, tree)
    for workers in (study.resources.min_workers, study.resources.max_workers):
        if trial.sequences_per_step % workers:
            return f"resources.num_workers = {workers} cannot share its batch evenly"
    return None
