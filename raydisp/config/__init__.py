"""The typed study file: its fields, their ranges and defaults, and the identity of a trial.

Defaults live in the modules of this package, and nowhere else. Reading a file (YAML, overrides, sentences for
mistakes) is in `studyfile`; rules over several fields are in `search.space_rules`. The classes are strict and
frozen, and forbid keys that they do not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from raydisp.config.confirm import ArmsConfig, ConfirmConfig
from raydisp.config.data import DataConfig
from raydisp.config.distillation import DistillationConfig
from raydisp.config.model import ModelConfig, ScratchModel
from raydisp.config.resources import FailuresConfig, ResourcesConfig
from raydisp.config.search import SearchConfig
from raydisp.config.section import Int, Section, Seed, Tokens
from raydisp.config.tasks import NamedTask
from raydisp.config.tasks import named_twice as task_named_twice
from raydisp.config.trackers import Trackers, named_twice
from raydisp.config.train import (
    EFFORT_FIELDS,
    ActiveForgettingConfig,
    DispersionConfig,
    NoisyEmbeddingConfig,
    TrainConfig,
)
from raydisp.layers import resolve_layers

SCHEMA_VERSION = 1
"""Part of every trial's identity; raised whenever a default that changes results changes."""

NOT_IDENTITY: dict[str, set[str]] = {
    "checkpoint": set(),
    "train": set(EFFORT_FIELDS),
    "dispersion": {"allow_negative_weight"},
}
"""Section of a trial -> its fields that change no result; none named: all of them."""


def in_identity(part: str, name: str) -> bool:
    """Whether a field of a section of a trial is part of the trial's identity."""
    return part not in NOT_IDENTITY or (bool(NOT_IDENTITY[part]) and name not in NOT_IDENTITY[part])


class EvaluateConfig(Section):
    """Evaluation on the validation split while training; the whole split is always used at the end."""

    every_tokens: Annotated[
        Tokens | None,
        Field(
            description="rounded up to whole steps; null: before and after training, and where "
            "num_log_spaced says"
        ),
    ] = None
    num_log_spaced: Annotated[
        Annotated[Int, Field(ge=1, le=1000)] | None,
        Field(
            description="evaluations besides, from the first step to the end at equal ratios of tokens; "
            "those that fall on the same step are one; null: none"
        ),
    ] = None
    max_tokens: Annotated[
        Tokens | None, Field(description="of each evaluation but the last; null: the whole split")
    ] = 8192
    tasks: Annotated[
        list[NamedTask],
        Field(
            description="benchmarks of lm-evaluation-harness, by name or with settings: before training, at "
            "the scheduler's rungs, and at the end"
        ),
    ] = Field(default=[])
    task_paths: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(description="folders of your own YAML tasks; theirs go before the harness's of the same name"),
    ] = Field(default=[])

    @model_validator(mode="after")
    def _each_task_once(self) -> EvaluateConfig:
        twice = task_named_twice(self.tasks)
        if twice is not None:
            raise ValueError(f"evaluate.tasks names {twice} twice; keep one of them")
        return self


class CheckpointConfig(Section):
    """Checkpoints that an interrupted trial goes on from: the last and the best are kept, and none of a
    trial that has ended."""

    every_tokens: Annotated[Tokens | None, Field(description="rounded up to whole steps; null: none")] = None


