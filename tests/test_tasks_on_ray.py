"""Benchmarks through a real study: two workers, confirm phase, verdict, the exported model in the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import run_command
from task_files import CHOICE, NUM_ITEMS, TEXT, WORD, write_tasks
from test_benchmark_tasks import TOLERANCE, harness_alone
from test_confirm_on_ray import command
from test_on_ray import attempts_of, write

from raydisp import results
from raydisp.tasks import effects as task_effects

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ENTRIES = [
    {"name": CHOICE, "num_fewshot": 1},
    {"name": TEXT, "limit": 5},
    {"name": WORD, "metric": "perplexity"},
]


def test_two_workers_score_as_the_harness_scores_the_exported_model(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    task_dir = write_tasks(tmp_path / "tasks")
    tree["train"]["strategy"] = "ddp"
    tree["evaluate"] |= {"tasks": ENTRIES, "task_paths": [str(task_dir)]}
    tree["resources"] = {"num_workers": 2, "max_concurrent_trials": 1}
    tree["search"] = {
        "num_trials": 1,
        "space": {"dispersion.weight": {"low": 0.1, "high": 1.0}},
        "sampler": "random",
    }
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    path = write(tree, tmp_path / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    rows = attempts_of(tree)
    assert {(row["status"], row["world_size"], row["error_message"]) for row in rows} == {
        ("completed", 2, None)
    }
    folder = tmp_path / "out" / "tiny"
    evals = results.read_table(str(folder), "evals").to_pylist()
    told = {(row["trial"], row["step"]) for row in evals if row["split"] == "tasks"}
    assert told == {(row["trial"], step) for row in rows for step in (0, 10)}
    items = results.read_table(str(folder), "items")
    assert items.num_rows == len(rows) * 2 * (NUM_ITEMS[CHOICE] + 5 + NUM_ITEMS[WORD])

    done_too = command("export", folder, "--arm", "baseline", "--to", tmp_path / "exported")
    assert done_too.returncode == 0, done_too.stderr
    (trial,) = {
        row["trial"] for row in rows if (row["phase"], row["arm"], row["seed"]) == ("confirm", "baseline", 4)
    }
    values = {
        row["name"]: row["value"]
        for row in evals
        if (row["trial"], row["step"], row["split"]) == (trial, 10, "tasks")
    }
    for entry in ENTRIES:
        alone = harness_alone(tmp_path / "exported", task_dir, entry)["results"][entry["name"]]
        expected = {
            f"{entry['name']}/{key.removesuffix(',none')}": value
            for key, value in alone.items()
            if "," in key and "_stderr" not in key
        }
        assert expected
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=TOLERANCE)

    tables = results.read_tables(str(folder))
    compared = task_effects.benchmarks(tables.trials, tables.evals, tables.items)
    assert pq.read_table(folder / "benchmarks" / "benchmarks.parquet").equals(compared)
    assert compared["benchmark"].to_pylist() == [CHOICE, TEXT, WORD]
    assert compared["num_pairs"].to_pylist() == [2, 2, 2]
    for sentence in task_effects.sentences(compared):
        assert sentence in done.stdout
    assert "<h2>Benchmarks</h2>" in (folder / "report.html").read_text()
    again = run_command(path, "--address", address)
    assert again.returncode == 0
    assert "trials are done already" in again.stdout
