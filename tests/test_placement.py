"""Two ways of placing a trial, in its own process and by Ray Train, held to the same checks; reused ones.

One Ray for the module; every trial through Ray Train costs several processes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import run_command
from ray import tune
from ray.util.state import list_actors
from test_on_ray import attempts_of, left_on_cluster, write
from test_worker import assign

from raydisp import results
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.search.agenda import Agenda
from raydisp.search.on_tune import Launch, _trainable, run_search
from raydisp.tally import Watcher
from raydisp.trial.assignment import Assignment, Report
from raydisp.trial.attempts import run_attempt, run_trial

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

Row = dict[str, Any]
NUM_TRIALS = {1: 4, 2: 2}
"""Workers of a trial -> trials, with the baseline."""


def trial_processes() -> set[str]:
    """The processes that Tune has started for trials on this Ray; Ray forgets those of a command that ended
    five minutes ago, so that their number alone tells nothing."""
    here = ray.get_runtime_context().gcs_address  # another Ray may run on the machine
    actors = list_actors(address=here, limit=1000)
    return {actor.actor_id for actor in actors if actor.class_name == "ImplicitFunc"}


@dataclasses.dataclass(frozen=True)
class Placed:
    tree: dict[str, Any]
    folder: Path
    num_processes: int
    stderr: str

    @property
    def num_workers(self) -> int:
        return self.tree["resources"]["num_workers"]


@pytest.fixture(scope="module", params=[1, 2], ids=["own process", "Ray Train"])
def placed(
    request: pytest.FixtureRequest,
    address: str,
    tmp_path_factory: pytest.TempPathFactory,
    corpus_dir: Path,
) -> Placed:
    """A study through the command, one trial at a time."""
    workers = request.param
    tree = {
        "name": f"placed-{workers}",
        "seed": 5,
        "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 2560, "global_batch_tokens": 128, "learning_rate": 2e-3},
        "search": {
            "num_trials": NUM_TRIALS[workers] - 1,
            "space": {"dispersion.weight": {"low": 0.1, "high": 1.0}},
            "sampler": "random",
        },
        "evaluate": {"every_tokens": 640, "max_tokens": 256},
        "checkpoint": {"every_tokens": 1280},
        "resources": {"num_workers": workers, "max_concurrent_trials": 1},
    }
    path = write(tree, tmp_path_factory.mktemp("placed"))
    before = trial_processes()
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    folder = Path(tree["output"]) / tree["name"]
    return Placed(tree, folder, len(trial_processes() - before), done.stderr)


def test_every_trial_is_a_whole_row(placed: Placed) -> None:
    rows = attempts_of(placed.tree)
    assert [row["trial"] for row in rows] == list(range(NUM_TRIALS[placed.num_workers]))
    for row in rows:
        assert (row["status"], row["attempt"], row["world_size"]) == ("completed", 1, placed.num_workers)
        assert (row["num_steps"], row["num_tokens"]) == (20, 2560)
        assert row["error_type"] is None
        assert row["val_loss"] > 0
        assert row["peak_memory_bytes"] > 2**26
        assert row["started_at"] < row["ended_at"]
        took = (row["ended_at"] - row["started_at"]).total_seconds()
        assert row["startup_s"] > 0
        assert row["startup_s"] + row["train_s"] < took + 1
    begun = [row["started_at"] for row in rows[1:]]
    assert all(at >= row["ended_at"] for at, row in zip(begun, rows, strict=False)), "one at a time"


def test_evaluations_and_steps_are_complete(placed: Placed) -> None:
    tables = results.read_tables(str(placed.folder))
    for trial in range(NUM_TRIALS[placed.num_workers]):
        steps = [row["step"] for row in tables.steps.to_pylist() if row["trial"] == trial]
        losses = [
            row["step"] for row in tables.evals.to_pylist() if row["trial"] == trial and row["name"] == "loss"
        ]
        assert steps == list(range(1, 21))
        assert losses == [0, 5, 10, 15, 20]


def test_each_end_is_told(placed: Placed) -> None:
    for row in attempts_of(placed.tree):
        assert (
            f"trial {row['trial']} ({row['arm']}) completed: val_loss {row['val_loss']:.4f}" in placed.stderr
        )


def test_nothing_is_left(placed: Placed) -> None:
    assert left_on_cluster() == {"actors": [], "placement_groups": []}
    assert [place.name for place in placed.folder.glob("checkpoints/*")] == []
    assert not (placed.folder / ".ray").exists()


def test_trials_share_a_process(placed: Placed) -> None:
    assert placed.num_processes == 1


def read_steps(study_dir: str) -> list[Row]:
    return results.read_tables(study_dir).steps.to_pylist()


def test_the_losses_are_those_of_a_trial_alone(placed: Placed, tmp_path: Path) -> None:
    """To the bit where a trial trains in a reused process; with two workers, sums come in another order."""
    tree = copy.deepcopy(placed.tree)
    tree["resources"]["num_workers"] = 1
    row = attempts_of(placed.tree)[-1]
    values = {"dispersion.weight": row["dispersion.weight"]}
    alone = assign(tree, tmp_path, str(tmp_path / "cache"), trial=row["trial"], values=values)
    assert run_attempt(alone, lambda report: None)["status"] == "completed"
    here, there = (
        [step["loss"] for step in read_steps(place) if step["trial"] == row["trial"]]
        for place in (str(tmp_path / "results"), str(placed.folder))
    )
    assert len(there) == 20
    assert there == (here if placed.num_workers == 1 else pytest.approx(here, rel=1e-5))


# --- processes that must not be used again ------------------------------------------------------------


def run_here(
    tree: dict[str, Any], tmp_path: Path, run: Any, num_trials: int
) -> tuple[list[Row], list[Row], int]:
    """A search in this process with another way to run a trial, one at a time.

    Returns:
        rows as they were told, rows as they lie in the results, how many processes were started.
    """
    tree = {**tree, "resources": {"max_concurrent_trials": 1}}
    first = assign(tree, tmp_path, str(tmp_path / "cache"))
    launch = Launch(
        study=StudyConfig.model_validate(tree),
        study_dir=first.study_dir,
        cache_dir=first.cache_dir,
        working_dir=first.working_dir,
        prepared=first.prepared,
        model_revision=None,
        code_version="0",
        packages={},
        plan=Plan(1, 1, 0, 1),
    )
    agenda = Agenda(finished=[], resumed=[], fixed=[], new=list(range(1, num_trials + 1)))
    told: list[Row] = []
    before = trial_processes()

    class Told(Watcher):
        def finished(self, row: Row) -> None:
            told.append(row)

    run_search(launch, agenda, watcher=Told(), run=run)
    rows = results.read_tables(first.study_dir).attempts.to_pylist()
    return told, rows, len(trial_processes() - before)


def test_a_thread_that_stays_ends_the_process_and_no_trial(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    def run(assignment: Assignment, report: Report) -> Row:
        row = run_trial(assignment, report)
        if assignment.trial == 1:
            threading.Thread(target=time.sleep, args=(300,), daemon=False).start()
        return row

    started = time.monotonic()
    told, rows, processes = run_here(tree, tmp_path, run, 3)
    assert [(row["trial"], row["status"], row["attempt"]) for row in rows] == [
        (trial, "completed", 1) for trial in (1, 2, 3)
    ]
    assert [row["status"] for row in told] == ["completed"] * 3
    assert processes == 2
    assert time.monotonic() - started < 250, "nobody waited for the thread"


def test_a_trial_that_fails_takes_its_process_along(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """What an error leaves behind is unknown, on a GPU most of all."""
    tree["search"]["space"] = {"dispersion.weight": {"low": 0.1, "high": 1.0}}

    def run(assignment: Assignment, report: Report) -> Row:
        if assignment.trial == 2:
            assignment = dataclasses.replace(assignment, values={**assignment.values, "model.num_heads": 3})
        return run_trial(assignment, report)

    told, rows, processes = run_here(tree, tmp_path, run, 4)
    assert [row["status"] for row in rows] == ["completed", "failed", "completed", "completed"]
    assert [row["status"] for row in told] == ["completed", "failed", "completed", "completed"]
    assert [row["error_type"] for row in rows] == [None, "ConfigError", None, None]
    assert {row["attempt"] for row in rows} == {1}
    assert processes == 2


def test_a_slow_end_is_waited_for(tree: dict[str, Any], tmp_path: Path, address: str) -> None:
    """Tune waits 2 s by default for a stopped trial's function, and then fails the trial that comes next."""

    def run(assignment: Assignment, report: Report) -> Row:
        try:
            for step in range(1, 10):
                report({"step": step, "process": os.getpid()})
        finally:
            time.sleep(4)
        raise AssertionError("it was stopped")

    study = StudyConfig.model_validate(tree)
    found = tune.Tuner(
        tune.with_resources(_trainable(study, run), {"CPU": 1}),
        param_space=dataclasses.asdict(assign(tree, tmp_path, str(tmp_path / "cache"))),
        tune_config=tune.TuneConfig(num_samples=3, max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(stop={"step": 2}, storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert [result.error for result in found] == [None] * 3
    assert [result.metrics["step"] for result in found] == [2] * 3
    assert len({result.metrics["process"] for result in found}) == 1
