"""The command: one study file in, results and a report out. The same command again continues the study.

python -m raydisp.study studies/weight_search.yaml
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from raydisp import results, storage
from raydisp.config import StudyConfig
from raydisp.errors import (
    EXIT_DONE,
    EXIT_FAILED_TRIALS,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    OutputError,
    RaydispError,
)
from raydisp.interrupts import terminate_as_interrupt
from raydisp.plan import StudyPlan, make_plan
from raydisp.studyfile import differences, dump_study, load_study, parse_study


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done. 1: some trials failed or diverged. 2: a mistake of the user. 130: interrupted.
    """
    arguments = _parse(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    if arguments.schema:
        print(json.dumps(StudyConfig.model_json_schema(), indent=2))
        return EXIT_DONE
    try:
        with terminate_as_interrupt():
            return _run(arguments)
    except RaydispError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(
            "\nInterrupted; finished trials are kept. The same command continues the study.", file=sys.stderr
        )
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.study",
        description="Run a study: search, results in Parquet, report. The same command again continues it.",
        epilog="Exit status: 0 done, 1 some trials failed or diverged, 2 user error, 130 interrupted.",
    )
    parser.add_argument("file", nargs="?", help="the study file (YAML)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a field of the file by its dotted name, for example --set train.learning_rate=1e-3",
    )
    parser.add_argument("--output", metavar="DIR", help="results go to DIR/<name of the study>")
    parser.add_argument("--address", help='of a Ray cluster; "local" starts Ray on this machine')
    parser.add_argument("--dry-run", action="store_true", help="print the plan; start and write nothing")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a study file")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the summary")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and the trials log")
    arguments = parser.parse_args(argv)
    if arguments.file is None and not arguments.schema:
        parser.error("give a study file, for example studies/weight_search.yaml")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.output is not None:
        overrides.append(f"output={json.dumps(arguments.output)}")
    study = load_study(arguments.file, overrides)
    study_dir = storage.join(study.output, study.name)
    if "://" not in study_dir:
        study_dir = os.path.abspath(os.path.expanduser(study_dir))
    _refuse_other_study(study, study_dir)
    storage.check_writable(study_dir)
    plan = make_plan(study, study_dir, arguments.address)
    if arguments.dry_run:
        print(plan.describe())
        return EXIT_DONE
    if plan.agenda.num_trials:
        _run_trials(study, study_dir, plan, arguments)
    else:
        _say(arguments, f"All {study.search.num_trials} search trials and the baseline are done already.")
    return _conclude(study, study_dir)


def _refuse_other_study(study: StudyConfig, study_dir: str) -> None:
    """A results folder belongs to one study: its file may only have grown in trials, or changed in effort."""
    place = storage.join(study_dir, "study.yaml")
    try:
        text = storage.read_bytes(place).decode()
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise OutputError(
            f"{place} is not text: it was not written by raydisp; give another --output"
        ) from None
    earlier = parse_study(text, place)
    changed = differences(earlier, study)
    if changed:
        raise OutputError(
            f"{study_dir} holds results of a study that differs from this one in {'; '.join(changed)}. "
            "Restore the file, or give this study another name (name:) or place (--output)"
        )


def _run_trials(study: StudyConfig, study_dir: str, plan: StudyPlan, arguments: argparse.Namespace) -> None:
    from raydisp import cluster
    from raydisp.launch import prepare_launch, refuse_other_content
    from raydisp.progress import Progress

    _say(arguments, plan.headline())
    with (
        storage.exclusive(study_dir),
        cluster.running_ray(
            arguments.address, num_workers=study.resources.num_workers, verbose=arguments.verbose
        ) as nodes,
        terminate_as_interrupt(),  # again: Ray has set a handler of its own
    ):
        from raydisp.search import run_search

        launch = prepare_launch(study, study_dir, nodes, arguments.address, quiet=arguments.quiet)
        refuse_other_content(launch, plan.agenda)
        # Only now: a study that could not start leaves nothing that a mended file would differ from.
        storage.write_bytes(storage.join(study_dir, "study.yaml"), dump_study(study).encode())
        _say(arguments, f"Running {launch.plan.describe()}.")
        with Progress(study, plan, quiet=arguments.quiet) as progress:
            run_search(launch, plan.agenda, on_result=progress.on_result, on_finished=progress.on_finished)


def _conclude(study: StudyConfig, study_dir: str) -> int:
    """Build the report, say what was found and where it lies."""
    from raydisp import analysis
    from raydisp.report import build_report

    tables = results.read_tables(study_dir)
    report = build_report(study_dir)
    for sentence in analysis.summarise(tables.trials, study.search.objective):
        print(sentence)
    counts = analysis.count_statuses(tables.trials)
    told = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    broken = [row for row in tables.trials.to_pylist() if row["status"] in ("failed", "diverged")]
    if broken:
        first = broken[0]
        message = " ".join((first["error_message"] or "").split())[:200]
        told += f" (trial {first['trial']}: {message})"
    print(f"{told}; see {study_dir}")
    print(f"Report: {report}")
    return EXIT_FAILED_TRIALS if broken else EXIT_DONE


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
