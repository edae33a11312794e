"""What the process of one attempt at a trial is told, the row that it begins with, and what it may write."""

from __future__ import annotations

import dataclasses
import datetime
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raydisp import results, storage
from raydisp.config import StudyConfig, TrialConfig, with_fields
from raydisp.errors import LeaseLostError
from raydisp.layers import resolve_layers
from raydisp.search import space
from raydisp.storage import lease

Report = Callable[[dict[str, Any]], None]
"""Takes the metrics of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a trial process is told: plain values only, so that it travels as JSON."""

    study: dict[str, Any]
    """The study file, resolved."""
    study_dir: str
    cache_dir: str
    working_dir: str
    """Relative paths of the study file start here."""
    trial: int
    attempt: int
    phase: str
    arm: str
    values: dict[str, Any]
    """Fields that differ from the study file: dotted name -> value."""
    gpus_per_worker: float
    prepared: str
    """Folder of the study's token blocks."""
    model_revision: str | None
    code_version: str
    packages: dict[str, str]
    stop_rule: dict[str, str] | None = None
    """Name and namespace of the actor that says whether the trial goes on, and the metric that it watches."""
    data_sha256: str | None = None
    """Of the study's data; a trial that varies them finds out its own."""
    teacher_revision: str | None = None
    """Of `distillation.teacher`, which is the same in all trials; None: there is none."""
    lease: str | None = None
    """Of the results folder, while this study holds it."""
    confirm_json: str | None = None
    """Of the confirm phase: its frozen plan, which stands on every row."""
    keep_model: bool = False
    """Whether the weights are kept when the trial has completed."""
    code_sha256: str | None = None
    """Of the code on the node where the study was started; None: it is not looked at."""
    task_folders: Sequence[str] = ()
    """Of the harness's own tasks, where those of the study are."""

    @property
    def name(self) -> str:
        return results.trial_name(self.trial)


def checkpoint_dir(assignment: Assignment) -> str:
    """Where the trial's checkpoints are, whichever attempt made them."""
    return storage.join(assignment.study_dir, "checkpoints", assignment.name)


def blank_row(assignment: Assignment, study: StudyConfig, started: float) -> dict[str, Any]:
    """The row of a trial that has begun: `interrupted`, until it is replaced by how the trial ended."""
    trial = study.trial
    row: dict[str, Any] = {
        "study": study.name,
        "phase": assignment.phase,
        "trial": assignment.trial,
        "attempt": assignment.attempt,
        "arm": assignment.arm,
        "status": "interrupted",
        "seed": assignment.values.get("seed", trial.seed),
        "config_json": json.dumps(with_fields(trial, assignment.values), sort_keys=True),
        "study_json": json.dumps(assignment.study),
        "confirm_json": assignment.confirm_json,
        "world_size": study.resources.max_workers,
        "strategy": trial.train.strategy,
        "error_type": None,
        "hostname": socket.gethostname(),
        "data_sha256": None if varies(assignment, "data", "model") else assignment.data_sha256,
        "model_revision": None if varies(assignment, "model") else assignment.model_revision,
        "teacher_revision": assignment.teacher_revision,
        "code_version": assignment.code_version,
        "packages_json": json.dumps(assignment.packages, sort_keys=True),
        "started_at": utc(started),
    }
    for name, column in space.column_types(study).items():
        row[name] = space.column_value(assignment.values.get(name), column)  # null: it is not set in this one
    return row


def varies(assignment: Assignment, *parts: str) -> bool:
    """Whether the trial differs from its study in any field of these parts."""
    return any(name.split(".")[0] in parts for name in assignment.values)


def in_the_words_of(trial: TrialConfig, name: str, used: Mapping[str, Any]) -> Any:
    """A setting as read back from the live objects; layers in the trial's word for them where it is true.

    A setting that no live object holds (the batch size, for example) is the trial's.
    """
    configured = _field(trial, name)
    if name not in used:
        return configured
    value = used[name]
    if name == "dispersion.layers" and used.get("num_layers"):
        told = resolve_layers(configured, used["num_layers"])
        return configured if list(told) == list(value) else list(value)
    return value


def _field(trial: TrialConfig, dotted: str) -> Any:
    value: Any = trial
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def refuse_if_taken_over(assignment: Assignment) -> None:
    """A process that outlives its study, or its attempt, cut off from both, must not write into what another
    one goes on with.

    Raises:
        LeaseLostError: another command holds the results folder, or another attempt has begun.
    """
    if assignment.lease is None:
        return
    if not lease.still_held(assignment.study_dir, assignment.lease):
        raise LeaseLostError(f"{assignment.name} ends: its study no longer holds {assignment.study_dir}")
    if results.attempt_exists(assignment.study_dir, assignment.trial, assignment.attempt + 1):
        raise LeaseLostError(f"{assignment.name} ends: another attempt goes on with it elsewhere")


def refuse_if_given_up(assignment: Assignment) -> None:
    """Raise LeaseLostError where the study has taken a trial's attempt for lost, and written how it ended."""
    if assignment.lease is None:
        return
    row = results.read_trial(assignment.study_dir, assignment.trial, assignment.attempt)
    if row is not None and row["ended_at"] is not None:
        raise LeaseLostError(f"{assignment.name} ends: its study has taken it for lost")


@dataclasses.dataclass(frozen=True)
class GuardedRows:
    """Rows that are written only while the trial's study holds its folder."""

    assignment: Assignment
    writer: results.RowWriter

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.writer.add(table, row)

    def flush(self, step: int) -> None:
        refuse_if_taken_over(self.assignment)
        self.writer.flush(step)


def utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
