"""What a study costs the head of a cluster: trials that do no work, as many at a time as the machine holds.

    python benchmarks/head_load.py                          # 4, 16 and 64 at a time, and one of two workers
    python benchmarks/head_load.py --concurrent 8 --rounds 2
    python benchmarks/head_load.py --json head_load.json

*Waves* run the real search, Tune and Optuna included, on a Ray that is told it has as many CPUs as trials are
to run at a time. A trial is a process of its own, as always, that writes its row and ends: what is left of it
is what the head does for it. Trials per second are counted once every process has had two, without the start
of processes; the driver's CPU seconds per trial are those of the command's process. Memory is the
proportional set size (PSS), which counts once what processes share.

*Of a trial of several workers* these run on the head, wherever it trains: its driver, Ray Train's controller,
and the process that cleans up after both. They are measured while a real trial of two workers trains.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from raydisp import results
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.data import prepare
from raydisp.search import space
from raydisp.search.agenda import Agenda
from raydisp.search.dispatch import Launch
from raydisp.search.on_tune import run_search
from raydisp.trial.assignment import Assignment, blank_row
from raydisp.trial.attempts import run_trial

OF_THE_HEAD = {
    "ray::ImplicitFunc": "driver of the trial",
    "ray::TrainController": "Ray Train's controller",
    "ray::PlacementGroupCleaner": "placement-group cleaner",
    "gcs_server": "Ray's control store",
    "raylet": "raylet",
    "dashboard": "dashboard",
}


def study_of(num_trials: int, num_workers: int, steps: int, output: str) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "load",
            "model": {
                "source": "scratch",
                "num_layers": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "vocab_size": 512,
            },
            "data": {"source": "python_docs", "context_length": 64},
            "train": {"budget_tokens": 512 * steps, "global_batch_tokens": 512, "learning_rate": 2e-3},
            "search": {
                "num_trials": num_trials,
                "space": {"dispersion.weight": {"low": 0.01, "high": 2.0, "log": True}},
                "num_startup_trials": max(1, num_trials // 2),
            },
            "evaluate": {"every_tokens": 512 * steps // 2, "max_tokens": 512},
            "resources": {"num_workers": num_workers},
            "output": output,
        }
    )


def launch_of(study: StudyConfig, concurrent: int, prepared: str) -> Launch:
    workers = study.resources.max_workers
    plan = Plan(workers, 1.0, 0.0, concurrent, through_ray_train=workers > 1)
    folder = f"{study.output}/{study.name}"
    return Launch(study, folder, f"{study.output}/.cache", folder, prepared, None, "benchmark", {}, plan)


def no_work(assignment: Assignment, report: Any) -> dict[str, Any]:
    """A trial that reports once, writes its row and is done."""
    study = StudyConfig.model_validate(assignment.study)
    row = blank_row(assignment, study, time.time())
    results.write_trial(assignment.study_dir, row, space.column_types(study))
    value = 3 + assignment.values["dispersion.weight"] / 10
    report({"step": 1, "num_tokens": 512, "val_loss": value, "elapsed_s": 0.0})
    row |= {"status": "completed", "num_steps": 1, "num_tokens": 512, "val_loss": value}
    row |= {"ended_at": results.now()}
    results.write_trial(assignment.study_dir, row, space.column_types(study))
    return row


def memory_by_kind() -> dict[str, tuple[int, float]]:
    """Kind of process -> number and MiB of each, on this Ray."""
    found = collections.defaultdict(list)
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            kind = next((name for key, name in OF_THE_HEAD.items() if key in title), None)
            if kind is not None:
                found[kind].append(process.memory_full_info().pss / 2**20)
        except psutil.Error:
            continue
    return {kind: (len(sizes), sum(sizes) / len(sizes)) for kind, sizes in found.items()}


def wave(concurrent: int, rounds: int) -> dict[str, Any]:
    """A search of `rounds` trials for each slot."""
    number = concurrent * rounds
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local",
            num_cpus=concurrent,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
        )
        try:
            study = study_of(number, 1, 1, folder)
            ended: list[float] = []
            memory: dict[str, tuple[int, float]] = {}
            before = psutil.Process().cpu_times()
            started = time.perf_counter()

            def on_finished(row: dict[str, Any]) -> None:
                ended.append(time.perf_counter() - started)
                if len(ended) == number - concurrent // 2:
                    memory.update(memory_by_kind())

            agenda = Agenda(finished=[], resumed=[], fixed=[], new=list(range(1, number + 1)))
            run_search(
                launch_of(study, concurrent, ""),
                agenda,
                on_result=lambda result: None,
                on_finished=on_finished,
                run=no_work,
            )
            after = psutil.Process().cpu_times()
        finally:
            ray.shutdown()
    assert len(ended) == number, f"{len(ended)} of {number} trials ended"
    begun = min(2 * concurrent, number - 1)
    return {
        "concurrent": concurrent,
        "trials": number,
        "first_wave_s": ended[concurrent - 1],
        "trials_per_s": (number - begun) / max(1e-9, ended[-1] - ended[begun - 1]),
        "driver_cpu_s_per_trial": (after.user + after.system - before.user - before.system) / number,
        "memory": memory,
    }


def several_workers() -> dict[str, tuple[int, float]]:
    """What a trial of two workers puts on the head."""
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=40,
        )
        try:
            study = study_of(1, 2, 4000, folder)
            launch = launch_of(study, 1, prepare(study.trial, f"{folder}/.cache"))
            seen: list[dict[str, tuple[int, float]]] = []
            over = threading.Event()

            def watch() -> None:
                while not over.wait(2.0):
                    seen.append(memory_by_kind())

            thread = threading.Thread(target=watch)
            thread.start()
            try:
                run_search(
                    dataclasses.replace(launch),
                    Agenda(finished=[], resumed=[], fixed=[], new=[1]),
                    on_result=lambda result: None,
                    on_finished=lambda row: print(f"  a trial of two workers: {row['status']}"),
                    run=run_trial,
                )
            finally:
                over.set()
                thread.join()
        finally:
            ray.shutdown()
    return max(seen, key=lambda one: sum(number * size for number, size in one.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrent", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=4, help="trials of each slot")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    waves = [wave(concurrent, arguments.rounds) for concurrent in arguments.concurrent]
    print(
        "\n| at a time | trials | first wave, s | trials/s | driver, CPU s/trial | a trial's process, MiB |"
    )
    print("|---|---|---|---|---|---|")
    for one in waves:
        size = one["memory"].get("driver of the trial", (0, float("nan")))[1]
        print(
            f"| {one['concurrent']} | {one['trials']} | {one['first_wave_s']:.1f} | "
            f"{one['trials_per_s']:.1f} | {one['driver_cpu_s_per_trial']:.3f} | {size:.0f} |"
        )
    kinds = several_workers()
    print("\n| on the head, of a trial of two workers | number | MiB each |\n|---|---|---|")
    for kind, (number, size) in kinds.items():
        print(f"| {kind} | {number} | {size:.0f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"waves": waves, "several_workers": kinds}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
