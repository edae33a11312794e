"""The `trackers` section of the study file: who else is told what trials report. No secret belongs in it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from raydisp.config.section import Section
from raydisp.errors import ConfigError, suggest

Name = Literal["tensorboard", "mlflow", "wandb"]
NAMES: tuple[str, ...] = get_args(Name)

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""Tracker -> the package that it needs."""

_SECRETS = re.compile(r"://[^/\s]*@|[?&;][^=&;]*(?:password|passwd|token|secret|key)[^=&;]*=", re.IGNORECASE)

_Dir = Annotated[
    Annotated[str, Field(min_length=1)] | None,
    Field(description="local folder; null: in the results folder, `tensorboard` or `wandb`"),
]


class Tensorboard(Section):
    """Event files for TensorBoard, a folder for each trial."""

    dir: _Dir = None


class Mlflow(Section):
    """A run for each trial on an MLflow server, or in a local store. Credentials come from MLflow's own
    environment variables."""

    tracking_uri: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(description="null: MLFLOW_TRACKING_URI of the environment, else MLflow's default"),
    ] = None
    experiment: Annotated[
        Annotated[str, Field(min_length=1)] | None, Field(description="null: the name of the study")
    ] = None

    @field_validator("tracking_uri")
    @classmethod
    def _has_no_secret(cls, value: str | None) -> str | None:
        if value is not None and _SECRETS.search(value):
            # Without what was found: it would stand in a log.
            raise ValueError(
                "tracking_uri = ... holds a user name or a secret, and the study file is copied into the "
                "results; leave it out and give it by the environment (MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or the whole as MLFLOW_TRACKING_URI)"
            )
        return value


class Wandb(Section):
    """A run for each trial in Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`."""

    project: Annotated[str, Field(min_length=1, description="of Weights & Biases")] = "raydisp"
    mode: Annotated[
        Literal["offline", "online"],
        Field(description="offline: into a folder that `wandb sync` can send later"),
    ] = "offline"
    dir: _Dir = None


Settings = Tensorboard | Mlflow | Wandb


class _TensorboardTracker(Section):
    tensorboard: Tensorboard


class _MlflowTracker(Section):
    mlflow: Mlflow


class _WandbTracker(Section):
    wandb: Wandb


_KINDS = {"tensorboard": Tensorboard, "mlflow": Mlflow, "wandb": Wandb}


def _tag(value: Any) -> str:
    # Tags stand in the places of mistakes: none may be called like a key.
    if isinstance(value, dict):
        return next((name.title() for name in NAMES if name in value), "Word")
    return next((name.title() for name in NAMES if hasattr(value, name)), "Word")


def _tracker(value: Any) -> Any:
    named = isinstance(value, dict) and len(value) == 1 and next(iter(value)) in NAMES
    if isinstance(value, Section) or value in NAMES or named:
        return value
    word = next(iter(value), "") if isinstance(value, dict) else value
    guess = suggest(word, NAMES) if isinstance(word, str) else ""
    raise ValueError(
        f"is not one of {', '.join(NAMES)}, alone or with its settings, such as "
        f"{{mlflow: {{experiment: my_study}}}}{f'.{guess}' if guess else ''}"
    )


Tracker = Annotated[
    Annotated[Name, Tag("Word")]
    | Annotated[_TensorboardTracker, Tag("Tensorboard")]
    | Annotated[_MlflowTracker, Tag("Mlflow")]
    | Annotated[_WandbTracker, Tag("Wandb")],
    Discriminator(_tag),
    BeforeValidator(_tracker),
]

Trackers = Annotated[
    list[Tracker],
    Field(
        max_length=len(NAMES),
        description="who else gets what trials report, beside the Parquet rows: names, or a name with its "
        "settings; what goes wrong there never touches the study",
    ),
]


def name_of(tracker: Any) -> str:
    """tensorboard, mlflow or wandb."""
    return tracker if isinstance(tracker, str) else next(iter(type(tracker).model_fields))


def settings_of(tracker: Any) -> Settings:
    """The settings of an entry of the list."""
    settings: Settings = _KINDS[tracker]() if isinstance(tracker, str) else getattr(tracker, name_of(tracker))
    return settings


def named_twice(trackers: Iterable[Any]) -> str | None:
    """The tracker that stands in the list more than once, if one does."""
    names = [name_of(tracker) for tracker in trackers]
    return next((name for name in names if names.count(name) > 1), None)


def check_trackers(trackers: Iterable[Any], study_dir: str) -> None:
    """Find out before anything starts whether each tracker has what it needs on this machine.

    Raises:
        ConfigError: a package is missing, or a folder must be named.
    """
    for index, tracker in enumerate(trackers):
        name, settings = name_of(tracker), settings_of(tracker)
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trackers[{index}] = {name} needs the package {package}, which is not installed; "
                f"pip install 'raydisp[{name}]', or take it out of the list"
            )
        folder = getattr(settings, "dir", "")
        if (folder is None and "://" in study_dir) or "://" in (folder or ""):
            raise ConfigError(
                f"trackers[{index}].{name}.dir is {'missing' if folder is None else 'no local folder'}: "
                f"{name} writes to a local folder, and the results go to {study_dir}; name one, such as "
                f"{{{name}: {{dir: {name}_logs}}}}"
            )
