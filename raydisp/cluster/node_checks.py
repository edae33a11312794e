"""Whether every node of a cluster is fit for a study, found out before anything starts.

Each node is asked once, all at the same time: for its versions of Python, packages and code, whether it reads
and writes the results' place, and whether it has shared memory and disk enough. What joins later is asked for
its versions by the first trial that it gets (`refuse_other_versions`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raydisp
from raydisp import storage
from raydisp.errors import NodeError, OutputError
from raydisp.storage.lease import still_held
from raydisp.versions import OF_TASKS, package_versions

CHECK_TIMEOUT_S = 120.0
"""How long a node may take to answer: a process has to start there."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is only measured
MIN_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm. Docker gives 64 MB by default, which ends in a bus error in the middle of a trial."""
MIN_DISK = 2 << 30
"""Free bytes where Ray and raydisp keep files, above what the data need. Ray itself places nothing on a disk
that is 95 % full."""

SHOWN_NODES = 3


@dataclass(frozen=True)
class Needs:
    """What a node must have; plain values, which travel to it."""

    study_dir: str
    """Where the results go."""
    lease_id: str | None
    """Of the lease in that place, which every node must see; None: nothing is to be written or read."""
    cache_dir: str
    """Where a node keeps token blocks."""
    data_bytes: int
    """What those of the study take, about."""
    uses_tasks: bool = False
    """Whether models are evaluated on tasks, for which every node needs the harness."""


@functools.cache
def code_sha256() -> str:
    """Of all source files of raydisp as this process sees them, those of its packages too."""
    folder = Path(raydisp.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


# --- on a node ------------------------------------------------------------------------------------------


def look_around(needs: dict[str, Any]) -> dict[str, Any]:
    """What a node has: plain values, so that any version of this code can be asked.

    Args:
        needs: fields of `Needs`; more than these are left alone.
    """
    seen: dict[str, Any] = {
        "host": socket.gethostname(),
        "packages": package_versions(tasks=True),
        "code_sha256": code_sha256(),
        "shared_memory": _size(SHARED_MEMORY),
        "free": {},
        "problem": None,
    }
    for place in (tempfile.gettempdir(), needs["cache_dir"]):
        existing = _existing(place)
        seen["free"].setdefault(_device(existing), [place, shutil.disk_usage(existing).free])
    seen["free"] = list(seen["free"].values())
    if needs["lease_id"] is not None:
        seen["problem"] = _problem_of_place(needs["study_dir"], needs["lease_id"])
    return seen


def _problem_of_place(study_dir: str, lease_id: str) -> str | None:
    """Why this process cannot read and write the results' place; None: it can."""
    try:
        # First, and without writing: a folder of the same name may be another disk's here.
        if not still_held(study_dir, lease_id):
            return (
                f"does not see {study_dir}: put the results where all nodes do, on a shared folder or in an "
                "object store (--output s3://bucket/folder)"
            )
        probe = storage.join(study_dir, f".probe-{uuid.uuid4().hex}")
        content = uuid.uuid4().bytes
        storage.write_bytes(probe, content)
        try:
            if storage.read_bytes(probe) != content:
                return f"reads back other bytes than it wrote in {study_dir}"
        finally:
            storage.delete_file(probe)
    except (OutputError, OSError) as error:
        return f"cannot use the results' place: {error}"
    return None


def _size(place: str) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(place).total
    return None


def _existing(place: str) -> str:
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place


def _device(place: str) -> int:
    return os.stat(place).st_dev


# --- what is wrong --------------------------------------------------------------------------------------


def problems(seen: Mapping[str, Any], wanted: Mapping[str, Any], needs: Needs) -> list[str]:
    """What is wrong with a node, as parts of sentences that follow its name.

    Args:
        seen: what the node's `look_around` said.
        wanted: what that of this process says.
    """
    used = {
        name: version
        for name, version in wanted["packages"].items()
        if needs.uses_tasks or name not in OF_TASKS
    }
    found = differing_versions(seen["packages"], used)
    if not found and seen["code_sha256"] != wanted["code_sha256"]:
        found.append(
            "has other code of raydisp than this node, although it calls itself the same version: bring it "
            "there (`ray up` does)"
        )
    shared = seen["shared_memory"]
    if shared is not None and shared < MIN_SHARED_MEMORY:
        found.append(
            f"has {shared / 2**20:.0f} MiB of shared memory in /dev/shm, and processes of a trial exchange "
            f"data through it: give its container {MIN_SHARED_MEMORY / 2**30:.0f} GiB or more (--shm-size=8g)"
        )
    for place, free in seen["free"]:
        need = MIN_DISK + needs.data_bytes
        if free < need:
            found.append(
                f"has {free / 1e9:.1f} GB free on the disk of {place}, and {need / 1e9:.1f} GB are needed "
                "for the token blocks and what Ray keeps: free some or give it a larger disk"
            )
    if seen["problem"]:
        found.append(seen["problem"])
    return found


