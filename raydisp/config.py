"""The typed study file: its fields, their ranges and defaults, and the identity of a trial.

Defaults live here, in `search_config`, `confirm_config` and `trackers_config`, and nowhere else. Reading a
file (YAML, overrides, sentences for mistakes) is in `studyfile`; rules over several fields are in
`space_rules`. The classes are strict and frozen, and forbid keys that they do not know.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from raydisp.confirm_config import ArmsConfig, ConfirmConfig
from raydisp.layers import LAYER_CHOICES, resolve_layers
from raydisp.search_config import SearchConfig
from raydisp.section import Fraction, Int, PositiveInt, Section, Seed, Tokens
from raydisp.trackers_config import Trackers, named_twice

SCHEMA_VERSION = 1
"""Part of every trial's identity; raised whenever a default that changes results changes."""

EFFORT_FIELDS = (
    "micro_batch_tokens",
    "strategy",
    "reshard_after_forward",
    "activation_checkpointing",
    "compile",
)
"""Fields of `train` that change memory and speed, and a result by rounding at most."""

Variant = Literal[
    "angular_spread",
    "orthogonalization",
    "l2_repel",
    "decorrelation",
    "perplexity_entropy",
    "uniformity",
    "cosine",
    "koleo",
    "variance_covariance",
    "spread_out",
    "log_det",
]
"""Names of `raydisp.losses.VARIANTS`, repeated here so that reading a file does not import torch; a test
compares the two."""


# --- model -------------------------------------------------------------------------------------------


class ScratchModel(Section):
    """A causal language model of the given sizes with fresh random weights (drawn from the trial's seed)."""

    source: Literal["scratch"]
    family: Literal["gpt2", "llama", "qwen3"] = "gpt2"
    num_layers: Annotated[Int, Field(ge=1, le=1000)] = 6
    hidden_size: Annotated[Int, Field(ge=2)] = 128
    num_heads: PositiveInt = 4
    num_kv_heads: Annotated[
        PositiveInt | None, Field(description="key/value heads of llama and qwen3; null: num_heads")
    ] = None
    ffn_size: Annotated[PositiveInt | None, Field(description="MLP width; null: 4 x hidden_size")] = None
    vocab_size: Annotated[
        Int, Field(ge=300, le=1_000_000, description="of the byte-level BPE trained on the training split")
    ] = 4096
    tie_embeddings: Annotated[bool, Field(description="output head shares the input embedding")] = True
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}; "
                "choose a hidden_size that the heads share evenly"
            )
        if self.family != "gpt2" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.hidden_size // self.num_heads} is odd, and the rotary "
                f"positions of {self.family} rotate features in pairs; choose an even size per head"
            )
        if self.num_kv_heads is not None:
            if self.family == "gpt2":
                raise ValueError("num_kv_heads is for llama and qwen3, family is gpt2; leave it out")
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
                )
        return self


class _Pretrained(Section):
    dropout: Annotated[float, Field(ge=0.0, lt=1.0, description="set in every dropout of the model")] = 0.0


class HubModel(_Pretrained):
    """A pretrained model and its tokenizer from the Hugging Face hub (or its local cache)."""

    source: Literal["hub"]
    id: Annotated[str, Field(min_length=1)]
    revision: Annotated[
        str | None, Field(description="branch, tag or commit; resolved to a commit once per study")
    ] = None
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False


class PathModel(_Pretrained):
    """A pretrained model and its tokenizer from a local folder written by save_pretrained."""

    source: Literal["path"]
    path: Annotated[str, Field(min_length=1)]
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False


class GgufModel(_Pretrained):
    """A pretrained model and its tokenizer from one GGUF file, weights dequantised to float32."""

    source: Literal["gguf"]
    path: Annotated[str, Field(min_length=1)]


ModelConfig = Annotated[ScratchModel | HubModel | PathModel | GgufModel, Field(discriminator="source")]


# --- data --------------------------------------------------------------------------------------------


class _Data(Section):
    context_length: Annotated[Int, Field(ge=8, le=1_000_000, description="tokens in one sequence")] = 128
    validation_frac: Annotated[float, Field(gt=0.0, lt=0.5, description="of the documents")] = 0.05
    test_frac: Annotated[float, Field(gt=0.0, lt=0.5, description="of the documents")] = 0.05


class PythonDocs(_Data):
    """The English prose that ships with the running CPython: language topics and docstrings."""

    source: Literal["python_docs"]


class Files(_Data):
    """Text (one document a file), JSON lines and Parquet (one document a row), by path or glob."""

    source: Literal["files"]
    paths: Annotated[list[str], Field(min_length=1)]
    text_field: Annotated[
        str, Field(min_length=1, description="the field of a JSON line or the column of a Parquet file")
    ] = "text"