class TrialConfig(Section):
    """Everything one trial does: what it trains, on what, with which dispersion term, from which seed."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    dispersion: DispersionConfig = DispersionConfig()
    noisy_embedding: NoisyEmbeddingConfig = NoisyEmbeddingConfig()
    active_forgetting: ActiveForgettingConfig = ActiveForgettingConfig()
    distillation: DistillationConfig = DistillationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Annotated[
        Seed, Field(description="of the initial weights, the order of the data, all noise and the search")
    ] = 0

    @model_validator(mode="after")
    def _fits_together(self) -> TrialConfig:
        train, context = self.train, self.data.context_length
        for name in ("global_batch_tokens", "micro_batch_tokens"):
            tokens = getattr(train, name)
            if tokens != "auto" and tokens % context:
                raise ValueError(
                    f"train.{name} = {tokens} is not a whole number of sequences of "
                    f"data.context_length = {context}; {_nearest_multiples(tokens, context)}"
                )
        if self.evaluate.max_tokens is not None and self.evaluate.max_tokens < context:
            raise ValueError(
                f"evaluate.max_tokens = {self.evaluate.max_tokens} is less than one sequence of "
                f"data.context_length = {context}; raise it, or use null for the whole split"
            )
        if self.dispersion.max_tokens is not None and self.dispersion.max_tokens > context:
            raise ValueError(
                f"dispersion.max_tokens = {self.dispersion.max_tokens} is more than the "
                f"data.context_length = {context} tokens of a sequence; lower it, or use null for all"
            )
        if isinstance(self.model, ScratchModel):
            try:
                resolve_layers(self.dispersion.layers, self.model.num_layers)
            except ValueError as error:
                raise ValueError(f"dispersion.{error}") from None
        every = self.active_forgetting.every_steps
        if every is not None and every >= self.num_steps:
            most = self.num_steps - 1
            allowed = f"at most {most} is allowed" if most else "one step leaves none between two resets"
            raise ValueError(
                f"active_forgetting.every_steps = {every} is not below the {self.num_steps} steps of the "
                f"trial (train.budget_tokens = {train.budget_tokens} in steps of train.global_batch_tokens = "
                f"{train.global_batch_tokens}), so nothing would be forgotten; {allowed}: lower it, raise "
                "train.budget_tokens, or use null for no forgetting"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimiser steps: the budget, rounded up to whole steps."""
        return -(-self.train.budget_tokens // self.train.global_batch_tokens)

    @property
    def sequences_per_step(self) -> int:
        return self.train.global_batch_tokens // self.data.context_length

    def steps_between(self, every_tokens: int | None) -> int | None:
        """Steps in an interval given in tokens, rounded up; None where there is no interval."""
        return None if every_tokens is None else -(-every_tokens // self.train.global_batch_tokens)

    @property
    def tokenizer_model(self) -> ModelConfig:
        """The model whose tokenizer makes the tokens: its own, or the teacher of one from scratch.

        Also where the teacher is switched off (weight 0): all arms of a study have the same tokens.
        """
        teacher = self.distillation.teacher
        return teacher if teacher is not None and isinstance(self.model, ScratchModel) else self.model

    @property
    def log_spaced_steps(self) -> tuple[int, ...]:
        """Steps of `evaluate.num_log_spaced`, in order: from the first, at equal ratios, without the last.

        As many as asked for, or fewer: the earliest may be closer together than whole steps.
        """
        points, last = self.evaluate.num_log_spaced, self.num_steps
        if points is None:
            return ()
        steps = {round(last ** (index / points)) for index in range(points)}
        return tuple(sorted(step for step in steps if step < last))

    def identity(self) -> dict[str, Any]:
        """The fields that differ from their defaults and change the result; what `sha256` covers."""
        left_out = {part: names or True for part, names in NOT_IDENTITY.items()}
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
        if not fields.get("dispersion", True):
            del fields["dispersion"]  # nothing but the permission was said
        # A discriminator has no default, but say it outright: it decides what the other keys mean.
        fields["schema_version"] = SCHEMA_VERSION
        return fields

    @property
    def sha256(self) -> str:
        """Identity of the trial: hex digest of the canonical JSON of `identity()`."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class StudyConfig(TrialConfig):
    """A study file: the base trial, the search over it, and where it runs and writes."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
            max_length=100,
            description="letters, digits, '.', '_' and '-'; the name of the results folder",
        ),
    ]
    search: SearchConfig
    arms: ArmsConfig | None = None
    confirm: ConfirmConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()
    failures: FailuresConfig = FailuresConfig()
    trackers: Trackers = Field(default_factory=list)
    output: Annotated[str, Field(min_length=1, description="folder; results go to <output>/<name>")] = (
        "results"
    )

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> StudyConfig:
        sequences, resources = self.sequences_per_step, self.resources
        if self.train.strategy == "fsdp" and resources.min_workers == 1:
            raise ValueError(
                f"train.strategy = fsdp shards a model over workers, and resources.num_workers = "
                f"{resources.num_workers}; use ddp, or at least 2 workers"
            )
        for workers in {resources.min_workers, resources.max_workers}:
            if sequences % workers == 0:
                continue
            nearest = _nearest_multiples(self.train.global_batch_tokens, self.data.context_length * workers)
            raise ValueError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens} is {sequences} sequences of "
                f"{self.data.context_length} tokens, which resources.num_workers = {workers} cannot share "
                f"evenly; {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _each_tracker_once(self) -> StudyConfig:
        twice = named_twice(self.trackers)
        if twice is not None:
            raise ValueError(f"trackers names {twice} twice; keep one of them")
        return self

    @property
    def trial(self) -> TrialConfig:
        """The base trial, before any suggestion of the search."""
        return TrialConfig.model_validate({name: getattr(self, name) for name in TrialConfig.model_fields})


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    near = f"{below} or {below + unit}" if below else f"{unit}"
    return f"the nearest that is: {near}"


def field_of(tree: Any, dotted: str) -> Any:
    """What stands under a dotted name in a tree of plain values, such as a row's `config_json`."""
    for name in dotted.split("."):
        tree = tree[name]
    return tree


def read_config_json(text: str) -> dict[str, Any]:
    """A row's `config_json` as a tree of plain values; what an older version did not know has its default."""
    tree: dict[str, Any] = json.loads(text)
    for part, field in TrialConfig.model_fields.items():
        if isinstance(field.default, Section):
            known = tree.setdefault(part, {})
            for name, default in field.default.model_dump(mode="json").items():
                known.setdefault(name, default)
    return tree


def with_fields(config: TrialConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as a tree of plain values, with fields set by dotted name: {"dispersion.weight": 0.3}."""
    tree = config.model_dump(mode="json")
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return tree


def replace_fields(config: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """A trial with fields set by dotted name, validated anew.

    Raises:
        pydantic.ValidationError: a value is not allowed, alone or beside the others.
    """
    return TrialConfig.model_validate(with_fields(config, values))
