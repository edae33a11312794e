"""Trials of other studies that a sampler may know from the start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from raydisp import results, storage
from raydisp.arms import SEARCH, Arm, Arms
from raydisp.config import StudyConfig, read_config_json
from raydisp.config.confirm import BASELINE
from raydisp.config.train import EFFORT_FIELDS
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.stopping import full_tokens

if TYPE_CHECKING:
    from raydisp.search.optuna_study import OptunaStudy

Row = Mapping[str, Any]

CONDENSATION = ("layer_cosine_mean", "spearman", "kendall")
"""Measured on `evaluate.max_tokens` tokens; losses at the end are of the whole split."""


@dataclass(frozen=True)
class WarmStart:
    """Rows of one other study that compare with this one's, and why the rest was left out."""

    origin: str
    arm: Arm
    """That the sampler searches."""
    rows: list[dict[str, Any]]
    left_out: Counter[str]

    def tell(self, optuna_study: OptunaStudy) -> None:
        """Tell the sampler of the arm."""
        optuna_study.add_foreign(self.rows, self.origin, self.arm.name)

    def describe(self) -> str:
        """For example `12 trials of results/a (left out: 3 outside the space)`."""
        to = "" if self.arm.name == SEARCH else f" to {self.arm.name}"
        text = f"{len(self.rows)} trial{'' if len(self.rows) == 1 else 's'} of {self.origin}{to}"
        if self.left_out:
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())
            text += f" (left out: {reasons})"
        return text


def read_warm_starts(study: StudyConfig, data_sha256: str | None = None) -> list[WarmStart]:
    """The trials of `search.warm_start` that a value of this study's objective can be compared with.

    A sampler ranks all values that it knows, so that only completed trials count which differ from this
    study's in searched fields and the seed alone: the same data, tokens and other settings.

    Args:
        data_sha256: of this study's data; None: not known yet, and any will do.
    Raises:
        OutputError: a folder is not there, or holds no results.
    """
    arms = Arms(study).searched
    return [
        _choose(arm, origin, rows, data_sha256)
        for origin in study.search.warm_start
        for rows in [_read(origin)]
        for arm in arms
    ]


def _read(origin: str) -> list[dict[str, Any]]:
    filesystem, path = storage.resolve(origin)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise OutputError(
            f"search.warm_start names {origin}, which is no folder; name the results folder of a study, such "
            "as results/weight_search"
        )
    trials: list[dict[str, Any]]
    trials = results.latest_attempts(results.read_table(origin, "trials")).to_pylist()
    if not trials:
        raise OutputError(f"search.warm_start names {origin}, which holds no trials; leave it out")
    return trials


def _choose(arm: Arm, origin: str, rows: list[dict[str, Any]], data_sha256: str | None) -> WarmStart:
    kept, left_out = [], Counter[str]()
    for row in rows:
        reason = _why_not(arm, row, data_sha256)
        if reason is None:
            kept.append(row)
        else:
            left_out[reason] += 1
    return WarmStart(origin, arm, kept, left_out)


def _why_not(arm: Arm, row: Row, data_sha256: str | None) -> str | None:
    study = arm.study
    if row["phase"] == "confirm":  # its seeds would no longer be fresh to what the search picks
        return "of a confirm phase"
    if row["arm"] == BASELINE and not arm.is_baseline:
        return "baseline"
    if row["status"] != "completed":
        return "not completed"
    if any(
        row.get(one.metric) is None or not math.isfinite(row[one.metric]) for one in study.search.objectives
    ):
        return "without the objective"
    if row["num_tokens"] != full_tokens(study):
        return "with other tokens"
    if None not in (data_sha256, row["data_sha256"]) and row["data_sha256"] != data_sha256:
        return "on other data"
    config = read_config_json(row["config_json"])
    seen = {one["evaluate"]["max_tokens"] for one in (config, study.model_dump(mode="json"))}
    if len(seen) > 1 and any(one.metric in CONDENSATION for one in study.search.objectives):
        return "with condensation of other tokens"
    try:
        values = space.searched_values(study, config)
    except (KeyError, TypeError):
        return "outside the space"
    if not all(space.contains(study, name, value) for name, value in values.items()):
        return "outside the space"
    ours = study.trial.model_dump(mode="json")
    # A field whose condition does not hold has one value here, and may have had another there.
    if comparable_fields(ours, values) != comparable_fields(config, values):
        return "with other settings"
    return None


def comparable_fields(config: Mapping[str, Any], apart: Collection[str]) -> dict[str, Any]:
    """What must be equal for the values of two trials to compare: dotted name -> value.

    Args:
        config: a whole trial, as `config_json` has it.
        apart: fields that may differ.
    """
    flat: dict[str, Any] = {}
    for part, fields in config.items():
        if part in ("seed", "checkpoint", "evaluate") or not isinstance(fields, dict):
            continue
        for name, value in fields.items():
            dotted = f"{part}.{name}"
            effort = part == "train" and name in EFFORT_FIELDS
            if dotted not in apart and not effort and dotted != "dispersion.allow_negative_weight":
                flat[dotted] = value
    # The budget is compared in the tokens that were really seen.
    flat.pop("train.budget_tokens", None)
    return flat
