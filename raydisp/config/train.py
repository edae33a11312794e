"""The study file's `train`, `dispersion`, `noisy_embedding` and `active_forgetting`: one optimisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from raydisp.config.section import Fraction, Int, PositiveInt, Section, Tokens
from raydisp.layers import LAYER_CHOICES, resolve_layers
from raydisp.schedules import START_FRAC, WARMUP_FRAC, ScheduleName, check_fractions

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
    beta1: Annotated[float, Field(ge=0.0, lt=1.0, description="decay of AdamW's mean gradient")] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0, description="decay of AdamW's mean squared gradient")] = (
        0.95
    )
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

    variant: Annotated[
        Variant, Field(description="which loss; each docstring of raydisp.losses has formula and source")
    ] = "angular_spread"
    weight: Annotated[float, Field(description="at least 0, unless allow_negative_weight")] = 0.1
    allow_negative_weight: Annotated[
        bool, Field(description="weights below 0 are meant: they reward what the loss otherwise punishes")
    ] = False
    temperature: Annotated[
        float,
        Field(
            gt=0.0,
            description="of angular_spread and uniformity; of l2_repel and perplexity_entropy too, there a "
            "squared length",
        ),
    ] = 1.0
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
    schedule: Annotated[
        ScheduleName,
        Field(
            description="of the weight over the steps: cosine_decay falls to 0, delayed is on from start_frac"
        ),
    ] = "constant"
    warmup_frac: Annotated[
        Fraction | None, Field(description=f"of all steps, of linear_warmup alone; null: {WARMUP_FRAC}")
    ] = None
    start_frac: Annotated[
        Annotated[float, Field(ge=0.0, lt=1.0)] | None,
        Field(description=f"of all steps, of delayed alone; null: {START_FRAC}"),
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
    def _fractions_are_of_the_schedule(self) -> DispersionConfig:
        check_fractions(
            self.schedule, warmup_frac=self.warmup_frac, start_frac=self.start_frac, where="dispersion."
        )
        return self

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
