"""The Optuna study behind a search: what the sampler knows, and what optuna-dashboard shows.

It is made anew from rows at each start. It lives in a SQLite file on the driver's local disk, or in memory,
and is copied whole to the results.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pyarrow.fs as pafs
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from raydisp import space, storage
from raydisp.config import StudyConfig
from raydisp.curves import Point, of_metric
from raydisp.errors import OutputError
from raydisp.samplers import fixed_point, make_sampler, shuffled_grid

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

SNAPSHOT_EVERY_S = 5.0
"""How often a study that runs is copied at the most, but for the end of a trial."""

ATTRIBUTES = ("trial", "status", "num_tokens", "error_message")
"""Columns of `trials` that stand beside each Optuna trial."""


class OptunaStudy:
    """Asks a sampler for points and tells it what became of them.

    Optuna's trials are in the order of ours: those of a warm start first, then trial 1, 2, ...
    """

    def __init__(self, study: StudyConfig, folder: Path | None) -> None:
        """Start an empty one.

        Args:
            folder: local, for the SQLite file; None: in memory.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config = study
        self._distributions = space.distributions(study)
        self._objectives = study.search.objectives
        self._file = None if folder is None else folder / "optuna.db"
        self._study = optuna.create_study(
            study_name=study.name,
            storage=None if self._file is None else f"sqlite:///{self._file}",
            directions=["minimize" if one.mode == "min" else "maximize" for one in self._objectives],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([one.metric for one in self._objectives])
        self._grid = shuffled_grid(study) if study.search.sampler == "grid" else None
        self._live: dict[int, optuna.Trial] = {}
        self._reported: dict[int, set[int]] = {}
        self._copied_at = -math.inf

    def add_foreign(self, rows: Sequence[Row], origin: str) -> None:
        """Take completed trials of another study, as rows whose fields are in this study's space."""
        for row in rows:
            attributes = {"study": row["study"], "warm_start": origin, **_attributes(row)}
            self._add(row, [], attributes)

    def add_finished(self, row: Row, curve: Sequence[Point] = ()) -> None:
        """Take a search trial that has ended, in an earlier run of the command, from its row and curve."""
        self._add(row, curve, _attributes(row))

    def _add(self, row: Row, curve: Sequence[Point], attributes: dict[str, Any]) -> None:
        values, state = self._outcome(row)
        params = space.to_optuna(self.searched_values(row))
        intermediate = self._intermediate(curve)
        if state == TrialState.PRUNED and intermediate and len(self._objectives) == 1:
            values = [intermediate[max(intermediate)]]
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions={name: self._distributions[name] for name in params},
                values=values,
                state=state,
                intermediate_values=intermediate,
                user_attrs={**attributes, **self._pruned_values(state, curve)},
            )
        )

    def suggest(self, trial: int) -> space.Values:
        """Values for a new trial."""
        self._study.sampler = make_sampler(self._config, self._distributions, trial)
        if self._grid is not None:
            return self._ask(trial, self._grid[trial - 1])
        return self._ask(trial, fixed_point(self._config, trial))

    def resume(self, trial: int, values: Mapping[str, Any]) -> None:
        """Open a trial with given values: one that was interrupted goes on."""
        self._ask(trial, values)

    def _ask(self, trial: int, settled: Mapping[str, Any]) -> space.Values:
        if settled:
            self._study.enqueue_trial(space.to_optuna(settled))
        live = self._live[trial] = self._study.ask()
        live.set_user_attr("trial", trial)
        params: dict[str, Any] = {}
        values: space.Values = {}
        for name, distribution in self._distributions.items():
            if space.is_searched(self._config, name, values):
                suggested = _suggest(live, name, distribution)
                # A settled value comes back as the file has it: 1, where the field is a float.
                params[name] = distribution.to_external_repr(distribution.to_internal_repr(suggested))
                values = space.from_optuna(self._config, params)
        return values

    def report(self, trial: int, num_tokens: int, metrics: Mapping[str, float | None]) -> None:
        """Take an intermediate value of a trial that runs; with several objectives Optuna has no place for
        them, and they come with the trial's end."""
        value = metrics.get(self._objectives[0].metric)
        live = self._live.get(trial)
        if len(self._objectives) > 1 or live is None:
            return
        reported = self._reported.setdefault(trial, set())
        if value is not None and math.isfinite(value) and num_tokens not in reported:
            live.report(value, num_tokens)
            reported.add(num_tokens)

    def finish(self, row: Row, curve: Sequence[Point] = ()) -> None:
        """Close a trial by its row and curve; one without finite values is told as failed, never left
        running."""
        live = self._live.get(row["trial"])
        if live is None:
            return
        for num_tokens, metrics in curve:
            self.report(row["trial"], num_tokens, metrics)
        del self._live[row["trial"]]
        self._reported.pop(row["trial"], None)
        values, state = self._outcome(row)
        for name, attribute in {**_attributes(row), **self._pruned_values(state, curve)}.items():
            live.set_user_attr(name, attribute)
        self._study.tell(live, values, state)

    def snapshot(self, study_dir: str, *, now: bool = True) -> None:
        """Copy a consistent state to `<study_dir>/optuna.db`.

        Where that is a local file it is changed in place, in one transaction, so that a dashboard which has
        it open sees the new state.

        Args:
            now: False: only if the last copy is older than SNAPSHOT_EVERY_S.
        Raises:
            OutputError: it cannot be written.
        """
        if self._file is None or (not now and time.monotonic() - self._copied_at < SNAPSHOT_EVERY_S):
            return
        place = storage.join(study_dir, "optuna.db")
        filesystem, path = storage.resolve(place)
        with contextlib.closing(sqlite3.connect(self._file)) as source:
            if isinstance(filesystem, pafs.LocalFileSystem) and Path(path).is_file():
                with contextlib.suppress(sqlite3.Error):  # not a database, or on a disk that cannot lock
                    with contextlib.closing(sqlite3.connect(path, timeout=2.0)) as target:
                        source.backup(target)
                    self._copied_at = time.monotonic()
                    return
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "optuna.db"
                with contextlib.closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
                storage.write_bytes(place, copy.read_bytes())
        self._copied_at = time.monotonic()

    def try_snapshot(self, study_dir: str, *, now: bool = True) -> None:
        """A copy for readers: where one fails, the next one may do better."""
        try:
            self.snapshot(study_dir, now=now)
        except (OutputError, OSError, sqlite3.Error) as problem:
            logger.warning("%s", problem)

    def close(self) -> None:
        """Tell what is still open as failed, and let go of the file."""
        for live in self._live.values():
            self._study.tell(live, None, TrialState.FAIL)
        self._live = {}
        if self._file is not None:
            backend = self._study._storage
            backend.remove_session()
            getattr(backend, "_backend", backend).engine.dispose()

    def searched_values(self, row: Row) -> space.Values:
        """What a search trial was given, from its row."""
        return space.searched_values(self._config, json.loads(row["config_json"]))

    def _outcome(self, row: Row) -> tuple[list[float] | None, TrialState]:
        if row["status"] == "pruned":
            return None, TrialState.PRUNED
        values = [row.get(objective.metric) for objective in self._objectives]
        finite = [float(value) for value in values if value is not None and math.isfinite(value)]
        if row["status"] == "completed" and len(finite) == len(values):
            return finite, TrialState.COMPLETE
        return None, TrialState.FAIL

    def _intermediate(self, curve: Sequence[Point]) -> dict[int, float]:
        if len(self._objectives) > 1:
            return {}
        return dict(of_metric(curve, self._objectives[0].metric))

    def _pruned_values(self, state: TrialState, curve: Sequence[Point]) -> dict[str, float]:
        if state != TrialState.PRUNED or not curve or len(self._objectives) == 1:
            return {}
        metrics = curve[-1][1]
        found = {one.metric: metrics.get(one.metric) for one in self._objectives}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def copied_statuses(study_dir: str) -> dict[int, str] | None:
    """Trial -> status, as the copy of the Optuna study in a results folder has them; None: there is none."""
    try:
        content = storage.read_bytes(storage.join(study_dir, "optuna.db"))
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(content)
            told = database.execute(
                "select trial_id, key, value_json from trial_user_attributes where trial_id not in "
                "(select trial_id from trial_user_attributes where key = 'warm_start') and trial_id not in "
                "(select trial_id from trials where state = 'RUNNING')"
            ).fetchall()
    except (FileNotFoundError, OutputError, sqlite3.Error):
        return None
    trials: dict[int, dict[str, Any]] = {}
    for trial_id, key, value in told:
        trials.setdefault(trial_id, {})[key] = json.loads(value)
    return {one["trial"]: one.get("status", "") for one in trials.values() if "trial" in one}


def _attributes(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ATTRIBUTES if row.get(name) is not None}


def _suggest(live: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        return live.suggest_float(name, low, high, step=distribution.step, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return live.suggest_int(name, low, high, step=distribution.step, log=distribution.log)
    return live.suggest_categorical(name, distribution.choices)
