"""Nodes are asked before a study starts: what is wrong is a sentence, and nothing has begun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

import raydisp
from raydisp.cluster import node_checks
from raydisp.cluster.capacity import Growth, Node, NodeGroup, Offer
from raydisp.cluster.node_checks import Needs
from raydisp.errors import NodeError
from raydisp.storage import lease

NEEDS = Needs("s3://bucket/results/x", "an id", "/cache", data_bytes=3 << 30)
HEALTHY: dict[str, Any] = {
    "host": "w",
    "packages": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cu130"},
    "code_sha256": "0" * 64,
    "shared_memory": 8 << 30,
    "free": [["/tmp", 50 << 30], ["/cache", 50 << 30]],
    "problem": None,
}
WANTED = {**HEALTHY, "packages": {**HEALTHY["packages"], "torch": "2.13.0+cpu"}}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        (
            {"packages": {"python": "3.11.9", "ray": "2.60.0", "torch": "2.12.1"}, "code_sha256": "1"},
            [
                "has Python 3.11.9 and not 3.11.7, torch 2.12.1 and not 2.13.0+cpu, as this node has: "
                "install the versions of constraints.txt on every node"
            ],
        ),
        (
            {"packages": {"python": "3.11.7", "torch": "2.13.0"}},
            [
                "has Ray of an unknown version and not 2.60.0, as this node has: install the versions of "
                "constraints.txt on every node"
            ],
        ),
        (
            {"code_sha256": "1" * 64},
            [
                "has other code of raydisp than this node, although it calls itself the same version: "
                "bring it there (`ray up` does)"
            ],
        ),
        (
            {"shared_memory": 64 << 20},
            [
                "has 64 MiB of shared memory in /dev/shm, and processes of a trial exchange data through it: "
                "give its container 1 GiB or more (--shm-size=8g)"
            ],
        ),
        ({"shared_memory": None}, []),
        (
            {"free": [["/tmp", 4 << 30], ["/cache", 6 << 30]]},
            [
                "has 4.3 GB free on the disk of /tmp, and 5.4 GB are needed for the token blocks and "
                "what Ray keeps: free some or give it a larger disk"
            ],
        ),
        ({"problem": "does not see it"}, ["does not see it"]),
    ],
)
def test_what_is_wrong_with_a_node(changes: dict[str, Any], found: list[str]) -> None:
    assert node_checks.problems({**HEALTHY, **changes}, WANTED, NEEDS) == found


def test_a_problem_that_many_have_is_one_sentence() -> None:
    told = node_checks.tell(
        {"a": ["is slow"], "b": ["is slow", "is old"], "c": ["is slow"], "d": ["is slow"], "e": []}
    )
    assert told == ["nodes a, b, c and 1 more, each of which is slow", "node b is old"]


def test_the_results_place_is_read_and_written(tmp_path: Path) -> None:
    place = str(tmp_path / "results")
    with lease.hold(place) as held:
        assert node_checks._problem_of_place(place, held.id) is None
        assert node_checks._problem_of_place(place, "another") is not None
        assert sorted(os.listdir(place)) == [".lease.json", ".lease.lock"], "nothing is left behind"
    elsewhere = str(tmp_path / "elsewhere")
    found = node_checks._problem_of_place(elsewhere, held.id)
    assert found is not None
    assert found.startswith(f"does not see {elsewhere}: put the results where all nodes do")
    assert not os.path.exists(elsewhere), "nothing is written where nobody looks"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with lease.hold(str(tmp_path)) as held:
        monkeypatch.setattr(node_checks.storage, "write_bytes", full)
        found = node_checks._problem_of_place(str(tmp_path), held.id)
    assert found == "cannot use the results' place: [Errno 28] No space left on device"


def test_a_trial_refuses_a_node_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    here, code = node_checks.package_versions(), node_checks.code_sha256()
    node_checks.refuse_other_versions(here, code)
    node_checks.refuse_other_versions({"torch": "0"}, None)  # nobody knows
    with pytest.raises(NodeError, match=r"node \S+ has other code of raydisp"):
        node_checks.refuse_other_versions(here, "1" * 64)
    with pytest.raises(NodeError, match=r"has torch \S+ and not 0.1, as this node has: install"):
        node_checks.refuse_other_versions({**here, "torch": "0.1"}, code)


@pytest.mark.parametrize("file", ["errors.py", "analysis/rows.py", "figures/style.py"])
def test_a_change_of_any_source_file_is_other_code(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, measure = node_checks.code_sha256(), node_checks.code_sha256.__wrapped__
    copy = tmp_path / "raydisp"
    shutil.copytree(Path(raydisp.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(node_checks.raydisp, "__file__", str(copy / "__init__.py"))
    assert measure() == here, "wherever it lies"
    (copy / file).write_text((copy / file).read_text() + "\n# changed\n")
    assert measure() != here


@pytest.mark.parametrize(
    ("offer", "num_workers", "starts"),
    [
        (Offer((Node(2, 0, is_head=True),)), 4, []),
        (Offer((Node(2, 0, is_head=True),), Growth((NodeGroup("a", Node(8, 2), 5),), 5)), 4, [("a", 2)]),
        (
            Offer((Node(2, 0, is_head=True), Node(8, 2)), Growth((NodeGroup("a", Node(8, 2), 5),), 5)),
            4,
            [("a", 1)],
        ),
        (Offer((Node(2, 0, is_head=True),), Growth((NodeGroup("a", Node(8, 2), 5),), 5)), 100, [("a", 5)]),
        (
            Offer(
                (Node(2, 0, is_head=True),),
                Growth((NodeGroup("spot", Node(8, 1), 3), NodeGroup("dear", Node(8, 1), 3)), 4),
            ),
            16,
            [("spot", 3), ("dear", 1)],
        ),
        (Offer((Node(2, 0, is_head=True),), Growth((NodeGroup("a", None, 5),), 5)), 4, []),
    ],
)
def test_what_an_autoscaler_is_going_to_start(
    offer: Offer, num_workers: int, starts: list[tuple[str, int]]
) -> None:
    assert offer.starts(num_workers, 1, 1) == starts


# --- on a Ray of two nodes ------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_node_with_other_code_ends_the_command_before_anything_starts(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "raydisp"
    shutil.copytree(Path(raydisp.__file__).parent, other)
    (other / "errors.py").write_text((other / "errors.py").read_text() + "\n# changed\n")
    tree["output"] = str(tmp_path / "out")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    root = str(Path(raydisp.__file__).parent.parent)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        same = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def run(*options: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "raydisp.study", str(path), "--address", cluster.address, *options],
                capture_output=True,
                text=True,
                timeout=240,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            )

        planned = run("--dry-run")
        assert planned.returncode == 0, planned.stderr
        assert "1 worker x 1 CPU per trial, 1 trial at a time" in planned.stdout
        assert "all 2 nodes have the same versions, and shared memory and disk enough" in planned.stdout
        assert not (tmp_path / "out").exists(), "nothing is written"

        cluster.remove_node(same)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(other.parent), before or ""])
        try:
            cluster.add_node(num_cpus=1)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        cluster.wait_for_nodes()
        refused = run()
    finally:
        cluster.shutdown()
    assert refused.returncode == 2, refused.stdout
    assert "1 of the cluster's 2 nodes are not fit for the study, and nothing was started:" in refused.stderr
    assert "has other code of raydisp than this node" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out" / "tiny" / "study.yaml").exists()
    assert not (tmp_path / "out" / "tiny" / "trials").exists()