def differing_versions(seen: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """For example `has torch 2.12.0 and not 2.13.0, as this node has: ...`; [] where all are equal."""
    names = {"python": "Python", "ray": "Ray"}
    told = [
        f"{names.get(name, name)} {seen.get(name, 'of an unknown version')} and not {version}"
        for name, version in wanted.items()
        if _public(seen.get(name)) != _public(version)
    ]
    if not told:
        return []
    return [f"has {', '.join(told)}, as this node has: install the versions of constraints.txt on every node"]


def _public(version: str | None) -> str | None:
    """Without what stands behind +, which says for which device a package was built."""
    return version.partition("+")[0] if version is not None else None


def tell(found: Mapping[str, list[str]]) -> list[str]:
    """One sentence for each problem, whichever nodes have it.

    Args:
        found: node -> its problems.
    """
    nodes_with: dict[str, list[str]] = {}
    for node, its_problems in found.items():
        for problem in its_problems:
            nodes_with.setdefault(problem, []).append(node)
    sentences = []
    for problem, nodes in nodes_with.items():
        named = ", ".join(nodes[:SHOWN_NODES])
        if len(nodes) > SHOWN_NODES:
            named += f" and {len(nodes) - SHOWN_NODES} more, each of which"
        elif len(nodes) > 1:
            named += ", each of which"
        sentences.append(f"{'node' if len(nodes) == 1 else 'nodes'} {named} {problem}")
    return sentences


# --- from the driver ------------------------------------------------------------------------------------


def refuse_unfit_nodes(needs: Needs, *, timeout_s: float = CHECK_TIMEOUT_S) -> int:
    """Ask every node of the cluster that Ray is connected to; returns how many there are.

    A Ray of one node is not asked: it is this machine.

    Raises:
        NodeError: with one sentence per problem.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return len(nodes)
    found = ask_all(nodes, needs, timeout_s)
    sentences = tell(found)
    if sentences:
        raise NodeError(
            "\n".join(
                [
                    f"{len([node for node in found if found[node]])} of the cluster's {len(nodes)} nodes are "
                    "not fit for the study, and nothing was started:",
                    *(f"- {sentence}" for sentence in sentences),
                ]
            )
        )
    return len(nodes)


def ask_all(nodes: list[dict[str, Any]], needs: Needs, timeout_s: float) -> dict[str, list[str]]:
    """Node -> what is wrong with it; all are asked at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    plain = dict(vars(needs))
    wanted = look_around({**plain, "lease_id": None})
    look = ray.remote(num_cpus=0, max_retries=0)(look_around)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            plain
        ): name
        for name, node in _named(nodes).items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found: dict[str, list[str]] = {name: [] for name in asked.values()}
    for reference in answered:
        try:
            found[asked[reference]] = problems(ray.get(reference), wanted, needs)
        except Exception as error:  # whatever a node with other code may do
            found[asked[reference]] = [f"cannot be asked: {_short(error)}"]
    for reference in silent:
        ray.cancel(reference, force=True)
        found[asked[reference]] = [
            f"did not answer within {timeout_s:.0f} s: look at its load and its network, or take it away"
        ]
    return found


def _named(nodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The nodes by host name and address, and by their number in Ray where that is not enough."""
    named: dict[str, dict[str, Any]] = {}
    for node in nodes:
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        named[f"{name}, node {node['NodeID'][:8]}" if name in named else name] = node
    return named


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:200] if lines else 'no reason given'}"


@functools.cache
def _here() -> dict[str, str]:
    return package_versions(tasks=True)


def refuse_other_versions(wanted: Mapping[str, str], code: str | None) -> None:
    """Of the node that a trial finds itself on, which may have joined after the study's start.

    Args:
        wanted: the versions of the node where the study was started.
        code: its `code_sha256`; None: nobody knows, and nothing is compared.
    Raises:
        NodeError: they differ.
    """
    if code is None:
        return
    found = differing_versions(_here(), wanted)
    if not found and code != code_sha256():
        found = ["has other code of raydisp than the node where the study was started: bring it there"]
    if found:
        raise NodeError(f"node {socket.gethostname()} {found[0]}")