class HubData(_Data):
    """A dataset of the Hugging Face hub (or its local cache, or a local folder) by datasets.load_dataset.

    Splits named in the dataset are used as they are; one that it lacks is split off `train_split` by a
    stable hash of the document.
    """

    source: Literal["hub"]
    path: Annotated[str, Field(min_length=1)]
    name: Annotated[str | None, Field(description="configuration of the dataset")] = None
    revision: Annotated[
        str | None, Field(description="branch, tag or commit; resolved to a commit once per study")
    ] = None
    text_field: Annotated[str, Field(min_length=1)] = "text"
    train_split: Annotated[str, Field(min_length=1)] = "train"
    validation_split: str | None = None
    test_split: str | None = None


DataConfig = Annotated[PythonDocs | Files | HubData, Field(discriminator="source")]


# --- training ----------------------------------------------------------------------------------------


class TrainConfig(Section):
    """One optimisation: AdamW, linear warm-up then cosine decay, budgets in tokens."""

    budget_tokens: Annotated[Tokens, Field(description="rounded up to whole steps")]
    global_batch_tokens: Annotated[Tokens, Field(description="tokens per optimiser step over all workers")]
    micro_batch_tokens: Annotated[
        Tokens | Literal["auto"],
        Field(description="tokens per forward pass of one worker; changes memory and speed, not the result"),
    ] = "auto"
    learning_rate: Annotated[float, Field(gt=0.0, description="peak")]
    min_learning_rate_frac: Annotated[Fraction, Field(description="of the peak, at the end")] = 0.0
    warmup_frac: Annotated[Fraction, Field(description="of all steps, linear")] = 0.2
    weight_decay: Annotated[float, Field(ge=0.0, description="on matrices, not on biases and norms")] = 0.1
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    grad_clip: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="global gradient norm; null: no clipping")
    ] = 1.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Field(description="auto: bf16 autocast on a GPU that has it, else fp32; fp16 scales the loss"),
    ] = "auto"
    tf32: Annotated[
        bool, Field(description="float32 products of a GPU in TF32: faster, ten bits of mantissa")
    ] = False
    on_nonfinite: Annotated[
        Literal["fail", "skip_step"],
        Field(description="a loss or gradient that is not finite ends the trial, or only costs its step"),
    ] = "fail"
    strategy: Annotated[
        Literal["ddp", "fsdp"],
        Field(description="ddp: every worker holds the model; fsdp: weights and optimizer state are sharded"),
    ] = "ddp"
    reshard_after_forward: Annotated[
        bool, Field(description="of fsdp: free gathered weights between forward and backward")
    ] = True
    activation_checkpointing: Annotated[
        bool, Field(description="compute the blocks' activations again in backward: less memory, slower")
    ] = False
    compile: Annotated[
        bool, Field(description="torch.compile every block; dropout then draws other noise")
    ] = False


class DispersionConfig(Section):
    """The dispersion term: total loss = cross-entropy + weight x mean over the chosen layers."""

    model_config = ConfigDict(
        # The rule of `_sign_is_meant`, for editors.
        json_schema_extra={
            "if": {
                "properties": {"allow_negative_weight": {"const": True}},
                "required": ["allow_negative_weight"],
            },
            "else": {"properties": {"weight": {"minimum": 0}}},
        }
    )

    variant: Variant = "angular_spread"
    weight: Annotated[float, Field(description="at least 0, unless allow_negative_weight")] = 0.1
    allow_negative_weight: Annotated[
        bool, Field(description="weights below 0 are meant: they reward what the loss otherwise punishes")
    ] = False
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    layers: Annotated[
        str | list[Annotated[int, Field(ge=0)]],
        Field(
            description="all, last, early_half, late_half, or a list of layer numbers: 0 is the embedding "
            "output, n the last block after the final norm",
            json_schema_extra={
                "anyOf": [
                    {"enum": list(LAYER_CHOICES)},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ]
            },
        ),
    ] = "all"
    clamp: Annotated[
        float, Field(gt=0.0, lt=1.0, description="cosines are limited to +-(1 - clamp) before arccos")
    ] = 0.1
    margin: Annotated[float, Field(gt=0.0, le=1.0, description="of orthogonalization")] = 0.5
    max_tokens: Annotated[
        Annotated[Int, Field(ge=2)] | None,
        Field(description="tokens of each sequence that the loss sees, others at every step; null: all"),
    ] = None

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, value: Any) -> Any:
        if isinstance(value, list) and all(type(number) is int for number in value):
            # Which numbers exist is known only with the model; order and repeats are settled here.
            resolve_layers(value, max([*value, 1]))
        elif isinstance(value, str):
            resolve_layers(value, 1)
        else:
            raise ValueError(f"layers is not one of {', '.join(LAYER_CHOICES)} or a list of layer numbers")
        return value

    @model_validator(mode="after")
    def _sign_is_meant(self) -> DispersionConfig:
        if self.weight < 0 and not self.allow_negative_weight:
            raise ValueError(
                f"dispersion.weight = {self.weight} is not at least 0.0: below, it rewards what the loss is "
                "there to reduce; raise it, or say dispersion.allow_negative_weight: true if that is meant"
            )
        return self


class NoisyEmbeddingConfig(Section):
    """NEFTune (arXiv 2310.05914): uniform noise on the input embeddings, while training only."""

    alpha: Annotated[
        float,
        Field(ge=0.0, description="noise in +-alpha / sqrt(tokens of a sequence x features); 0: none"),
    ] = 0.0


