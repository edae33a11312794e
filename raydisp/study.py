"""The command: one study file in, results and a report out. The same command again continues the study.

python -m raydisp.study studies/weight_search.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence

from raydisp import results, storage
from raydisp.config import StudyConfig
from raydisp.config.trackers import check_trackers
from raydisp.confirm.planning import NothingToConfirmError, freeze
from raydisp.confirm.runs import Work, read_work, settle
from raydisp.errors import (
    EXIT_DONE,
    EXIT_FAILED_TRIALS,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    OutputError,
    RaydispError,
    VerdictError,
)
from raydisp.interrupts import terminate_as_interrupt
from raydisp.plan import StudyPlan, make_plan
from raydisp.results import compaction
from raydisp.search.agenda import Agenda
from raydisp.search.warm_start import read_warm_starts
from raydisp.storage import lease
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
    parser.add_argument(
        "--fork",
        metavar="NAME",
        help="a new study of this name, by the file as it is now; it takes the trials of the old one as "
        "a warm start",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="run trials that failed once more, from their beginning"
    )
    parser.add_argument(
        "--simulate",
        metavar="DIR",
        help="replay the curves recorded in a results folder instead of training: seconds, and no Ray",
    )
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
    if arguments.fork is not None:
        study = _fork(study, arguments, overrides)
    if arguments.simulate is not None:
        return _simulate(study, arguments)
    study_dir = storage.local_absolute(storage.join(study.output, study.name))
    _refuse_other_study(study, study_dir)
    storage.check_writable(study_dir)
    check_trackers(study.trackers, study_dir)
    plan = _plan(study, study_dir, arguments)
    if arguments.dry_run:
        print(_on_its_cluster(plan, arguments).describe())
        return EXIT_DONE
    with lease.hold(study_dir) as held:
        compaction.finish(study_dir)
        # Once more: only now is the folder ours, and another command may have filled it since.
        _refuse_other_study(study, study_dir)
        work = read_work(study, study_dir, retry_failed=arguments.retry_failed)
        notes: list[str] = []
        try:
            if study.confirm is not None and work.frozen is None and not work.search.num_trials:
                # Whether there is anything, before Ray is asked; it is settled when the runs can start.
                freeze(study, results.latest_attempts(results.read_table(study_dir, "trials")))
            if work.num_trials(study):
                plan = dataclasses.replace(plan, work=work)
                _run_trials(study, study_dir, plan, held, arguments, notes)
            else:
                from raydisp.search.dispatch import refresh_optuna_copy

                _say(arguments, _told_done(work))
                refresh_optuna_copy(study, study_dir, work.search)
        except NothingToConfirmError as error:
            return _conclude(
                study, study_dir, [*notes, f"The confirm phase did not run: {error}."], failed=True
            )
        return _conclude(study, study_dir, notes)


def _plan(study: StudyConfig, study_dir: str, arguments: argparse.Namespace) -> StudyPlan:
    return make_plan(
        study,
        study_dir,
        arguments.address,
        retry_failed=arguments.retry_failed,
        dry_run=arguments.dry_run,
    )


def _on_its_cluster(plan: StudyPlan, arguments: argparse.Namespace) -> StudyPlan:
    """The plan with what a cluster offers for it, where one would be joined: its nodes are asked, too."""
    from raydisp.cluster import node_checks
    from raydisp.cluster.packing import plan_resources
    from raydisp.cluster.session import describe_place, running_ray

    if plan.resources is not None:
        return plan
    with (
        running_ray(arguments.address, through_ray_train=True, verbose=arguments.verbose) as offer,
        terminate_as_interrupt(),
    ):
        where = describe_place(offer, arguments.address)
        resources = plan_resources(plan.study, offer, where=where)
        node_checks.refuse_unfit_nodes(plan.needs(None))
        return dataclasses.replace(plan, resources=resources, cluster=offer)


def _told_done(work: Work) -> str:
    confirmed = work.confirm.finished if work.confirm is not None else []
    # A search that was confirmed is over, and its failed trials with it.
    failed = sum(row["status"] == "failed" for row in confirmed or work.search.finished)
    text = f"All {len(work.search.finished) + len(confirmed)} trials are done already"
    return f"{text}; {failed} failed, and --retry-failed runs them again." if failed else f"{text}."


def _fork(study: StudyConfig, arguments: argparse.Namespace, overrides: list[str]) -> StudyConfig:
    """The study under a new name, with the old one's trials as a warm start."""
    origin = storage.local_absolute(storage.join(study.output, study.name))
    if arguments.fork == study.name:
        raise OutputError(f"--fork {arguments.fork} is the name of the study itself; give a new one")
    warm_start = [*study.search.warm_start, origin]
    more = [f"name={json.dumps(arguments.fork)}", f"search.warm_start={json.dumps(warm_start)}"]
    return load_study(arguments.file, [*overrides, *more])


def _simulate(study: StudyConfig, arguments: argparse.Namespace) -> int:
    from raydisp.simulate import load_recorded, simulate_study

    recorded = load_recorded(study, arguments.simulate)
    study = study.model_copy(update={"confirm": None})  # recorded curves know no test data
    study_dir = storage.local_absolute(storage.join(study.output, f"{study.name}.simulated"))
    if arguments.dry_run:
        print(recorded.describe(study))
        print(f"Results would go to {study_dir}. Dry run: nothing was started or written.")
        return EXIT_DONE
    _say(arguments, recorded.describe(study))
    storage.check_writable(study_dir)
    with lease.hold(study_dir):
        over = simulate_study(study, study_dir, recorded)
        notes = [] if over is None else [f"No further trial was started: {over}."]
        return _conclude(study, study_dir, notes)


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
            "Restore the file; or start a new study that knows the old trials, with --fork NAME; or give "
            "this one another name (name:) or place (--output)"
        )


