"""What a trial costs beyond its training, and how soon a study trains.

    python benchmarks/trial_overhead.py                          # the table, three rounds of both studies
    python benchmarks/trial_overhead.py --json overhead.json     # and the numbers, for comparison over time
    python benchmarks/trial_overhead.py --studies one --rounds 1 # only one-worker trials, once

Each round runs two studies with the real command, `python -m raydisp.study`, on a Ray of its own: twelve
trials of one worker (the baseline and eleven searched ones) and four trials of two workers. The data cache is
warm: a study of one trial made it before.

overhead per trial, seconds = (slots x wall - sum of train_s) / trials

where slots is how many trials run at a time, train_s the training loop of a trial as its row has it, and wall
is taken twice: *command* from the command's start to its exit, Ray's start and the report included; *trials*
from the first trial's started_at to the last one's ended_at. *First step* is from the command's start to the
first training step of any trial. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from raydisp import results

STUDIES = {"one": (1, 12), "two": (2, 4)}
"""Name -> (workers of a trial, trials with the baseline)."""


def make_tree(name: str, num_workers: int, num_trials: int, steps: int, slots: int) -> dict[str, Any]:
    """A study of a small GPT-2 on the prose that ships with CPython."""
    tokens_per_step = 1024
    sizes = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 4096}
    return {
        "name": name,
        "seed": 0,
        "model": {"source": "scratch", **sizes},
        "data": {"source": "python_docs", "context_length": 128},
        "train": {
            "budget_tokens": steps * tokens_per_step,
            "global_batch_tokens": tokens_per_step,
            "learning_rate": 2e-3,
        },
        "search": {
            "num_trials": num_trials - 1,
            "space": {"dispersion.weight": {"low": 0.01, "high": 2.0, "log": True}},
            "sampler": "random",
        },
        "evaluate": {"every_tokens": steps * tokens_per_step // 2, "max_tokens": 8192},
        "resources": {"num_workers": num_workers, "cpus_per_worker": 1, "max_concurrent_trials": slots},
    }


def run_study(tree: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Run it by the command; returns when the command started and when it ended, seconds since the epoch."""
    tree = {**tree, "output": str(folder)}
    path = folder / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    command = [sys.executable, "-m", "raydisp.study", str(path), "--address", "local", "--quiet"]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    ended = time.time()
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return started, ended


def measure(tree: dict[str, Any], folder: Path) -> dict[str, float]:
    """One run of one study: overhead per trial by both walls, and the first step; seconds."""
    started, ended = run_study(tree, folder)
    rows = results.read_tables(str(folder / tree["name"])).trials.to_pylist()
    slots = tree["resources"]["max_concurrent_trials"]
    training = sum(row["train_s"] for row in rows)
    begun = [row["started_at"].timestamp() for row in rows]
    span = max(row["ended_at"].timestamp() for row in rows) - min(begun)
    return {
        "command_overhead_s": (slots * (ended - started) - training) / len(rows),
        "trials_overhead_s": (slots * span - training) / len(rows),
        "first_trial_s": min(begun) - started,
        "first_step_s": min(at + row["startup_s"] for at, row in zip(begun, rows, strict=True)) - started,
        "end_s": ended - max(row["ended_at"].timestamp() for row in rows),
        "startup_s": statistics.median(row["startup_s"] for row in rows),
        "train_s": training / len(rows),
        "wall_s": ended - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each trial, 1,024 tokens each")
    parser.add_argument("--json", metavar="FILE", help="write machine, versions and rounds here too")
    arguments = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    machine = {"cpus": cpus, "python": platform.python_version()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    print(
        f"{'trials':<12} {'slots':>5} {'overhead per trial, s':>22} {'':>8} {'first step, s':>14}"
        f" {'start-up, s':>12} {'training, s':>12} {'wall, s':>8}\n"
        f"{'':<12} {'':>5} {'by command':>13} {'by trials':>17}"
    )
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.studies}
    with tempfile.TemporaryDirectory(prefix="raydisp-benchmark-") as scratch:
        folder = Path(scratch)
        run_study(make_tree("warm", 1, 2, 2, 1), folder)
        for number in range(arguments.rounds):
            for name in arguments.studies:
                num_workers, num_trials = STUDIES[name]
                slots = max(1, cpus // num_workers)
                tree = make_tree(f"{name}-{number}", num_workers, num_trials, arguments.steps, slots)
                found = measure(tree, folder)
                rounds[name].append(found)
                print_row(f"{num_trials} x {num_workers}, {number + 1}", slots, found)
    print("medians")
    for name, found_rounds in rounds.items():
        num_workers, num_trials = STUDIES[name]
        medians = {key: statistics.median(found[key] for found in found_rounds) for key in found_rounds[0]}
        print_row(f"{num_trials} x {num_workers}", max(1, cpus // num_workers), medians)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "rounds": rounds}, file, indent=2)
            file.write("\n")


def print_row(name: str, slots: int, found: dict[str, float]) -> None:
    print(
        f"{name:<12} {slots:>5} {found['command_overhead_s']:>13.1f} {found['trials_overhead_s']:>17.1f}"
        f" {found['first_step_s']:>14.1f} {found['startup_s']:>12.1f} {found['train_s']:>12.1f}"
        f" {found['wall_s']:>8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
