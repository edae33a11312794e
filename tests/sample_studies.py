"""Results folders made of rows, for the tests of the report: small, with arms, of many trials, odd."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from test_analysis import SEARCHED, STARTED, layer_rows, sample_tables, trial_row
from test_verdict import plan, rows_of, run, shifted

from raydisp import results, storage

STEPS, TOKENS_PER_STEP = 50, 4096
STUDY: dict[str, Any] = {
    "name": "weight_search",
    "model": {"source": "scratch", "family": "gpt2", "num_layers": 6, "hidden_size": 128, "num_heads": 4},
    "data": {"source": "python_docs", "context_length": 128},
    "search": {"num_trials": 8, "objective": {"metric": "val_loss", "mode": "min"}},
}


def step_rows(row: dict[str, Any], *, num_steps: int = STEPS) -> list[dict[str, Any]]:
    """The steps of a trial, whose loss falls towards the trial's."""
    draw = np.random.default_rng(row["trial"])
    end = row["val_loss"] or 5.3
    rows = []
    for step in range(1, num_steps + 1):
        loss = float(end + 3.0 * np.exp(-6 * step / num_steps) + draw.normal(0, 0.03))
        weight = row["dispersion.weight"]
        dispersion = float(-0.3 - 0.2 * step / num_steps) if weight else None
        rows.append(
            {
                "trial": row["trial"],
                "attempt": 1,
                "step": step,
                "num_tokens": step * TOKENS_PER_STEP,
                "loss": loss + (weight or 0.0) * (dispersion or 0.0),
                "lm_loss": loss,
                "dispersion_loss": dispersion,
                "grad_norm": float(abs(draw.normal(1, 0.2))),
                "learning_rate": 1e-3,
                "elapsed_s": 1.4 * step,
            }
        )
    return rows


def eval_rows(row: dict[str, Any], *, num_steps: int = STEPS) -> list[dict[str, Any]]:
    """Validation losses of a trial at four evaluations."""
    end = row["val_loss"] or 5.3
    return [
        {
            "trial": row["trial"],
            "attempt": 1,
            "step": step,
            "num_tokens": step * TOKENS_PER_STEP,
            "split": "validation",
            "name": "loss",
            "value": float(end + 3.0 * np.exp(-6 * step / STEPS)),
            "num_items": 1000,
            "stderr": 0.01,
        }
        for step in (0, 12, 25, 37, 50)
        if step <= num_steps
    ]


def with_curves(tables: results.Tables) -> results.Tables:
    """The tables with steps and evaluations of the trials of the search."""
    steps: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    for row in tables.trials.to_pylist():
        if row["phase"] == "search" and row["status"] in ("completed", "pruned"):
            number = STEPS if row["status"] == "completed" else 25
            steps += step_rows(row, num_steps=number)
            evals += eval_rows(row, num_steps=number)
    return dataclasses.replace(
        tables,
        steps=pa.Table.from_pylist(steps, schema=results.STEP_SCHEMA),
        evals=pa.Table.from_pylist(evals, schema=results.EVAL_SCHEMA),
    )


def pruned_row(trial: int) -> dict[str, Any]:
    """A trial that a scheduler stopped halfway."""
    return trial_row(trial, status="pruned", num_tokens=25 * TOKENS_PER_STEP, num_steps=25, val_loss=5.4)


def small(number: int = 12) -> results.Tables:
    """A baseline and trials of one arm, every fifth of them pruned."""
    rows = [trial_row(0)]
    rows += [pruned_row(trial) if trial % 5 == 0 else trial_row(trial) for trial in range(1, number + 1)]
    return with_curves(sample_tables(rows))


def armed() -> results.Tables:
    """Three arms that were all tuned, of two objectives, and their confirm phase."""
    searched = {"train.learning_rate": pa.float64(), **SEARCHED}
    arms = ("baseline", "dispersion", "noisy")
    rows = []
    for trial in range(30):
        arm = arms[trial % 3]
        rate = float(np.random.default_rng(900 + trial).uniform(1e-3, 8e-3))
        row = trial_row(trial + 1) | {"trial": trial, "arm": arm, "train.learning_rate": rate}
        if arm != "dispersion":
            nothing = {"dispersion.weight": 0.0, "dispersion.temperature": None, "dispersion.layers": None}
            row |= {**nothing, "val_loss": 5.23 + (rate - 3e-3) ** 2 * 1e3}
        rows.append(row)
    arm_plan = plan(arms={name: {"description": name} for name in arms[1:]}, first_trial=40)
    confirmed = rows_of({"dispersion": shifted(-0.05), "noisy": shifted(0.002, 2.0)}, arm_plan)[2:]
    for number, row in enumerate(confirmed):
        weight = 0.8 if row["arm"] == "dispersion" else 0.0
        row |= {"trial": 40 + number, "dispersion.weight": weight, "val_loss": row["test_loss"]}
    return with_curves(sample_tables(rows + confirmed, searched))


def many(number: int, *, curves: bool = True) -> results.Tables:
    """A baseline and many trials on three hosts; layers of a few of them are measured once and copied."""
    draw = np.random.default_rng(0)
    rows = [trial_row(0)]
    for trial in range(1, number + 1):
        start = STARTED + datetime.timedelta(seconds=8.0 * trial)
        row = pruned_row(trial) if draw.random() < 0.3 else trial_row(trial)
        if draw.random() < 0.02:
            row |= {"status": "failed", "val_loss": None, "error_type": "RuntimeError", "error_message": "no"}
        row |= {
            "hostname": f"node-{trial % 3}",
            "started_at": start,
            "ended_at": start + datetime.timedelta(seconds=60 + float(draw.uniform(0, 20))),
            "study_json": "x" * 3000,
            "packages_json": "y" * 2000,
        }
        rows.append(row)
    tables = sample_tables(rows[:1])
    templates = [layer_rows(trial, weight=0.2 * trial) for trial in range(4)]
    layers = [
        layer | {"trial": row["trial"]}
        for row in rows
        if row["status"] == "completed"
        for layer in templates[row["trial"] % 4]
    ]
    trials = sample_tables([]).trials.schema
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in trials.names} for row in rows], schema=trials
    )
    tables = dataclasses.replace(
        tables, trials=table, attempts=table, layers=pa.Table.from_pylist(layers, schema=results.LAYER_SCHEMA)
    )
    return with_curves(tables) if curves else tables


def write(folder: Path, tables: results.Tables, study: dict[str, Any] | None = None) -> str:
    """A results folder as a study leaves it behind, its four datasets."""
    place = str(folder)
    for name in ("trials", "steps", "evals", "layers"):
        table = getattr(tables, name)
        if table.num_rows:
            results.write_table(storage.join(place, name, "all.parquet"), table)
    text = yaml.safe_dump(STUDY if study is None else study)
    storage.write_bytes(storage.join(place, "study.yaml"), text.encode())
    return place


__all__ = ["armed", "many", "pruned_row", "run", "small", "with_curves", "write"]
