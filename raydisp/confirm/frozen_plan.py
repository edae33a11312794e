"""The plan of a confirm phase: in `confirm.yaml`, and the same on each of its rows.

It is frozen before the first run; `planning` makes it, and a verdict needs nothing else but the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from raydisp import storage
from raydisp.config.confirm import ConfirmConfig
from raydisp.config.section import Section
from raydisp.errors import OutputError, VerdictError
from raydisp.results import TRIAL_COLUMNS, latest_attempts
from raydisp.results.trial_list import number_ranges
from raydisp.studyfile import explain

PLAN_VERSION: Literal[1] = 1
CONFIRM = "confirm"
FILE = "confirm.yaml"

TEST = (
    "paired Student t over seeds, two-sided, Holm over the arms at alpha; beside it the exact sign-flip "
    "test; no effect that matters where the 90 % interval lies within +-smallest_effect (two one-sided tests)"
)


METHODS = ("dispersion", "noisy_embedding", "active_forgetting", "distillation")
"""Sections of a trial that are what is compared; all else should be the same, or tuned alike."""


def is_of_a_method(name: str) -> bool:
    """Whether a field, by its dotted name, belongs to a method that is compared."""
    return name.split(".")[0] in METHODS


class PlannedArm(Section):
    """One configuration that is run on every seed."""

    model_config = ConfigDict(extra="ignore")

    from_trial: int | None = None
    """Of the search; None: it was not searched."""
    description: str = ""
    values: dict[str, Any] = Field(default_factory=dict)
    """Fields that differ from the study file."""


class Plan(Section):
    """What was frozen before the runs, as far as a verdict needs it; `confirm_plan.Frozen` has the rest."""

    model_config = ConfigDict(extra="ignore")

    schema_version: Literal[1]
    primary_outcome: str
    """A numeric column of `trials`; lower is better."""
    unit: str
    baseline: str
    """Name of the arm that the others are compared with."""
    arms: Mapping[str, PlannedArm]
    """By name, in the plan's order, the baseline among them."""
    seeds: Annotated[list[int], Field(min_length=1)]
    smallest_effect: Annotated[float, Field(gt=0.0)]
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)]
    pretrained: bool
    """The model was not trained from scratch: its initial weights do not depend on the seed."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Arms of the search that are not confirmed -> why."""

    @field_validator("primary_outcome")
    @classmethod
    def _is_a_measure(cls, value: str) -> str:
        if TRIAL_COLUMNS.get(value) != pa.float64():
            raise ValueError("is not a column of trials that holds numbers, such as test_loss")
        return value

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"seeds = {value} names a seed twice")
        return value

    @model_validator(mode="after")
    def _compares_something(self) -> Plan:
        if not self.compared:
            raise ValueError(f"arms has none beside {self.baseline}, so that nothing is compared")
        return self

    @property
    def compared(self) -> list[str]:
        """The arms that are compared with the baseline, in the plan's order."""
        return [arm for arm in self.arms if arm != self.baseline]


class FrozenArm(PlannedArm):
    """All that `confirm.yaml` says of an arm."""

    model_config = ConfigDict(extra="forbid")

    arm: str
    """That it had in the search."""


class Frozen(Plan):
    """What `confirm.yaml` says, and every row of the phase."""

    model_config = ConfigDict(extra="forbid")

    study: str
    frozen_at: str
    hypotheses: list[str]
    test: str = TEST
    arms: Mapping[str, FrozenArm]
    spread: float | None
    """Standard deviation over seeds of the paired difference, as known before; null: it was not."""
    promise: dict[str, float] | None
    """What the runs can be expected to show, given the spread."""
    num_search_trials: int
    """`search.num_trials`, when the search was over."""
    confirm: ConfirmConfig
    """The section of the study file."""
    first_trial: int
    data_sha256: str | None
    """Of the data of the search."""

    @property
    def num_trials(self) -> int:
        """Runs of the phase."""
        return len(self.arms) * len(self.seeds)

    def trials(self) -> dict[int, tuple[str, int]]:
        """Number -> arm and seed: the arms of a seed stand side by side."""
        pairs = [(arm, seed) for seed in self.seeds for arm in self.arms]
        return {self.first_trial + index: pair for index, pair in enumerate(pairs)}

    def headline(self) -> str:
        """One line: what is about to run, and why."""
        arms = ", ".join(
            name + (f" (trial {one.from_trial})" if one.from_trial is not None else "")
            for name, one in self.arms.items()
        )
        return (
            f"Confirming {arms} on {len(self.seeds)} fresh seeds each, {self.num_trials} runs, as settled in "
            f"{FILE}."
        )

    def keeps_model(self, seed: int) -> bool:
        """Whether the weights of the runs on a seed are kept."""
        return self.confirm.keep_models == "all" or (
            self.confirm.keep_models == "first_seed" and seed == self.seeds[0]
        )

    def to_json(self) -> str:
        """As it stands on every row."""
        return json.dumps(self.model_dump(mode="json"))  # in the order of the arms


