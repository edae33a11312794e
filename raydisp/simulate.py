"""Recorded learning curves in the place of training: samplers and schedulers are compared in seconds.

A study that ran with full budgets is a table of curves over its search space. A simulated trial takes the
curve of its point between the nearest recorded ones, and everything around it is real: the dispatcher, the
sampler (in memory), the rule that stops trials, the budgets. Time is made up: trials take as long as the
recorded ones did.
"""

from __future__ import annotations

import dataclasses
import datetime
import heapq
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raydisp import results, storage
from raydisp.arms import Arms
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig, field_of, read_config_json, replace_fields
from raydisp.config.confirm import BASELINE
from raydisp.config.search import Range, label
from raydisp.errors import OutputError
from raydisp.search import space
from raydisp.search.agenda import Agenda
from raydisp.search.curves import EVALUATED, Point, read_curves
from raydisp.search.dispatch import Dispatcher, Launch
from raydisp.search.optuna_study import OptunaStudy
from raydisp.search.stopping import StopRule, full_tokens
from raydisp.search.warm_start import comparable_fields
from raydisp.studyfile import dump_study
from raydisp.trial.assignment import Assignment, blank_row

MIN_CONFIGURATIONS = 60
"""Fewer recorded points leave too much between them to be guessed."""

NUM_NEIGHBOURS = 4
"""Recorded points that a curve is made of, weighted by the inverse square of their distance."""

INTERPOLATED = (*EVALUATED, "train_loss", "train_s", "tokens_per_s", "peak_memory_bytes")
"""Columns of `trials` that a simulated trial gets from its neighbours."""

