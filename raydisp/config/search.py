"""The `search` section of the study file: what varies, who suggests, who stops trials, when it is over."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from raydisp.config.section import Int, PositiveInt, Section, Tokens

Metric = Literal[
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "train_loss",
    "layer_cosine_mean",
    "spearman",
    "kendall",
    "tokens_per_s",
    "train_s",
    "peak_memory_bytes",
]
"""Columns of `trials` that a search can make small or large."""

WatchedMetric = Literal[
    "val_loss", "val_perplexity", "val_bits_per_byte", "layer_cosine_mean", "spearman", "kendall"
]
"""Of these, what is measured at every evaluation, so that a scheduler can watch it."""

LARGER_IS_BETTER = ("tokens_per_s",)
"""Metrics whose mode is `max` where the file does not say."""


# --- space -------------------------------------------------------------------------------------------


def _choice(value: Any) -> Any:
    whole_numbers = isinstance(value, list) and all(type(item) is int for item in value)
    if value is None or isinstance(value, bool | int | float | str) or whole_numbers:
        return value
    raise ValueError("is not a number, a word, true, false, null or a list of whole numbers")


Choice = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": ["number", "string", "boolean", "null"]},
                {"type": "array", "items": {"type": "integer"}},
            ]
        }
    ),
]
When = Annotated[
    dict[str, Annotated[list[Choice], Field(min_length=1)]] | None,
    Field(description="searched only where another searched field has one of these values"),
]


class Range(Section):
    """A searched number: low <= x <= high; whole numbers where the field is one."""

    low: Annotated[int | float, Field(description="the smallest value")]
    high: Annotated[int | float, Field(description="the largest value")]
    log: Annotated[bool, Field(description="search on a logarithmic axis")] = False
    step: Annotated[
        Annotated[int | float, Field(gt=0)] | None, Field(description="only low, low + step, ... are tried")
    ] = None
    when: When = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} has no logarithm; with log: true it must be above 0")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(
                f"step = {self.step} is more than from low = {self.low} to high = {self.high}; lower it"
            )
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; leave one out")
        return self


class Choices(Section):
    """Searched values one by one, where they have a condition; without one a plain list says the same."""

    choices: Annotated[list[Choice], Field(min_length=1, description="the values")]
    when: When = None


def _dimension_tag(value: Any) -> str:
    # Tags stand in the places of mistakes: none may be called like a key.
    if isinstance(value, list):
        return "List"
    if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value):
        return "Choices"
    return "Range"


Dimension = Annotated[
    Annotated[Range, Tag("Range")]
    | Annotated[Choices, Tag("Choices")]
    | Annotated[list[Choice], Field(min_length=1), Tag("List")],
    Discriminator(_dimension_tag),
]


# --- objectives --------------------------------------------------------------------------------------


class Objective(Section):
    """What the search makes small or large, measured at the end of each trial on the validation split."""

    metric: Annotated[Metric, Field(description="column of trials")] = "val_loss"
    mode: Annotated[Literal["min", "max"], Field(description="default: min; max of tokens_per_s")] = "min"

    @model_validator(mode="before")
    @classmethod
    def _mode_of_the_metric(cls, value: Any) -> Any:
        if isinstance(value, dict) and "mode" not in value and value.get("metric") in LARGER_IS_BETTER:
            return {**value, "mode": "max"}
        return value


def _objectives_tag(value: Any) -> str:
    return "List" if isinstance(value, list | tuple) else "Objective"


Objectives = Annotated[
    Annotated[Objective, Tag("Objective")]
    | Annotated[list[Objective], Field(min_length=1, max_length=4), Tag("List")],
    Discriminator(_objectives_tag),
]


# --- schedulers --------------------------------------------------------------------------------------


class _Stopping(Section):
    grace_tokens: Annotated[Tokens, Field(description="no trial is stopped before it has seen these")]
    metric: Annotated[
        WatchedMetric | None,
        Field(description="what is watched; null: the objective; to be named where there are several"),
    ] = None
    mode: Annotated[Literal["min", "max"] | None, Field(description="of a metric that is named")] = None

    @model_validator(mode="after")
    def _mode_needs_a_metric(self) -> _Stopping:
        if self.mode is not None and self.metric is None:
            raise ValueError("mode is given without a metric; name the metric too, or leave both out")
        return self


class Asha(_Stopping):
    """Asynchronous successive halving: at each rung the best of reduction_factor go on (Optuna's pruner)."""

    reduction_factor: Annotated[
        Int, Field(ge=2, le=100, description="one of so many goes on at each rung")
    ] = 3


class Hyperband(_Stopping):
    """Several brackets of successive halving side by side, with later and later first rungs."""

    reduction_factor: Annotated[
        Int, Field(ge=2, le=100, description="one of so many goes on at each rung")
    ] = 3


class Median(_Stopping):
    """A trial stops where its best value so far is worse than the median of completed trials there."""

    num_startup_trials: Annotated[
        PositiveInt, Field(description="trials that must have completed before any is stopped")
    ] = 4


class _AshaScheduler(Section):
    asha: Asha


class _HyperbandScheduler(Section):
    hyperband: Hyperband


class _MedianScheduler(Section):
    median: Median


SCHEDULERS = ("asha", "hyperband", "median")


def _scheduler_tag(value: Any) -> str:
    if isinstance(value, dict):
        return next((name for name in SCHEDULERS if name in value), "none")
    return next((name for name in SCHEDULERS if hasattr(value, name)), "none")


def _scheduler(value: Any) -> Any:
    named = isinstance(value, dict) and len(value) == 1 and next(iter(value)) in SCHEDULERS
    if value == "none" or named or isinstance(value, Section):
        return value
    found = f'"{value}"' if isinstance(value, str) else "what stands there"
    needs = (
        f" (it needs at least grace_tokens: {{{value}: {{grace_tokens: ...}}}})"
        if value in SCHEDULERS
        else ""
    )
    raise ValueError(
        f"{found} is not none or one of {', '.join(SCHEDULERS)} with its settings, such as "
        f"{{asha: {{grace_tokens: 50_000, reduction_factor: 3}}}}{needs}"
    )


Scheduler = Annotated[
    Annotated[Literal["none"], Tag("none")]
    | Annotated[_AshaScheduler, Tag("asha")]
    | Annotated[_HyperbandScheduler, Tag("hyperband")]
    | Annotated[_MedianScheduler, Tag("median")],
    Discriminator(_scheduler_tag),
    BeforeValidator(_scheduler),
]


# --- ending ------------------------------------------------------------------------------------------


class StopWhen(Section):
    """The search is over when its best value has not improved for a while."""

    no_improvement_trials: Annotated[
        PositiveInt,
        Field(description="completed trials in a row that do not improve on the best before them"),
    ]
    min_improvement: Annotated[
        float, Field(ge=0.0, description="in units of the metric; this much or less is no improvement")
    ] = 0.0
    metric: Annotated[
        Metric | None, Field(description="null: the objective; to be named where there are several")
    ] = None


# --- the section -------------------------------------------------------------------------------------


class SearchConfig(Section):
    """Which fields vary, how many trials, who suggests them, who stops them, and when it is over."""

    num_trials: Annotated[
        Int,
        Field(
            ge=1,
            le=100_000,
            description="search trials of each searched arm; a baseline that is one trial comes on top",
        ),
    ]
    objective: Annotated[
        Objectives,
        Field(description="one, or a list of several: the search then looks for their Pareto front"),
    ] = Objective()
    space: Annotated[
        dict[str, Dimension],
        Field(description="dotted field -> what is searched; in every arm, where there are arms"),
    ] = Field(default_factory=dict)
    sampler: Annotated[
        Literal["tpe", "random", "grid", "cma-es", "qmc"],
        Field(
            description="tpe: multivariate, groups of conditional fields; qmc: scrambled Sobol points; grid: "
            "every combination in random order; cma-es: for spaces of ranges"
        ),
    ] = "tpe"
    num_startup_trials: Annotated[
        Annotated[Int, Field(ge=1)] | None,
        Field(description="random trials before tpe begins; null: half of num_trials, at most 10"),
    ] = None
    points_to_evaluate: Annotated[
        list[dict[str, Choice]],
        Field(description="points to try first; searched fields that one leaves out are suggested"),
    ] = Field(default_factory=list)
    warm_start: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(description="results folders of other studies: the sampler knows their trials from the start"),
    ] = Field(default_factory=list)
    scheduler: Annotated[Scheduler, Field(description="who stops trials before their budget is used up")] = (
        "none"
    )
    max_tokens_total: Annotated[
        Tokens | None,
        Field(
            description="training tokens of the search, baseline included; none starts that would exceed it"
        ),
    ] = None
    max_hours: Annotated[
        Annotated[float, Field(gt=0.0)] | None,
        Field(description="hours in which trials ran, over all runs of the command; none starts after it"),
    ] = None
    stop_when: Annotated[
        StopWhen | None, Field(description="the search ends when it no longer improves; null: it does not")
    ] = None

    @model_validator(mode="after")
    def _objectives_and_who_watches_them(self) -> SearchConfig:
        metrics = [objective.metric for objective in self.objectives]
        twice = next((metric for metric in metrics if metrics.count(metric) > 1), None)
        if twice is not None:
            raise ValueError(f"search.objective names {twice} twice; keep one of them")
        several = len(metrics) > 1
        if several and self.stop_when is not None and self.stop_when.metric is None:
            raise ValueError(
                f"search.stop_when.metric is missing: there are {len(metrics)} objectives; name the one "
                f"whose improvement counts ({', '.join(metrics)})"
            )
        if self.stop_when is not None and self.stop_when.metric not in (None, *metrics):
            raise ValueError(
                f"search.stop_when.metric = {self.stop_when.metric} is not an objective of the search "
                f"({', '.join(metrics)}); name one of them"
            )
        if self.sampler == "cma-es" and several:
            raise ValueError(
                "search.sampler = cma-es follows one objective, and there are several; use tpe, random, qmc "
                "or grid"
            )
        rule = self.stopping
        if rule is None or rule.metric is not None:
            return self
        if several:
            raise ValueError(
                f"search.scheduler.{self.scheduler_name}.metric is missing: there are {len(metrics)} "
                f"objectives; name the one metric that it watches ({', '.join(metrics)}), or use scheduler: "
                "none"
            )
        if metrics[0] not in WatchedMetric.__args__:  # type: ignore[attr-defined]
            raise ValueError(
                f"search.scheduler.{self.scheduler_name} cannot watch {metrics[0]}, which is known only at "
                f"the end of a trial; name one of {', '.join(WatchedMetric.__args__)} as its metric"  # type: ignore[attr-defined]
            )
        return self

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives in the order of the file; most often one."""
        return (self.objective,) if isinstance(self.objective, Objective) else tuple(self.objective)

    @property
    def primary(self) -> Objective:
        """The first objective: what one-dimensional figures show."""
        return self.objectives[0]

    @property
    def scheduler_name(self) -> str:
        """none, asha, hyperband or median."""
        return _scheduler_tag(self.scheduler)

    @property
    def stopping(self) -> Asha | Hyperband | Median | None:
        """The scheduler's settings; None where there is none."""
        rule: Asha | Hyperband | Median | None = getattr(self.scheduler, self.scheduler_name, None)
        return rule

    @property
    def watched(self) -> Objective | None:
        """What the scheduler watches; None where there is none."""
        rule = self.stopping
        if rule is None:
            return None
        if rule.metric is None:
            return self.primary
        if rule.mode is not None:
            return Objective(metric=rule.metric, mode=rule.mode)
        same = [objective for objective in self.objectives if objective.metric == rule.metric]
        return same[0] if same else Objective(metric=rule.metric)

    @property
    def startup_trials(self) -> int:
        """Random trials before the sampler begins to learn."""
        if self.num_startup_trials is not None:
            return self.num_startup_trials
        return max(1, min(10, self.num_trials // 2))


def condition(dimension: Any) -> dict[str, list[Any]]:
    """What must hold for a dimension to be searched: searched field -> values; empty: nothing."""
    return {} if isinstance(dimension, list) else dimension.when or {}


def choices_of(dimension: Any) -> list[Any] | None:
    """The values of a dimension that is a list of them; None of a range."""
    if isinstance(dimension, Range):
        return None
    return dimension.choices if isinstance(dimension, Choices) else list(dimension)


def label(value: Any) -> str:
    """A value as text that differs wherever the values do."""
    # 1, True and "1" are equal or alike in Python; as text with their type they are not. 1.0 is 1: which of
    # the two stands somewhere depends on who wrote it.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{type(value).__name__}:{json.dumps(value)}"
