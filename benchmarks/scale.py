"""What a large study costs besides its training: a thousand simulated trials, ten thousand rows.

    python benchmarks/scale.py                  # both
    python benchmarks/scale.py --trials 200 --rows 2000
    python benchmarks/scale.py --json scale.json

Time per simulated trial is that of a whole study, `simulate`, divided by its trials: suggesting, telling,
stopping and the guess of each curve. Memory is how much the resident set grows from a study of a tenth of the
trials to one of all of them. Rows are read from files of one row each, as trials leave them, and from the
compact file that `python -m raydisp.results compact` makes of them; summarising is what the command prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import yaml

from raydisp import analysis, results
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.results.compaction import compact
from raydisp.search import space
from raydisp.search.dispatch import Launch
from raydisp.simulate import load_recorded, simulate
from raydisp.trial.assignment import blank_row

RECORD = Path(__file__).parent / "recorded_curves"
ASHA = {"asha": {"grace_tokens": 8192, "reduction_factor": 3}}
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random"},
    "tpe": {"sampler": "tpe"},
    "tpe + asha": {"sampler": "tpe", "scheduler": ASHA},
}


def simulated(num_trials: int) -> list[dict[str, Any]]:
    """Milliseconds and memory of searches of so many trials, four at a time."""
    tree = yaml.safe_load((RECORD / "study.yaml").read_text())
    tree["resources"] = {**tree.get("resources", {}), "max_concurrent_trials": 4}
    recorded = load_recorded(StudyConfig.model_validate(tree), str(RECORD))
    found = []
    for name, changes in SEARCHES.items():

        def study(number: int, changes: dict[str, Any] = changes) -> StudyConfig:
            search = {**tree["search"], **changes, "num_trials": number}
            return StudyConfig.model_validate({**tree, "search": search})

        simulate(study(max(1, num_trials // 10)), recorded)
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        rows = simulate(study(num_trials), recorded).trials
        seconds = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        found.append({"search": name, "ms": 1000 * seconds / len(rows), "grown_mib": grown / 2**20})
    return found


def rows_read(number: int) -> list[dict[str, Any]]:
    """Seconds to read and summarise so many trials, before and after compaction."""
    study = StudyConfig.model_validate(yaml.safe_load((RECORD / "study.yaml").read_text()))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        launch = Launch(study, folder, "", "", "", None, "benchmark", {}, Plan(1, 1.0, 0.0, 1))
        values = {"dispersion.weight": 0.1, "dispersion.temperature": 1.0, "dispersion.layers": "all"}
        row = blank_row(launch.assign(1, 1, "search", values), study, 0.0)
        row |= {"status": "completed", "num_tokens": 98_304, "layer_cosine_mean": 0.5}
        schema = results.trial_schema(space.column_types(study))
        for trial in range(number):
            line = {**row, "trial": trial, "val_loss": 6 + trial % 997 / 1000}
            line |= {"arm": "search" if trial else "baseline"}
            place = f"{folder}/trials/{results.trial_name(trial)}-attempt-1.parquet"
            results.write_table(place, pa.Table.from_pylist([line], schema=schema))
        for files in (f"{number:,} files", "compacted"):
            started = time.perf_counter()
            trials = results.read_tables(folder).trials
            analysis.summarise(trials, study.search.primary)
            found.append({"rows": files, "s": time.perf_counter() - started})
            assert trials.num_rows == number
            if len(found) == 1:
                started = time.perf_counter()
                compact(folder)
                found.append({"rows": "compaction itself", "s": time.perf_counter() - started})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="of each simulated search")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    searches = simulated(arguments.trials)
    print(f"\n| {arguments.trials:,} simulated trials | ms per trial | memory grown, MiB |\n|---|---|---|")
    for one in searches:
        print(f"| {one['search']} | {one['ms']:.2f} | {one['grown_mib']:+.1f} |")
    read = rows_read(arguments.rows)
    print(f"\n| {arguments.rows:,} trials, read and summarised | s |\n|---|---|")
    for line in read:
        print(f"| {line['rows']} | {line['s']:.2f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"simulated": searches, "rows": read}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