Row = dict[str, Any]
EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
"""When a simulation begins, by its own clock."""


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a point of the space would have been worth."""

    curve: list[Point]
    final: dict[str, float]
    """Column of `trials` -> value."""
    distance: float
    """To the nearest recorded point: 1 is the whole width of one searched field."""
    nearest: int
    """Its trial."""


class Recorded:
    """Curves of a study's full-budget trials over the fields in which they differ."""

    def __init__(
        self,
        origin: str,
        study: StudyConfig,
        rows: list[Row],
        curves: Mapping[int, list[Point]],
        names: list[str],
    ) -> None:
        """Args: names: the fields in which the rows differ; all of them are in `config_json`."""
        self.origin = origin
        self._rows = rows
        self._curves = [curves[row["trial"]] for row in rows]
        self._names = names
        self.points = [
            {name: field_of(read_config_json(row["config_json"]), name) for name in names} for row in rows
        ]
        searched = [point for point, row in zip(self.points, rows, strict=True) if row["arm"] != "baseline"]
        self._axes = {name: _Axis(study, name, [point[name] for point in searched]) for name in names}
        self._columns = {
            name: self._axes[name].places(point[name] for point in self.points) for name in names
        }
        self._labels = {name: [label(point[name]) for point in self.points] for name in names}
        self._baseline: list[bool] = [row["arm"] == "baseline" for row in rows]
        self._finals = {
            column: np.array([np.nan if row[column] is None else row[column] for row in rows], dtype=float)
            for column in INTERPOLATED
        }

    def __len__(self) -> int:
        return len(self.points) - sum(self._baseline)

    def finals(self, column: str) -> list[float]:
        """A column of the recorded search trials."""
        values = zip(self._finals[column].tolist(), self._baseline, strict=True)
        return [value for value, baseline in values if not baseline and math.isfinite(value)]

    def describe(self, study: StudyConfig) -> str:
        """One line: what is replayed."""
        return (
            f"{study.name}: simulated from {len(self)} recorded configurations of {self.origin} over "
            f"{', '.join(self._names)}; {study.search.num_trials} search trials and the baseline of "
            f"{full_tokens(study):,} tokens each."
        )

    def guess(self, config: Mapping[str, Any], *, baseline: bool = False) -> Guess:
        """What the trial of this configuration would have been worth.

        Args:
            baseline: take the recorded baseline where there is one.
        """
        if baseline and True in self._baseline:
            index = self._baseline.index(True)
            chosen, weights, distance = np.array([index]), np.ones(1), 0.0
        else:
            chosen, weights, distance = self._neighbours(config)
        finals = {
            column: float(weights @ values[chosen])
            for column, values in self._finals.items()
            if np.isfinite(values[chosen]).all()
        }
        curve = []
        for at, (tokens, metrics) in enumerate(self._curves[chosen[0]]):
            points = [self._curves[index][at][1] for index in chosen]
            # What one of them lacks, a correlation that was not defined there, the guess lacks.
            known = [name for name in metrics if all(name in point for point in points)]
            curve.append(
                (tokens, {name: float(weights @ [point[name] for point in points]) for name in known})
            )
        return Guess(curve, finals, distance, self._rows[chosen[0]]["trial"])

    def _neighbours(self, config: Mapping[str, Any]) -> tuple[Any, Any, float]:
        square = np.where(self._baseline, np.inf, 0.0)
        for name in self._names:
            value = field_of(config, name)
            if self._axes[name].is_number and _is_number(value):
                square += (self._columns[name] - self._axes[name].place(value)) ** 2
            else:
                own = label(value)
                square += np.array([0.0 if other == own else 1.0 for other in self._labels[name]])
        chosen = np.argsort(square, kind="stable")[:NUM_NEIGHBOURS]
        distance = math.sqrt(square[chosen[0]])
        if distance < 1e-9:
            return chosen[:1], np.ones(1), 0.0
        weights = 1 / square[chosen]
        return chosen, weights / weights.sum(), distance


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Axis:
    """Where a field's values lie: numbers on [0, 1] over what was recorded, on the axis of the search."""

    def __init__(self, study: StudyConfig, name: str, values: list[Any]) -> None:
        dimension = study.search.space.get(name)
        self.is_number = all(_is_number(value) for value in values)
        self._log = isinstance(dimension, Range) and dimension.log and min(values) > 0
        if self.is_number:
            self._least = min(values)
            ends = [self._scaled(end) for end in (min(values), max(values))]
            self._low, self._width = ends[0], max(ends[1] - ends[0], 1e-12)

    def _scaled(self, value: float) -> float:
        # A baseline's weight of 0 has no logarithm: it is as far as the axis goes.
        if self._log:
            return math.log(value if value > 0 else self._least)
        return float(value)

    def place(self, value: float) -> float:
        return (self._scaled(value) - self._low) / self._width

    def places(self, values: Iterator[Any]) -> Any:
        return np.array([self.place(value) for value in values]) if self.is_number else np.empty(0)


