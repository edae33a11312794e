"""The command of `raydisp.verdict`: judge a study's confirm phase anew, from its Parquet rows alone."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from raydisp import results, verdict
from raydisp.boundary import run_command
from raydisp.errors import OutputError, VerdictError
from raydisp.results.command import check_folder, terminal_width
from raydisp.results.trial_list import format_table
from raydisp.tasks import effects as task_effects


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a mistake of the user, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.verdict",
        description="Judge the confirm phase of a study: print what it found, and write the tables verdicts, "
        "effects and, where there are any, benchmarks beside its rows.",
    )
    parser.add_argument("dir", metavar="DIR", help="results folder of a study, local or s3://, gs://")
    parser.add_argument(
        "--json", action="store_true", help="print the tables and sentences as one JSON object"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run_command("raydisp.verdict", lambda: _judge(arguments.dir, as_json=arguments.json))


def _judge(place: str, *, as_json: bool) -> None:
    check_folder(place)
    # Strict: a row that cannot be read would change the verdict, and is no pair that is merely missing.
    trials = results.latest_attempts(results.read_table(place, "trials", strict=True))
    try:
        benchmarks = task_effects.of_study(place, trials, strict=True)
        verdicts, effects, sentences = (
            verdict.verdicts(trials),
            verdict.effects(trials),
            (*verdict.sentences(trials), *task_effects.sentences(benchmarks)),
        )
    except VerdictError as error:
        raise VerdictError(f"{place}: {error}") from None
    if as_json:
        tree = {
            "verdicts": verdicts.to_pylist(),
            "effects": effects.to_pylist(),
            "benchmarks": benchmarks.to_pylist(),
            "sentences": list(sentences),
        }
        print(json.dumps(tree, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(sentences))
        print()
        print(_table(verdicts))
    try:
        verdict.write_verdicts(place, trials)
        task_effects.write(place, benchmarks)
    except OutputError as error:
        print(f"raydisp.verdict: the tables are not kept: {error}", file=sys.stderr)


def _table(verdicts: pa.Table) -> str:
    """The arms in a few columns."""
    rows: list[dict[str, Any]] = []
    for row in verdicts.to_pylist():
        low, high = row["low_95"], row["high_95"]
        rows.append(
            {
                "arm": row["arm"],
                "verdict": row["verdict"],
                "n": f"{row['num_pairs']}/{row['num_planned']}",
                "difference": _signed(row["difference"]),
                "95 % interval": None if low is None else f"{_signed(low)} to {_signed(high)}",
                "p (Holm)": _rounded(row["holm_p_value"]),
                "p (sign flips, Holm)": _rounded(row["sign_flip_holm_p_value"]),
                "time": _times(row["train_s_ratio"]),
                "memory": _times(row["peak_memory_bytes_ratio"]),
            }
        )
    columns = list(rows[0])
    return format_table(rows, columns, width=terminal_width(), to_the_right=set(columns[2:]))


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.4f}"


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} x"
