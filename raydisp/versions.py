"""Which code made a row: raydisp's version with its commit, and the versions of the packages beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import raydisp

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

OF_TASKS = ("lm_eval",)
"""Likewise, where models are evaluated on tasks."""


def package_versions(*, tasks: bool = False) -> dict[str, str]:
    """Versions of Python and of the packages that decide what a trial computes.

    Args:
        tasks: whether those that tasks need count; what is not installed is left out.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = importlib.metadata.version(name)
    for name in OF_TASKS if tasks else ():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
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
