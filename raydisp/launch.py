"""The start of a study on a running Ray: pin the model, make the data once, say which code it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

import raydisp
from raydisp import storage
from raydisp.cluster import Node, plan_resources
from raydisp.config import StudyConfig, TrialConfig
from raydisp.errors import RaydispError
from raydisp.search import Launch

PACKAGES = (
    "torch",
    "ray",
    "transformers",
    "tokenizers",
    "datasets",
    "optuna",
    "pyarrow",
    "numpy",
    "pydantic",
)
"""Whose versions stand on every row."""


def prepare_launch(
    study: StudyConfig, study_dir: str, nodes: Sequence[Node], address: str | None, *, quiet: bool
) -> Launch:
    """Everything that the trials of a study share.

    Raises:
        RaydispError: the machines, the model or the data do not allow it.
    """
    from raydisp.models import resolve_revision

    where = f"the cluster at {address or os.environ.get('RAY_ADDRESS', 'auto')}" if len(nodes) > 1 else "Ray"
    plan = plan_resources(study, nodes, where=where)
    cache_dir = storage.join(study.output, "cache")
    if "://" not in cache_dir:
        cache_dir = os.path.abspath(os.path.expanduser(cache_dir))
    revision = resolve_revision(study.model)
    return Launch(
        study=study,
        study_dir=study_dir,
        cache_dir=cache_dir,
        working_dir=os.getcwd(),
        prepared=_prepare_data(study.trial, cache_dir, quiet=quiet),
        model_revision=revision,
        code_version=code_version(),
        packages=package_versions(),
        plan=plan,
    )


def _prepare_data(trial: TrialConfig, cache_dir: str, *, quiet: bool) -> str:
    """Make the token blocks in a Ray task, or find them; returns their folder."""
    task = ray.remote(num_cpus=1, max_retries=0)(_prepare).options(num_returns="streaming")
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(desc="Tokenising", unit="B", unit_scale=True, delay=1, disable=hidden, leave=False) as bar:
        for reference in task.remote(trial.model_dump(mode="json"), cache_dir, os.getcwd()):
            told = ray.get(reference)
            if isinstance(told, int):
                bar.update(told)
    if isinstance(told, RaydispError):
        raise told
    return told


def _prepare(trial: dict[str, Any], cache_dir: str, working_dir: str) -> Iterator[int | str | RaydispError]:
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
            yield making.result()
        except RaydispError as error:
            yield error  # as a value: Ray would wrap it in an error of its own


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a trial computes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = importlib.metadata.version(name)
    return versions


def code_version() -> str:
    """raydisp's version, with the commit where it runs from a checkout: `0.1.0+g1a2b3c4.dirty`."""
    root = Path(raydisp.__file__).parent.parent
    if not (root / ".git").exists():
        return raydisp.__version__
    try:
        commit = _git(root, "rev-parse", "--short=7", "HEAD")
        dirty = ".dirty" if _git(root, "status", "--porcelain", "--", "raydisp") else ""
    except (OSError, subprocess.CalledProcessError):
        return raydisp.__version__
    return f"{raydisp.__version__}+g{commit}{dirty}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
