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
import sqlalchemy.event
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from raydisp import storage
from raydisp.arms import SEARCH, Arms
from raydisp.config import StudyConfig
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.curves import Point, of_metric
from raydisp.search.samplers import fixed_point, make_sampler, shuffled_grid

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

SNAPSHOT_EVERY_S = 5.0
"""How often a study that runs is copied at the most, but for the end of a trial."""

ATTRIBUTES = ("trial", "status", "num_tokens", "error_message")
"""Columns of `trials` that stand beside each Optuna trial."""


class OptunaStudy:
    """Asks a sampler for points and tells it what became of them: one Optuna study for each searched arm.

    All of them lie in one file. Optuna's trials are in the order of ours: those of a warm start first, then
    the arm's first trial, its second, ...
    """

    def __init__(self, study: StudyConfig, folder: Path | None) -> None:
        """Start an empty one.

        Args:
            folder: local, for the SQLite file; None: in memory.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._arms = Arms(study)
        self._file = None if folder is None else folder / "optuna.db"
        self._storage = _make_storage(self._file)
        self._studies = {
            arm.name: _ArmStudy(
                arm.study, study.name if study.arms is None else f"{study.name}: {arm.name}", self._storage
            )
            for arm in self._arms.searched
        }
        self._copied_at = -math.inf

    def trials(self, arm: str = SEARCH) -> list[optuna.trial.FrozenTrial]:
        """Optuna's trials of an arm."""
        return self._studies[arm].trials()

    def _of(self, trial: int) -> _ArmStudy:
        return self._studies[self._arms.of(trial).name]

    def add_foreign(self, rows: Sequence[Row], origin: str, arm: str = SEARCH) -> None:
        """Take completed trials of another study, as rows whose fields are in an arm's space."""
        self._studies[arm].add_foreign(rows, origin)

    def add_finished(self, row: Row, curve: Sequence[Point] = ()) -> None:
        """Take a search trial that has ended, in an earlier run of the command, from its row and curve."""
        self._of(row["trial"]).add_finished(row, curve)

    def suggest(self, trial: int) -> space.Values:
        """Searched values for a new trial."""
        return self._of(trial).suggest(trial, self._arms.index(trial))

    def resume(self, trial: int, values: Mapping[str, Any]) -> None:
        """Open a trial with given searched values: one that was interrupted goes on."""
        self._of(trial).open(trial, values)

    def report(self, trial: int, num_tokens: int, metrics: Mapping[str, float | None]) -> None:
        """Take an intermediate value of a trial that runs; with several objectives Optuna has no place for
        them, and they come with the trial's end."""
        if self._arms.of(trial).searched:
            self._of(trial).report(trial, num_tokens, metrics)

    def finish(self, row: Row, curve: Sequence[Point] = ()) -> None:
        """Close a trial by its row and curve; one without finite values is told as failed, never left
        running."""
        if self._arms.of(row["trial"]).searched:
            self._of(row["trial"]).finish(row, curve)

    def searched_values(self, row: Row) -> space.Values:
        """What a search trial was given, from its row."""
        return self._of(row["trial"]).searched_values(row)

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
        for study in self._studies.values():
            study.close()
        if self._file is not None:
            self._storage.remove_session()
            getattr(self._storage, "_backend", self._storage).engine.dispose()


class _ArmStudy:
    """The Optuna study of one arm."""

    def __init__(self, study: StudyConfig, name: str, storage: optuna.storages.BaseStorage) -> None:
        """Args: study: as the arm sees it."""
        self._config = study
        self._distributions = space.distributions(study)
        self._objectives = study.search.objectives
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=["minimize" if one.mode == "min" else "maximize" for one in self._objectives],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([one.metric for one in self._objectives])
        self._grid = shuffled_grid(study) if study.search.sampler == "grid" else None
        self._live: dict[int, optuna.Trial] = {}
        self._reported: dict[int, set[int]] = {}

    def add_foreign(self, rows: Sequence[Row], origin: str) -> None:
        for row in rows:
            attributes = {"study": row["study"], "warm_start": origin, **_attributes(row)}
            self._add(row, [], attributes)

    def add_finished(self, row: Row, curve: Sequence[Point] = ()) -> None:
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

    def suggest(self, trial: int, index: int) -> space.Values:
        """Args: index: of the trial in its arm, from 1."""
        self._study.sampler = make_sampler(self._config, self._distributions, index)
        if self._grid is not None:
            return self.open(trial, self._grid[index - 1])
        return self.open(trial, fixed_point(self._config, index))

    def open(self, trial: int, settled: Mapping[str, Any]) -> space.Values:
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
        value = metrics.get(self._objectives[0].metric)
        live = self._live.get(trial)
        if len(self._objectives) > 1 or live is None:
            return
        reported = self._reported.setdefault(trial, set())
        if value is not None and math.isfinite(value) and num_tokens not in reported:
            live.report(value, num_tokens)
            reported.add(num_tokens)

    def finish(self, row: Row, curve: Sequence[Point] = ()) -> None:
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

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def close(self) -> None:
        for live in self._live.values():
            self._study.tell(live, None, TrialState.FAIL)
        self._live = {}

    def searched_values(self, row: Row) -> space.Values:
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


def _make_storage(file: Path | None) -> optuna.storages.BaseStorage:
    """Optuna's storage in a SQLite file, or in memory."""
    if file is None:
        return optuna.storages.InMemoryStorage()
    made = optuna.storages.RDBStorage(f"sqlite:///{file}")

    @sqlalchemy.event.listens_for(made.engine, "connect")
    def do_not_wait(connection: sqlite3.Connection, record: object) -> None:
        # This file is made anew from rows after a crash: nobody needs each change of it to be on the disk.
        connection.execute("PRAGMA synchronous = OFF")

    made.engine.dispose()  # connections from before this setting
    return optuna.storages.get_storage(made)


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
