"""The start of a study on a running Ray: pin the model, make the data once, say which code it is."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from tqdm import tqdm

from raydisp.arms import dimensions
from raydisp.cluster.capacity import Offer
from raydisp.cluster.node_checks import code_sha256
from raydisp.cluster.packing import plan_resources
from raydisp.cluster.placement import describe_offer, not_placed
from raydisp.cluster.session import describe_place, read_offer
from raydisp.config import StudyConfig, TrialConfig
from raydisp.data import shared_blocks
from raydisp.errors import OutputError, RaydispError, ResourceError
from raydisp.search.agenda import Agenda
from raydisp.search.dispatch import Launch
from raydisp.versions import code_version, package_versions


def prepare_launch(
    study: StudyConfig, study_dir: str, offer: Offer, address: str | None, *, quiet: bool
) -> Launch:
    """Everything that the trials of a study share.

    Raises:
        RaydispError: the machines, the model or the data do not allow it.
    """
    from raydisp.data import cache_folder, read_meta
    from raydisp.models import resolve_revision

    plan = plan_resources(study, offer, where=describe_place(offer, address))
    cache_dir = cache_folder(study.output)
    revision = resolve_revision(study.model)
    teacher = study.distillation.teacher
    teacher_revision = None if teacher is None else resolve_revision(teacher)
    prepared = _prepare_data(study, cache_dir, quiet=quiet)
    return Launch(
        study=study,
        study_dir=study_dir,
        cache_dir=cache_dir,
        working_dir=os.getcwd(),
        prepared=prepared,
        model_revision=revision,
        code_version=code_version(),
        packages=package_versions(tasks=bool(study.evaluate.tasks)),
        plan=plan,
        data_sha256=read_meta(prepared)["data_sha256"],
        teacher_revision=teacher_revision,
        # On a machine of one's own the code is that of the moment, whoever edits it.
        code_sha256=code_sha256() if len(offer.nodes) > 1 or offer.growth is not None else None,
    )


def refuse_other_content(launch: Launch, agenda: Agenda) -> None:
    """Trials compare only on the same data from the same model: refuse to go on with others.

    Raises:
        OutputError: earlier rows of the study name other data or another model.
    """
    fixed = [name for fields in (launch.study.arms or {}).values() for name in fields]
    if any(name.split(".")[0] in ("data", "model") for name in [*dimensions(launch.study), *fixed]):
        return  # such a study compares data or models
    found = {
        "data_sha256": launch.data_sha256,
        "model_revision": launch.model_revision,
        "teacher_revision": launch.teacher_revision,
    }
    for row in [*agenda.finished, *agenda.resumed]:
        for column, now in found.items():
            earlier = row[column]
            if earlier is not None and earlier != now:
                raise OutputError(
                    f"{launch.study_dir}: trial {row['trial']} has {column} {earlier}, and now it is {now}: "
                    f"the {column.split('_')[0]} changed, and new trials would not compare with the old. "
                    "Restore it, or give the study another name (name:) or place (--output)"
                )


def _prepare_data(study: StudyConfig, cache_dir: str, *, quiet: bool) -> str:
    """Make the token blocks in a Ray task, or find them; returns their folder.

    Raises:
        RaydispError: the text does not allow it, or no CPU was free for it in time.
    """
    from raydisp.data import prepared_folder

    trial, timeout_s = study.trial, study.resources.placement_timeout_s
    folder = prepared_folder(trial, cache_dir)
    if shared_blocks.fetch(folder, study.output):  # a task would start a process to find the same
        shared_blocks.publish(folder, study.output)
        return folder
    task = ray.remote(num_cpus=1, max_retries=0)(_prepare).options(num_returns="streaming")
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(desc="Tokenising", unit="B", unit_scale=True, delay=1, disable=hidden, leave=False) as bar:
        told_so_far = task.remote(trial.model_dump(mode="json"), cache_dir, os.getcwd(), study.output)
        # It tells something every second once it runs.
        begun, _ = ray.wait([told_so_far], timeout=timeout_s)
        if not begun:
            ray.cancel(told_so_far)
            offer = describe_offer(read_offer(), 1, 0)
            raise ResourceError(
                not_placed("1 CPU, to make the token blocks,", timeout_s, offer, what="a task")
            )
        for reference in told_so_far:
            told = ray.get(reference)
            if isinstance(told, int):
                bar.update(told)
    if isinstance(told, RaydispError):
        raise told
    # It may have been made on another node.
    if not shared_blocks.fetch(told, study.output):
        raise OutputError(
            f"{told} was made on another node and is not on this one; put the results where all nodes do, on "
            "a shared folder or in an object store (--output s3://bucket/folder)"
        )
    return told


def _prepare(
    trial: dict[str, Any], cache_dir: str, working_dir: str, output: str
) -> Iterator[int | str | RaydispError]:
    """Yields bytes of text done since the last time, about once a second, and at last the folder."""
    from raydisp.data import prepare

    if os.path.isdir(working_dir):
        os.chdir(working_dir)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(prepare, TrialConfig.model_validate(trial), cache_dir, done.put)
        while not wait([making], timeout=1.0).done:
            yield sum(done.get() for _ in range(done.qsize()))
        try:
            shared_blocks.publish(making.result(), output)
            yield making.result()
        # Errors as values: Ray would wrap them in one of its own.
        except RaydispError as error:
            yield error
        except OSError as error:
            yield OutputError(
                f"{cache_dir}: token blocks cannot be kept there: {error}; make the folder writable, free "
                "some space, or choose another one with --output"
            )
