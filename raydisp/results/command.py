"""The command of `raydisp.results`: show the trials of a results folder, or merge its small files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raydisp import results, storage
from raydisp.boundary import run_command
from raydisp.errors import EXIT_USER_ERROR, OutputError, suggest
from raydisp.results import compaction, trial_list


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a mistake of the user, 130 interrupted."""
    arguments = _parse(argv)
    if arguments is None:
        return EXIT_USER_ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run_command(
        "raydisp.results",
        lambda: _run(arguments),
        interrupted="interrupted; the same command goes on with it",
    )


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "compact":
        _compact(arguments)
    elif arguments.diff:
        _diff(arguments)
    else:
        _show(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace | None:
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.results", description="Show the trials of a results folder; merge its files."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    show = commands.add_parser("show", help="print trials as a table, or what differs between two of them")
    show.add_argument("dir", metavar="DIR", help="results folder of a study, local or s3://, gs://")
    show.add_argument("--sort", metavar="COLUMN", help="sort by a column; rows without a value come last")
    show.add_argument("--reverse", action="store_true", help="with --sort: largest first")
    show.add_argument(
        "--columns", metavar="A,B,C", help="columns to show: of `trials`, or any field by its dotted name"
    )
    show.add_argument("--all", action="store_true", help="a row for every attempt, not only the latest")
    show.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="what differs between two trials; 3.1 is attempt 1 of trial 3",
    )
    show.add_argument("--json", action="store_true", help="one JSON object per line")
    compact = commands.add_parser(
        "compact", help="merge the small files of trials that have ended; the folder must not be in use"
    )
    compact.add_argument("dir", metavar="DIR", help="results folder of a study, local or s3://, gs://")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return None
    return arguments


def _compact(arguments: argparse.Namespace) -> None:
    check_folder(arguments.dir)
    for merged in compaction.compact(arguments.dir):
        if merged.file is None:
            print(f"{merged.table}: nothing to merge")
        else:
            print(f"{merged.table}: {merged.num_files} files -> {merged.file} ({merged.num_rows} rows)")


def _show(arguments: argparse.Namespace) -> None:
    attempts = _read_attempts(arguments.dir)
    table = attempts if arguments.all else results.latest_attempts(attempts)
    known = table.column_names
    rows: Sequence[trial_list.Row] = table.to_pylist()
    searched = [name for name in known if name not in results.TRIAL_COLUMNS]
    if arguments.columns:
        columns = list(dict.fromkeys(name.strip() for name in arguments.columns.split(",") if name.strip()))
    elif arguments.json:
        columns = list(known)
    else:
        columns = trial_list.default_columns(searched, rows)
    by = arguments.sort or "trial"
    rows = trial_list.with_settings(rows, [*columns, by], known)
    if arguments.sort:
        rows = trial_list.sort_rows(rows, by, reverse=arguments.reverse)
    elif arguments.reverse:
        rows = rows[::-1]
    if arguments.json:
        for row in rows:
            print(trial_list.to_json(row, columns))
    else:
        print(trial_list.format_table(rows, columns, width=terminal_width()))


def _diff(arguments: argparse.Namespace) -> None:
    rows = _read_attempts(arguments.dir).to_pylist()
    pair = [_find(rows, told, arguments.dir) for told in arguments.diff]
    items = trial_list.compare(*pair)
    if arguments.json:
        for item in items:
            print(json.dumps(item, ensure_ascii=False))
        return
    names = tuple(f"trial {told}" for told in arguments.diff)
    if names[0] == names[1]:
        raise OutputError(f"{names[0]} does not differ from itself; name two trials")
    print(trial_list.format_comparison(items, (names[0], names[1]), terminal_width()))


def _find(rows: Sequence[dict[str, Any]], told: str, place: str) -> dict[str, Any]:
    """The row that `3` (its latest attempt) or `3.1` means."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?", told)
    if match is None:
        raise OutputError(f'"{told}" is not the number of a trial, such as 3, or of an attempt, such as 3.1')
    of_trial = [row for row in rows if row["trial"] == int(match[1])]
    if not of_trial:
        numbers = sorted({row["trial"] for row in rows if row["trial"] is not None})
        raise OutputError(f"{place} has no trial {match[1]}; it has {trial_list.number_ranges(numbers)}")
    if match[2] is None:
        return of_trial[-1]
    found = [row for row in of_trial if row["attempt"] == int(match[2])]
    if not found:
        attempts = trial_list.number_ranges(sorted(row["attempt"] for row in of_trial))
        raise OutputError(f"trial {match[1]} has no attempt {match[2]}; it has {attempts}")
    return found[0]


def _read_attempts(place: str) -> pa.Table:
    check_folder(place)
    attempts = results.read_table(place, "trials")
    if attempts.num_rows == 0:
        raise OutputError(
            f"{place} holds no trial: there is none in {storage.join(place, 'trials')}; "
            f"name the results folder of one study{_studies_below(place)}"
        )
    return attempts


def check_folder(place: str) -> None:
    """Raise an OutputError unless there is such a folder."""
    try:
        filesystem, path = storage.resolve(place)
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise OutputError(f"{place} cannot be read: {' '.join(str(error).split())}") from None
    if kind == pafs.FileType.NotFound:
        raise OutputError(f"{place} does not exist; name the results folder of a study{_neighbour(place)}")
    if kind != pafs.FileType.Directory:
        raise OutputError(f"{place} is a file; name the results folder of a study")


def _neighbour(place: str) -> str:
    parent, _, name = os.path.abspath(place).rpartition("/")
    if "://" in place or not os.path.isdir(parent or "/"):
        return ""
    return "." + hint if (hint := suggest(name, os.listdir(parent or "/"))) else ""


def _studies_below(place: str) -> str:
    if "://" in place:
        return ""
    names = sorted(name for name in os.listdir(place) if os.path.isdir(os.path.join(place, name, "trials")))
    return f", for example {storage.join(place, names[0])}" if names else ""


def terminal_width() -> int | None:
    """None where nobody looks at a terminal: whole columns then."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