def load_recorded(study: StudyConfig, origin: str) -> Recorded:
    """The recorded curves in a results folder that fit a study.

    Raises:
        OutputError: there are too few, or they are of other settings, tokens or evaluations.
    """
    if study.arms is not None:
        raise OutputError(
            "--simulate replays the curves of one search, and the file names arms; leave them out of a copy "
            "of it"
        )
    filesystem, path = storage.resolve(origin)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise OutputError(f"--simulate {origin}: there is no such folder; name a results folder with curves")
    full, between = full_tokens(study), study.steps_between(study.evaluate.every_tokens)
    trials = results.latest_attempts(results.read_table(origin, "trials")).to_pylist()
    rows = [row for row in trials if row["status"] == "completed" and row["num_tokens"] == full]
    searched = [row for row in rows if row["arm"] != "baseline"]
    if len(searched) < MIN_CONFIGURATIONS:
        seen = sorted({row["num_tokens"] for row in trials if row["num_tokens"] is not None})
        budgets = f"; its trials have {', '.join(f'{tokens:,}' for tokens in seen[:5])}" if seen else ""
        raise OutputError(
            f"--simulate {origin}: {len(searched)} completed trials of {full:,} tokens "
            f"(train.budget_tokens), and it takes {MIN_CONFIGURATIONS} to interpolate between{budgets}"
        )
    wanted = (
        []
        if between is None
        else range(between * study.train.global_batch_tokens, full, between * study.train.global_batch_tokens)
    )
    curves = read_curves(results.read_table(origin, "evals"), before_tokens=full)
    kept: dict[int, list[Point]] = {}
    for row in rows:
        points = dict(curves.get(row["trial"], []))
        lacking = [tokens for tokens in wanted if tokens not in points]
        if lacking:
            raise OutputError(
                f"--simulate {origin}: trial {row['trial']} was not evaluated at {lacking[0]:,} tokens, as "
                f"evaluate.every_tokens = {study.evaluate.every_tokens} asks; recorded: "
                f"{', '.join(f'{tokens:,}' for tokens in list(points)[:6]) or 'nothing'}, ..."
            )
        kept[row["trial"]] = [(tokens, points[tokens]) for tokens in wanted]
    configs = [read_config_json(row["config_json"]) for row in searched]
    names = [name for name in _varied(configs) if name.split(".")[0] not in ("checkpoint", "evaluate")]
    _refuse_other_settings(study, origin, configs[0], names)
    for name in study.search.space:
        if name not in names:
            raise OutputError(
                f'--simulate {origin}: search.space["{name}"] is not among the fields in which its trials '
                f"differ ({', '.join(names)}); take it out of the space"
            )
    return Recorded(origin, study, rows, kept, names)


def _varied(configs: list[dict[str, Any]]) -> list[str]:
    """Dotted names of the fields in which configurations differ."""
    flat = [comparable_fields(config, ()) for config in configs]
    return [name for name in flat[0] if len({label(one.get(name)) for one in flat}) > 1]


def _refuse_other_settings(
    study: StudyConfig, origin: str, config: Mapping[str, Any], names: list[str]
) -> None:
    apart = {*names, *study.search.space}
    ours = comparable_fields(study.trial.model_dump(mode="json"), apart)
    theirs = comparable_fields(config, apart)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise OutputError(
                f"--simulate {origin}: it was recorded with {name} = {json.dumps(theirs.get(name))}, and the "
                f"study has {json.dumps(ours.get(name))}; change the study, for example by --set"
            )


# --- running -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Simulation:
    """The rows that a simulated study would have left."""

    trials: list[Row] = dataclasses.field(default_factory=list)
    evals: list[Row] = dataclasses.field(default_factory=list)
    over: str | None = None
    """Why the search ended before its number of trials, if it did."""


@dataclasses.dataclass
class _Running:
    assignment: Assignment
    guess: Guess
    row: Row
    started_s: float
    next_point: int = 0


def simulate(study: StudyConfig, recorded: Recorded) -> Simulation:
    """Run a study on recorded curves, in memory.

    `resources.max_concurrent_trials` trials run side by side (auto: one).
    """
    done = Simulation()
    clock = [0.0]
    auto = study.resources.max_concurrent_trials == "auto"
    slots = 1 if auto else int(study.resources.max_concurrent_trials)
    plan = Plan(study.resources.max_workers, study.resources.cpus_per_worker, 0.0, slots)
    launch = Launch(study, "", "", "", "", None, "simulated", {}, plan)
    rule = StopRule(study) if study.search.stopping is not None else None
    arms = Arms(study)
    agenda = Agenda([], [], list(arms.fixed_trials), list(arms.search_trials))
    dispatcher = Dispatcher(launch, agenda, OptunaStudy(study, None), now=lambda: _at(clock[0]))
    events: list[tuple[float, int]] = []
    running: dict[int, _Running] = {}
    while True:
        while len(running) < slots and (assignment := dispatcher.next()) is not None:
            one = _start(study, recorded, assignment, clock[0])
            running[assignment.trial] = one
            heapq.heappush(events, (_time_of(study, one), assignment.trial))
        if not events:
            done.over = dispatcher.over
            return done
        clock[0], trial = heapq.heappop(events)
        one = running[trial]
        stopped = False
        if one.next_point < len(one.guess.curve):
            tokens, metrics = one.guess.curve[one.next_point]
            one.next_point += 1
            dispatcher.reported(trial, {"num_tokens": tokens, **metrics})
            if rule is not None and arms.of(trial).searched:
                stopped = rule.report(trial, tokens, metrics.get(rule.metric))
            if not stopped:
                heapq.heappush(events, (_time_of(study, one), trial))
                continue
        _end(study, one, clock[0], stopped)
        curve = one.guess.curve[: one.next_point]
        done.trials.append(one.row)
        done.evals.extend(_eval_rows(trial, curve, study.train.global_batch_tokens))
        del running[trial]
        dispatcher.close(one.row, curve)
        if rule is not None:
            rule.close(trial, one.row["status"])


