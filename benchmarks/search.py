"""Which sampler and scheduler find a good point for fewer tokens: on recorded curves, in seconds.

    python benchmarks/search.py                        # the table and docs/images/search_benchmark.png
    python benchmarks/search.py --seeds 5 --full 20    # fewer seeds, fewer tokens
    python benchmarks/search.py --record DIR           # curves of another study (at least 60 configurations)
    python benchmarks/search.py --json search.json     # and the numbers

Every contender searches with the same tokens, given in full trials, on the same curves: those of
benchmarks/recorded_curves, a small GPT-2 trained at full budget at points drawn at random (README.md beside
this file says how). What a contender has found by then is the best validation loss among its trials that came
to their end; the baseline is not part of it, and costs everybody the same. The last column is the time of a
whole simulated study divided by its trials: what the search itself costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from raydisp.config import StudyConfig
from raydisp.search.stopping import full_tokens
from raydisp.simulate import Recorded, load_recorded, simulate

HERE = Path(__file__).parent
RECORD = HERE / "recorded_curves"
PICTURE = HERE.parent / "docs" / "images" / "search_benchmark.png"


def contenders(full: int) -> dict[str, dict[str, Any]]:
    """Name -> changes to the `search` section."""
    asha = {"asha": {"grace_tokens": full // 12 // 8192 * 8192 or 8192, "reduction_factor": 3}}
    return {
        "random": {"sampler": "random"},
        "qmc": {"sampler": "qmc"},
        "tpe": {"sampler": "tpe", "num_startup_trials": 10},
        "random + asha": {"sampler": "random", "scheduler": asha},
        "tpe + asha": {"sampler": "tpe", "num_startup_trials": 10, "scheduler": asha},
    }


def run(
    tree: dict[str, Any], changes: dict[str, Any], seed: int, num_full: int, recorded: Recorded
) -> dict[str, Any]:
    """One simulated study: tokens spent and the best value after each trial, and seconds per trial."""
    full = full_tokens(StudyConfig.model_validate(tree))
    search = {**tree["search"], **changes, "num_trials": 100_000, "max_tokens_total": (num_full + 1) * full}
    study = StudyConfig.model_validate({**tree, "seed": seed, "search": search})
    started = time.perf_counter()
    rows = simulate(study, recorded).trials
    seconds = time.perf_counter() - started
    spent, best, history = 0, float("inf"), []
    for row in rows:
        if row["arm"] == "baseline":
            continue
        spent += row["num_tokens"]
        if row["status"] == "completed":
            best = min(best, row["val_loss"])
        history.append((spent / full, best))
    return {"history": history, "trials": len(history), "seconds_per_trial": seconds / len(rows)}


def best_at(history: list[tuple[float, float]], full_trials: float) -> float:
    """The best value when so many full trials' tokens were spent; infinite before the first has ended."""
    return min((best for spent, best in history if spent <= full_trials), default=float("inf"))


def draw(found: dict[str, list[dict[str, Any]]], num_full: int, floor: float, place: Path) -> None:
    """Median and quartiles of the best value against tokens, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    colours = ["#999999", "#56B4E9", "#0072B2", "#E69F00", "#D55E00"]  # Okabe and Ito: told apart by all eyes
    grid = np.linspace(1, num_full, 200)
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for (name, runs), colour in zip(found.items(), colours, strict=False):
        values = np.array([[best_at(one["history"], at) for at in grid] for one in runs])
        low, middle, high = np.quantile(
            np.where(np.isfinite(values), values, np.nan), [0.25, 0.5, 0.75], axis=0
        )
        axes.plot(grid, middle, color=colour, label=name, linewidth=2)
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(floor, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        "best recorded point", (num_full, floor), (0, 3), textcoords="offset points", ha="right", size=8
    )
    axes.set_xlabel("tokens spent, in full trials")
    axes.set_ylabel("best validation loss so far (nats per token)")
    axes.set_title(f"Median and quartiles over {len(next(iter(found.values())))} seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", default=str(RECORD), help="a results folder with recorded curves")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--full", type=int, default=40, help="tokens of each study, in full trials")
    parser.add_argument("--slots", type=int, default=4, help="trials side by side")
    parser.add_argument("--picture", default=str(PICTURE))
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    tree = yaml.safe_load((Path(arguments.record) / "study.yaml").read_text())
    tree["resources"]["max_concurrent_trials"] = arguments.slots
    study = StudyConfig.model_validate(tree)
    recorded = load_recorded(study, arguments.record)
    floor = min(recorded.finals("val_loss"))
    marks = [at for at in (5, 10, 20, 40, 80) if at <= arguments.full]
    print(
        f"{len(recorded)} recorded configurations, best {floor:.4f}; {arguments.seeds} seeds, "
        f"{arguments.slots} at a time"
    )
    heads = "".join(f"{f'best at {mark}':>24}" for mark in marks)
    print(f"{'':<16}{heads}{'trials':>8}{'ms per trial':>14}")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, changes in contenders(full_tokens(study)).items():
        runs = []
        for seed in range(arguments.seeds):
            runs.append(run(tree, changes, seed, arguments.full, recorded))
            if sys.stderr.isatty():
                print(f"\r{name}: seed {seed + 1} of {arguments.seeds}", end="\033[K\r", file=sys.stderr)
        found[name] = runs
        cells = []
        for mark in marks:
            values = [best_at(one["history"], mark) for one in runs]
            low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
            cells.append(f"{f'{middle:.4f} ({low:.4f}, {high:.4f})':>24}")
        trials = statistics.median(one["trials"] for one in runs)
        cost = 1000 * statistics.median(one["seconds_per_trial"] for one in runs)
        print(f"{name:<16}{''.join(cells)}{trials:>8.0f}{cost:>14.1f}", flush=True)
    draw(found, arguments.full, floor, Path(arguments.picture))
    print(f"Picture: {arguments.picture}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