# --- on the rows -----------------------------------------------------------------------------------------


def confirm_rows(trials: pa.Table) -> pa.Table:
    """The rows of the confirm phase, the latest attempt of each trial."""
    return latest_attempts(trials.filter(pc.equal(trials["phase"], CONFIRM)))


def read_plan(trials: pa.Table) -> Plan:
    """The plan that the confirm rows of a study carry.

    Raises:
        VerdictError: there are no such rows, they carry no plan or several, or it is not one of ours.
    """
    rows = confirm_rows(trials)
    if rows.num_rows == 0:
        raise VerdictError(
            "there is no run of a confirm phase among these trials; a study has one where its file has a "
            "section `confirm`"
        )
    numbers: dict[str | None, list[int]] = {}
    for row in rows.select(["trial", "confirm_json"]).to_pylist():
        numbers.setdefault(row["confirm_json"], []).append(row["trial"])
    if None in numbers:
        raise VerdictError(
            f"confirm_json is null in trial {number_ranges(numbers[None])}: without the plan that was frozen "
            "before the runs there is nothing to judge them by"
        )
    if len(numbers) > 1:
        each = " and ".join(f"trials {number_ranges(of_plan)}" for of_plan in numbers.values())
        raise VerdictError(
            f"confirm_json differs between {each}: runs of different plans are not judged together"
        )
    return parse_plan(str(next(iter(numbers))))


def parse_plan(text: str) -> Plan:
    """A plan from its JSON.

    Raises:
        VerdictError: it is not one, or of a newer raydisp.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise VerdictError(f"confirm_json is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise VerdictError(f"confirm_json must be an object, not {tree!r:.60}")
    version = tree.get("schema_version")
    if isinstance(version, int) and version > PLAN_VERSION:
        raise VerdictError(
            f"confirm_json was written by a newer raydisp (schema_version {version}, this one knows "
            f"{PLAN_VERSION}); update raydisp to read it"
        )

    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise VerdictError(f"confirm_json: {_explain(error, tree)}") from None


# --- in the results folder -------------------------------------------------------------------------------


def write_frozen(study_dir: str, frozen: Frozen) -> None:
    """Write `confirm.yaml`, before any of its runs."""
    text = yaml.safe_dump(frozen.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    head = (
        "# Settled when the search was over, before any confirm run. It does not change: a new plan is a\n"
        "# new study (--fork NAME).\n"
    )
    storage.write_bytes(storage.join(study_dir, FILE), (head + text).encode())


def frozen_of_rows(trials: pa.Table) -> Frozen | None:
    """The plan that the rows of a confirm phase carry; None: there are no such rows.

    Raises:
        VerdictError: they carry none, several, or not one of ours.
    """
    if confirm_rows(trials).num_rows == 0:
        return None
    read_plan(trials)
    tree = json.loads(confirm_rows(trials)["confirm_json"][0].as_py())
    try:
        return Frozen.model_validate(tree)
    except ValidationError as error:
        raise VerdictError(f"confirm_json: {_explain(error, tree)}") from None


def read_frozen(study_dir: str) -> Frozen | None:
    """The frozen plan of a study; None: there is none yet.

    Raises:
        OutputError: the file is not one that raydisp wrote.
    """
    place = storage.join(study_dir, FILE)
    try:
        tree = yaml.safe_load(storage.read_bytes(place).decode())
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, yaml.YAMLError) as problem:
        raise OutputError(f"{place} cannot be read ({problem}); restore it") from None
    try:
        return Frozen.model_validate(tree)
    except ValidationError as error:
        raise OutputError(f"{place}: {_explain(error, tree)}; it is not to be changed: restore it") from None


def _explain(error: ValidationError, tree: Any) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "extra_forbidden":
        return f"{'.'.join(map(str, first['loc']))} is no part of a plan"
    return explain(error, tree) if isinstance(tree, dict) else "it is not a mapping of keys to values"
