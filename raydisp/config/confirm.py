"""The `arms` and `confirm` sections of the study file: what is compared, and how it is decided."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from raydisp.config.search import Choice, Choices, Range
from raydisp.config.section import Int, Section

BASELINE = "baseline"
"""Name of the arm that the others are compared with."""

BEST = "best"
"""What the export calls the winner: no arm has this name."""

ARM_NAME = r"[A-Za-z0-9][A-Za-z0-9_]*"
MAX_ARMS = 20


def _value_tag(value: Any) -> str:
    # Tags stand in the places of mistakes: none may be called like a key.
    if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value):
        return "Choices"
    return "Range" if isinstance(value, dict | Range) else "Value"


def _fixed(value: Any) -> Any:
    whole_numbers = isinstance(value, list) and all(type(item) is int for item in value)
    if isinstance(value, list) and not whole_numbers:
        raise ValueError(
            "is a list; an arm sets one value, or searches several as a mapping, {choices: [...]}"
        )
    return value


ArmValue = Annotated[
    Annotated[Range, Tag("Range")]
    | Annotated[Choices, Tag("Choices")]
    | Annotated[Choice, BeforeValidator(_fixed), Tag("Value")],
    Discriminator(_value_tag),
]
"""What an arm says of a field: its value, or, as a mapping, what is searched."""


def _several(value: Any) -> Any:
    if isinstance(value, dict) and not 2 <= len(value) <= MAX_ARMS:
        names = ", ".join(map(str, value)) or "none"
        raise ValueError(
            f"there is {len(value)} ({names}); a study compares {BASELINE} with 1 to {MAX_ARMS - 1} others, "
            "or leaves arms out"
        )
    for name in value if isinstance(value, dict) else ():
        if not re.fullmatch(ARM_NAME, str(name)):
            raise ValueError(
                f'there is one called "{name}"; a name is made of letters, digits and "_", and begins with a '
                "letter or digit"
            )
        if name == BEST:
            raise ValueError(
                f'there is one called "{BEST}", which means the winner to the export; choose another'
            )
    return value


ArmsConfig = Annotated[
    dict[Annotated[str, Field(max_length=40)], dict[str, ArmValue]],
    BeforeValidator(_several),
    Field(
        description="what is compared: name -> fields of a trial by dotted name, each with a value, or with "
        "what is searched ({low: ..., high: ...} or {choices: [...]}); one is called baseline. The fields of "
        "search.space are searched in all of them",
    ),
]


class ConfirmConfig(Section):
    """After the search: its best configurations and every other arm again, on fresh paired seeds and on test
    data that nothing has seen."""

    top_k: Annotated[
        Int, Field(ge=1, le=10, description="configurations of each searched arm that may have dispersion")
    ] = 1
    num_seeds: Annotated[
        Annotated[Int, Field(le=10_000)] | None,
        Field(
            description="at least 2; null: the least n with 2 m / 2^n <= 0.05 for m arms beside the baseline"
        ),
    ] = None
    smallest_effect: Annotated[
        float,
        Field(gt=0.0, description="difference in test loss, nats per token, that would matter to you"),
    ]
    spread: Annotated[
        Annotated[float, Field(gt=0.0)] | None,
        Field(
            description="standard deviation over seeds of the difference between two arms with the same "
            "seed, nats per token, from earlier seeds: what power is stated from; null: it is not known"
        ),
    ] = None
    spread_from: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(description="results folder of an earlier study: the largest spread of its confirm phase"),
    ] = None
    keep_models: Annotated[
        Literal["first_seed", "all", "none"],
        Field(description="weights that are kept, for python -m raydisp.export"),
    ] = "first_seed"

    @field_validator("num_seeds")
    @classmethod
    def _has_a_spread(cls, value: int | None) -> int | None:
        if value is not None and value < 2:
            raise ValueError(
                f"num_seeds = {value}: one seed has no spread, so nothing can be tested; give at least 2, or "
                "null for as many as the test needs"
            )
        return value
