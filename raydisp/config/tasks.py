"""The study file's `evaluate.tasks`: benchmarks of lm-evaluation-harness that models are evaluated on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from raydisp.config.section import Int, PositiveInt, Section
from raydisp.errors import ConfigError

PACKAGES = ("lm_eval", "accelerate")
"""What the extra `eval` brings; the harness's Hugging Face model needs the second."""


class Task(Section):
    """A task, tag or group of lm-evaluation-harness."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^\s,]+$", description="as the harness calls it")]
    num_fewshot: Annotated[
        Annotated[Int, Field(ge=0)] | None,
        Field(description="solved examples before each item; null: what the task says, else none"),
    ] = None
    limit: Annotated[
        PositiveInt | None,
        Field(description="only the first items, of each task of a group; null: all of them"),
    ] = None
    metric: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(description="what the verdict compares; null: acc_norm, acc, or the first that the task has"),
    ] = None


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict | Task):
        return value
    raise ValueError(
        "is neither the name of a task nor {name: ..., num_fewshot: ..., limit: ..., metric: ...}"
    )


NamedTask = Annotated[
    Task,
    BeforeValidator(_named),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, Task.model_json_schema()]}),
]


def named_twice(tasks: Sequence[Task]) -> str | None:
    """The task that stands in the list more than once, if one does."""
    names = [task.name for task in tasks]
    return next((name for name in names if names.count(name) > 1), None)


def check_installed() -> None:
    """Refuse tasks where the harness is missing.

    Raises:
        ConfigError: it is.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"evaluate.tasks needs lm-evaluation-harness, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; pip install 'raydisp[eval]', or leave "
            "the tasks out"
        )
