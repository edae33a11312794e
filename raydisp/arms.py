"""The arms of a study: what is compared, and which trial belongs to which.

A study that names no arms has two: the baseline (weight 0), one trial, and `search`, whose trials vary what
`search.space` says. Where the file names them, every arm varies the shared fields of `search.space` (the
learning rate of the baseline too: an untuned baseline is unfair) and those that it names itself, each with
the same number of trials; an arm with nothing to vary is one trial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from raydisp.config import StudyConfig, replace_fields
from raydisp.config.confirm import BASELINE
from raydisp.config.search import Choices, Range, condition, label

SEARCH = "search"
"""The arm of the trials of a study that names no arms."""

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things that a study compares."""

    name: str
    fixed: Values
    """Fields that it sets: dotted name -> value."""
    study: StudyConfig
    """The study as this arm sees it: its fields set, its own space, no arms."""

    @property
    def is_baseline(self) -> bool:
        """Whether the others are compared with it."""
        return self.name == BASELINE

    @property
    def searched(self) -> bool:
        """Whether there is anything to search."""
        return bool(self.study.search.space)

    @property
    def may_disperse(self) -> bool:
        """Whether any of its trials may have the dispersion term."""
        return "dispersion.weight" in self.study.search.space or self.study.dispersion.weight != 0.0


class Arms:
    """The arms of a study, and the numbers of their trials in its search.

    Arms with nothing to search come first, one number each; those that are searched take turns, so that none
    is ahead of another by more than a trial, and so that a search may go on for longer. The study without
    arms has its baseline as 0 and search trials from 1.
    """

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        if study.arms is None:
            baseline = _arm(study, BASELINE, {"dispersion.weight": 0.0}, {})
            self.all = [baseline, Arm(SEARCH, {}, _plain(study, study.search.space))]
        else:
            self.all = [_explicit(study, name) for name in study.arms]
        self.fixed = [arm for arm in self.all if not arm.searched]
        self.searched = [arm for arm in self.all if arm.searched]
        self._by_name = {arm.name: arm for arm in self.all}

    def __getitem__(self, name: str) -> Arm:
        """Raises: KeyError: there is no arm of this name."""
        return self._by_name[name]

    @property
    def fixed_trials(self) -> range:
        """Numbers of the trials of arms that are not searched."""
        return range(len(self.fixed))

    @property
    def search_trials(self) -> range:
        """Numbers of the trials that a sampler suggests."""
        first = len(self.fixed)
        return range(first, first + len(self.searched) * self.study.search.num_trials)

    @property
    def num_trials(self) -> int:
        """Of the whole search."""
        return len(self.fixed) + len(self.searched) * self.study.search.num_trials

    def of(self, trial: int) -> Arm:
        """The arm that a trial of the search belongs to."""
        if trial < len(self.fixed):
            return self.fixed[trial]
        return self.searched[(trial - len(self.fixed)) % len(self.searched)]

    def index(self, trial: int) -> int:
        """Which of its arm's search trials this is, from 1."""
        return (trial - len(self.fixed)) // len(self.searched) + 1


def is_dimension(value: Any) -> bool:
    """Whether what an arm says of a field is something to search, and not a value."""
    return isinstance(value, Range | Choices)


def dimensions(study: StudyConfig) -> dict[str, Any]:
    """All fields that are searched in any arm, in the order of the file: dotted name -> dimension."""
    found = dict(study.search.space)
    for fields in (study.arms or {}).values():
        for name, value in fields.items():
            if is_dimension(value):
                found.setdefault(name, value)
    return found


def _explicit(study: StudyConfig, name: str) -> Arm:
    assert study.arms is not None
    fields = study.arms[name]
    fixed = {field: value for field, value in fields.items() if not is_dimension(value)}
    own = {field: value for field, value in fields.items() if is_dimension(value)}
    shared = _shared(study.search.space, fixed, own)
    # A condition looks at what stands before it, so what looks at a field of the arm's own comes behind that.
    behind: set[str] = set()
    for field, dimension in shared.items():
        if any(parent in own or parent in behind for parent in condition(dimension)):
            behind.add(field)
    before = {field: shared[field] for field in shared if field not in behind}
    after = {field: shared[field] for field in shared if field in behind}
    return _arm(study, name, fixed, {**before, **own, **after})


def _shared(space: Mapping[str, Any], fixed: Values, own: Mapping[str, Any]) -> Values:
    """The shared fields that mean something in an arm: not those it sets, nor any of a term of weight 0, nor
    those whose condition cannot hold."""
    off = [part for part in ("dispersion", "distillation") if fixed.get(f"{part}.weight") == 0]
    kept: Values = {}
    for name, dimension in space.items():
        if name in fixed or name in own or name.split(".")[0] in off:
            continue
        open_conditions = {}
        for parent, values in condition(dimension).items():
            if parent in fixed:
                if not any(label(fixed[parent]) == label(value) for value in values):
                    break
            elif parent in kept or parent in own:
                open_conditions[parent] = values
            else:
                break  # it looks at one that is not searched here, and would never be
        else:
            kept[name] = _with_condition(dimension, open_conditions)
    return kept


def _with_condition(dimension: Any, conditions: Mapping[str, Any]) -> Any:
    if conditions == condition(dimension):
        return dimension
    return dimension.model_copy(update={"when": dict(conditions) or None})


def _arm(study: StudyConfig, name: str, fixed: Values, space: Values) -> Arm:
    trial = replace_fields(study.trial, fixed)
    parts = {part: getattr(trial, part) for part in type(trial).model_fields}
    return Arm(name, fixed, _plain(study, space).model_copy(update=parts))


def _plain(study: StudyConfig, space: Mapping[str, Any]) -> StudyConfig:
    points = [
        {name: value for name, value in point.items() if name in space}
        for point in study.search.points_to_evaluate
    ]
    search = study.search.model_copy(update={"space": dict(space), "points_to_evaluate": points})
    return study.model_copy(update={"search": search, "arms": None, "confirm": None})