def _run_trials(
    study: StudyConfig,
    study_dir: str,
    plan: StudyPlan,
    held: lease.Lease,
    arguments: argparse.Namespace,
    notes: list[str],
) -> None:
    """Run what is left of the search, then of the confirm phase.

    Args:
        notes: gets what the user is to be told at the end.
    Raises:
        NothingToConfirmError: the search has found nothing that could be confirmed.
    """
    from raydisp.cluster import node_checks
    from raydisp.cluster.session import running_ray
    from raydisp.launch import prepare_launch, refuse_other_content
    from raydisp.progress import Progress, tokens_reached

    _say(arguments, plan.headline())
    with contextlib.ExitStack() as stack:
        offer = stack.enter_context(
            running_ray(
                arguments.address,
                through_ray_train=study.resources.goes_through_ray_train,
                verbose=arguments.verbose,
            )
        )
        stack.enter_context(terminate_as_interrupt())  # again: Ray has set a handler of its own
        from raydisp import trackers
        from raydisp.search.on_tune import run_confirm, run_search

        node_checks.refuse_unfit_nodes(plan.needs(held.id))
        launch = prepare_launch(study, study_dir, offer, arguments.address, quiet=arguments.quiet)
        launch = dataclasses.replace(launch, lease=held.id, task_folders=plan.tasks.folders)
        refuse_other_content(launch, plan.work.search)
        # Only now: a study that could not start leaves nothing that a mended file would differ from.
        storage.write_bytes(storage.join(study_dir, "study.yaml"), dump_study(study).encode())
        _say(arguments, f"Running {launch.plan.describe()}.")
        for warning in dataclasses.replace(plan, resources=launch.plan).warnings():
            _say(arguments, f"Warning: {warning}.")
        callbacks = stack.enter_context(trackers.running(study, study_dir))

        def watch(agenda: Agenda, metric: str | None = None) -> Progress:
            return Progress(
                study,
                agenda,
                quiet=arguments.quiet,
                metric=metric,
                places=launch.plan.max_concurrent_trials,
                reached=tokens_reached(study_dir, agenda),
            )

        work = plan.work
        if work.search.num_trials:
            warm_starts = read_warm_starts(study, launch.data_sha256)
            for warm_start in warm_starts:
                _say(arguments, f"Warm start: {warm_start.describe()}.")
            with watch(work.search) as progress:
                over = run_search(
                    launch,
                    work.search,
                    warm_starts=warm_starts,
                    watcher=progress,
                    callbacks=callbacks,
                    taken_over=held.lost.is_set,
                )
            if over is not None:
                notes.append(f"No further trial was started: {over}.")
        if study.confirm is None:
            return
        if work.confirm is None:
            work = settle(study, study_dir)
        assert work.frozen is not None
        assert work.confirm is not None
        _say(arguments, work.frozen.headline())
        with watch(work.confirm, "test_loss") as progress:
            over = run_confirm(
                launch,
                work.frozen,
                work.confirm,
                watcher=progress,
                callbacks=callbacks,
                taken_over=held.lost.is_set,
            )
        if over is not None:
            notes.append(f"No further confirm run was started: {over}.")


def _conclude(study: StudyConfig, study_dir: str, notes: Sequence[str], *, failed: bool = False) -> int:
    """Build the report, say what was found and where it lies.

    Args:
        notes: what is said first.
        failed: whether the study did not come to its end.
    """
    from raydisp import analysis, verdict
    from raydisp.report import build_report
    from raydisp.tasks import effects as task_effects

    tables = results.read_tables(study_dir)
    objectives = study.search.objectives
    if len(objectives) > 1:
        front = analysis.pareto_front(tables.trials, *objectives)
        results.write_table(storage.join(study_dir, "pareto", "front.parquet"), front)
    judged = "confirm" in tables.trials["phase"].to_pylist()
    told: tuple[str, ...] = ()
    if judged:
        try:
            verdict.write_verdicts(study_dir, tables.trials)
            benchmarks = task_effects.benchmarks(tables.trials, tables.evals, tables.items)
            task_effects.write(study_dir, benchmarks)
            told = (*verdict.sentences(tables.trials), *task_effects.sentences(benchmarks))
        except VerdictError as error:
            told = (f"The confirm phase cannot be judged: {error}.",)
    for note in notes:
        print(note)
    found = analysis.summarise(tables.trials, *objectives)
    if judged:
        print("\n".join(told))
        print("The search that chose the arms, one seed each and no result:")
        found = tuple(f"  {sentence}" for sentence in found)
    print("\n".join(found))
    counts = analysis.count_statuses(tables.trials)
    counted = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    broken = [row for row in tables.trials.to_pylist() if row["status"] in ("failed", "diverged")]
    if broken:
        first = broken[0]
        message = " ".join((first["error_message"] or "").split())[:200]
        counted += f" (trial {first['trial']}: {message})"
    print(f"{counted}; see {study_dir}", flush=True)
    # Last: what was found is told even where no page can be written.
    print(f"Report: {build_report(study_dir)}")
    return EXIT_FAILED_TRIALS if broken or failed else EXIT_DONE


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