def _start(study: StudyConfig, recorded: Recorded, assignment: Assignment, now_s: float) -> _Running:
    config = replace_fields(study.trial, assignment.values)
    guess = recorded.guess(config.model_dump(mode="json"), baseline=assignment.arm == BASELINE)
    row = blank_row(assignment, study, _at(now_s).timestamp())
    row["config_sha256"] = config.sha256
    row["note"] = (
        f"simulated; the nearest recorded point, trial {guess.nearest}, is {guess.distance:.3f} away"
    )
    return _Running(assignment, guess, row, now_s)


def _time_of(study: StudyConfig, one: _Running) -> float:
    """When a trial comes to its next evaluation, or to its end."""
    full, curve = full_tokens(study), one.guess.curve
    tokens = curve[one.next_point][0] if one.next_point < len(curve) else full
    return one.started_s + one.guess.final.get("train_s", 1.0) * tokens / full


def _end(study: StudyConfig, one: _Running, now_s: float, stopped: bool) -> None:
    tokens = one.guess.curve[one.next_point - 1][0] if stopped else full_tokens(study)
    final = dict(one.guess.final)
    if stopped:
        final = {name: final[name] for name in ("tokens_per_s", "peak_memory_bytes") if name in final}
    if "peak_memory_bytes" in final:
        final["peak_memory_bytes"] = round(final["peak_memory_bytes"])
    one.row.update(
        final,
        status="pruned" if stopped else "completed",
        num_tokens=tokens,
        num_steps=tokens // study.train.global_batch_tokens,
        train_s=now_s - one.started_s,
        device="simulated",
        ended_at=_at(now_s),
    )


def _eval_rows(trial: int, curve: list[Point], tokens_per_step: int) -> Iterator[Row]:
    for tokens, metrics in curve:
        for column, value in metrics.items():
            yield {
                "trial": trial,
                "attempt": 1,
                "step": tokens // tokens_per_step,
                "num_tokens": tokens,
                "split": "validation",
                "name": EVALUATED[column],
                "value": value,
            }


def _at(seconds: float) -> datetime.datetime:
    return EPOCH + datetime.timedelta(seconds=seconds)


def simulate_study(study: StudyConfig, study_dir: str, recorded: Recorded) -> str | None:
    """Simulate a study and write its rows, in the place of those of an earlier simulation.

    Returns:
        Why the search ended before its number of trials, if it did.
    """
    found = simulate(study, recorded)
    schema = results.trial_schema(space.column_types(study))
    tables = {
        "trials": pa.Table.from_pylist(found.trials, schema=schema),
        "evals": pa.Table.from_pylist(found.evals, schema=results.ROW_SCHEMAS["evals"]),
    }
    storage.write_bytes(storage.join(study_dir, "study.yaml"), dump_study(study).encode())
    for name, table in tables.items():
        results.write_table(storage.join(study_dir, name, "simulated.parquet"), table)
    return found.over