class ActiveForgettingConfig(Section):
    """Active forgetting (arXiv 2307.01163): the input embeddings are drawn anew every so many steps.

    They have a learning rate of their own: linear warm-up over 8 % of the steps, then linear to 0, run
    through once between two resets.
    """

    every_steps: Annotated[
        PositiveInt | None, Field(description="fewer than the trial has steps; null: no forgetting")
    ] = None
    learning_rate: Annotated[float, Field(gt=0.0, description="peak, of the input embeddings")] = 5.0e-5


# --- the rest ----------------------------------------------------------------------------------------


class EvaluateConfig(Section):
    """Evaluation on the validation split while training; the whole split is always used at the end."""

    every_tokens: Annotated[
        Tokens | None, Field(description="rounded up to whole steps; null: only before and after training")
    ] = None
    max_tokens: Annotated[
        Tokens | None, Field(description="of each evaluation but the last; null: the whole split")
    ] = 8192


class CheckpointConfig(Section):
    """Checkpoints that an interrupted trial goes on from: the last and the best are kept, and none of a
    trial that has ended."""

    every_tokens: Annotated[Tokens | None, Field(description="rounded up to whole steps; null: none")] = None


class FailuresConfig(Section):
    """What a trial may lose before it counts as failed."""

    max_failures: Annotated[
        Int,
        Field(
            ge=0,
            le=1000,
            description="times that a trial goes on from its last checkpoint after a worker, its process or "
            "its node was lost or hung; a node that gave notice does not count",
        ),
    ] = 2
    collective_timeout_s: Annotated[
        float, Field(gt=0.0, description="how long workers wait for one another before the trial is hung")
    ] = 1800.0
    max_failed_trials: Annotated[
        Annotated[Int, Field(ge=0, le=100_000)] | None,
        Field(
            description="failed trials that a study bears; with one more it starts no others, so that "
            "what is broken stops early; null: any number"
        ),
    ] = 5


class ResourcesConfig(Section):
    """What one trial gets, and how many run at a time."""

    num_workers: Annotated[
        Annotated[Int, Field(ge=1, le=10_000)]
        | Annotated[list[Annotated[Int, Field(ge=1, le=10_000)]], Field(min_length=2, max_length=2)],
        Field(
            description="data-parallel processes of a trial; [min, max]: an attempt begins with as many as "
            "there is room for"
        ),
    ] = 1
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0.0)] | Literal["auto"], Field(description="auto: 1 where there are GPUs")
    ] = "auto"
    accelerator_type: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
            description="only on nodes with GPUs of this kind, by Ray's name for it: L4, A100, H100, ...",
        ),
    ] = None
    max_concurrent_trials: Annotated[
        PositiveInt | Literal["auto"],
        Field(description="auto: as many as fit, counting what an autoscaler may add"),
    ] = "auto"
    placement_timeout_s: Annotated[
        float,
        Field(
            gt=0.0,
            description="how long a trial waits for CPUs and GPUs while no other of the study runs (with "
            "several workers: how long its workers wait) before that is an error",
        ),
    ] = 1800.0

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @property
    def goes_through_ray_train(self) -> bool:
        """Else a trial trains in its own process."""
        return self.is_elastic or self.max_workers > 1

    def worker_counts(self, num_sequences: int) -> list[int]:
        """The numbers of workers that share a batch of so many sequences evenly, in order."""
        return [
            number for number in range(self.min_workers, self.max_workers + 1) if num_sequences % number == 0
        ]

    @model_validator(mode="after")
    def _fewer_to_more(self) -> ResourcesConfig:
        if self.is_elastic and self.min_workers >= self.max_workers:
            raise ValueError(
                f"num_workers = [{self.min_workers}, {self.max_workers}] is no range; give [min, max] with "
                "min below max, or one number"
            )
        return self

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesConfig:
        gpus = self.gpus_per_worker
        if gpus != "auto" and gpus > 1 and not gpus.is_integer():
            raise ValueError(
                f"gpus_per_worker = {gpus:g}: Ray gives parts of one GPU, or whole ones; use "
                f"{math.floor(gpus)} or {math.ceil(gpus)}"
            )
        if gpus == 0 and self.accelerator_type is not None:
            raise ValueError(
                f"accelerator_type = {self.accelerator_type} names a GPU, and gpus_per_worker = 0 asks for "
                "none; leave one of them out"
            )
        return self


class TrialConfig(Section):
    """Everything one trial does: what it trains, on what, with which dispersion term, from which seed."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    dispersion: DispersionConfig = DispersionConfig()
    noisy_embedding: NoisyEmbeddingConfig = NoisyEmbeddingConfig()
    active_forgetting: ActiveForgettingConfig = ActiveForgettingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Seed = 0

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

    def identity(self) -> dict[str, Any]:
        """The fields that differ from their defaults and change the result; what `sha256` covers."""
        fields = self.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={
                "checkpoint": True,
                "train": set(EFFORT_FIELDS),
                "dispersion": {"allow_negative_weight"},
            },
        )
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
