"""A real `ray up` on hosts of the test's own: a study across them, a host that is lost, a link that is cut.

The file is cluster.yaml with the documented keys for machines that one has; what is changed here are
addresses, keys and sizes, and the installation, which finds its virtual environment made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from many_hosts import Host, many_hosts, why_not
from test_cluster_file import variant
from test_failures import check_rows, replay_is_certain
from test_on_ray import wait_for
from test_parallel import run_two

from raydisp import results
from raydisp.config import StudyConfig, replace_fields

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ROOT = Path(__file__).parent.parent
VENV = Path(sys.executable).parent.parent
TOKEN = "a-token-of-the-test-hosts-" + "0" * 32
WORKERS = ("worker-1", "worker-2")
PYTHON, RAY = "~/raydisp-venv/bin/python", "~/raydisp-venv/bin/ray"
Row = dict[str, Any]


@dataclass
class Up:
    """A cluster that `ray up` has brought up."""

    hosts: dict[str, Host]
    file: Path
    environment: dict[str, str]
    said: str

    @property
    def head(self) -> Host:
        return self.hosts["head"]

    def ray(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command of Ray on this machine, from which the cluster was brought up."""
        return subprocess.run(
            [str(VENV / "bin" / "ray"), *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=self.environment,
        )

    def alive(self) -> list[str]:
        """Names of the hosts that Ray counts as nodes."""
        told = self.head.run(
            f"""{PYTHON} -c "import ray; ray.init(address='auto', logging_level=40, log_to_driver=False)
for node in ray.nodes():
    if node['Alive']: print('alive', node['NodeManagerHostname'])" 2>&1"""
        )
        return sorted(re.findall(r"^alive (\S+)", told.stdout, re.MULTILINE))

    def start_study(self, path: Path, *options: str) -> subprocess.Popen[str]:
        """The command on the head, as in `ray attach`."""
        text = f"cd ~/raydisp && {PYTHON} -m raydisp.study {path} {' '.join(options)}"
        return subprocess.Popen(
            self.head.command(text),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def derived_file(folder: Path, hosts: dict[str, Host]) -> Path:
    """cluster.yaml for these hosts."""
    code = folder / "code"
    left_out = shutil.ignore_patterns(".venv", ".git", "results", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, code, ignore=left_out)
    (folder / "auth_token").write_text(TOKEN)
    config = variant("local")
    config["cluster_name"] = f"raydisp-test-{os.getpid()}"
    config["provider"].update(
        head_ip=hosts["head"].address, worker_ips=[hosts[name].address for name in WORKERS]
    )
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["file_mounts"] = {"~/raydisp": str(code), "~/.ray/auth_token": str(folder / "auth_token")}
    path_of_the_log_in = next(command for command in config["setup_commands"] if ".bashrc" in command)
    config["setup_commands"] = [path_of_the_log_in, f"ln -sfn {VENV} ~/raydisp-venv"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name] = [
            command.replace("192.168.0.10", hosts["head"].address).replace(
                "--object-store-memory=2000000000", "--object-store-memory=200000000 --num-cpus=1"
            )
            for command in config[name]
        ]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("hosts")
    home = folder / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        environment.pop(name, None)
    with many_hosts(["head", *WORKERS, "spare"], folder, shared_memory={"spare": "64m"}) as hosts:
        up = Up(hosts, derived_file(folder, hosts), environment, "")
        done = up.ray("up", "-y", "--no-config-cache", str(up.file))
        up.said = done.stdout + done.stderr
        assert done.returncode == 0, up.said[-5000:]
        wait_for(lambda: up.alive() == ["head", *WORKERS])
        yield up
        up.ray("down", "-y", str(up.file))


def two_worker_study(tree: dict[str, Any], folder: Path, num_steps: int) -> Path:
    """A baseline and one trial of two workers, whose nodes have one CPU each: they must be two nodes."""
    tree["train"].update(budget_tokens=128 * num_steps, learning_rate=2e-3)
    tree["search"]["num_trials"] = 1
    tree["search"]["space"] = {"dispersion.weight": [0.3, 1.0]}
    tree["evaluate"].update(every_tokens=128 * 18, max_tokens=64)
    tree["checkpoint"] = {"every_tokens": 128 * 72}
    tree["resources"] = {"num_workers": 2, "placement_timeout_s": 300}
    tree["output"] = str(folder / "out")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def hosts_of(row: Row) -> list[str]:
    return row["hostname"].split(", ") if row["hostname"] else []


def check_every_row(tree: dict[str, Any], folder: Path, tmp_path: Path, num_attempts: dict[int, int]) -> None:
    """Against the same trial on two processes of this machine that nobody disturbs."""
    study = StudyConfig.model_validate(tree)
    weights = {
        row["trial"]: row["dispersion.weight"] or 0.0
        for row in results.read_tables(str(folder)).trials.to_pylist()
    }
    for trial, number in num_attempts.items():
        alone = tmp_path / f"two-{trial}"
        alone.mkdir()
        changed = replace_fields(
            study.trial, {"dispersion.weight": weights[trial], "checkpoint.every_tokens": None}
        )
        reference = run_two(changed, str(tmp_path / "cache"), alone)[0]["losses"]
        check_rows(folder, trial, number, reference, rel=1e-6)


def test_who_has_not_the_token_is_refused(up: Up) -> None:
    """A client, a node and the dashboard; the dashboard is on loopback, so the head itself asks."""
    spare, head = up.hosts["spare"], up.head
    assert spare.run(f"ln -sfn {VENV} ~/raydisp-venv").returncode == 0
    client = f"{PYTHON} -c \"import ray; ray.init(address='{head.address}:6379'); print('it is in')\""
    for before in ("", "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=another-one;"):
        refused = spare.run(f"{before} timeout 100 {client} 2>&1", timeout=150)
        assert refused.returncode != 0
        assert "it is in" not in refused.stdout
        assert re.search(r"[Uu]nauthenticated|authentication token", refused.stdout), refused.stdout[-2000:]
    joined = spare.run(
        f"timeout 100 {RAY} start --address={head.address}:6379 --num-cpus=1 --disable-usage-stats "
        "--object-store-memory=100000000 2>&1",
        timeout=150,
    )
    assert joined.returncode != 0, joined.stdout
    assert up.alive() == ["head", *WORKERS]
    spare.run(f"{RAY} stop --force")
    asked = "curl -s -o /dev/null -w '%{http_code}'"
    if shutil.which("curl"):
        assert head.run(f"{asked} http://127.0.0.1:8265/api/jobs/").stdout == "401"
        assert spare.run(f"{asked} http://{head.address}:8265/api/jobs/").stdout == "000", "on loopback only"


def test_a_node_with_too_little_shared_memory_is_refused(
    up: Up, tree: dict[str, Any], tmp_path: Path
) -> None:
    path = two_worker_study(tree, tmp_path, 36)
    spare = up.hosts["spare"]
    joined = spare.run(
        f"mkdir -p ~/.ray && echo -n {TOKEN} > ~/.ray/auth_token && cp -r {up.file.parent}/code ~/raydisp && "
        f"ln -sfn {VENV} ~/raydisp-venv && export RAY_AUTH_MODE=token && timeout 100 {RAY} start "
        f"--address={up.head.address}:6379 --num-cpus=1 --disable-usage-stats "
        "--object-store-memory=80000000 2>&1",
        timeout=150,
    )
    assert joined.returncode == 0, joined.stdout
    try:
        wait_for(lambda: "spare" in up.alive())
        refused = up.start_study(path)
        _, err = refused.communicate(timeout=300)
    finally:
        spare.run(f"{RAY} stop --force")
    assert refused.returncode == 2, err
    assert "1 of the cluster's 4 nodes are not fit for the study, and nothing was started:" in err
    assert f"- node spare ({spare.address}) has 64 MiB of shared memory in /dev/shm" in err
    assert not (tmp_path / "out" / "tiny" / "trials").exists()
    wait_for(lambda: up.alive() == ["head", *WORKERS])


def test_a_job_runs_across_hosts(up: Up, tree: dict[str, Any], tmp_path: Path) -> None:
    """`--dry-run` first; then the study by `ray job submit`, the other way to start one."""
    path = two_worker_study(tree, tmp_path, 36)
    planned = up.ray("exec", str(up.file), f"cd ~/raydisp && {PYTHON} -m raydisp.study {path} --dry-run")
    said = planned.stdout + planned.stderr
    assert planned.returncode == 0, said
    assert "2 workers x 1 CPU per trial (its driver takes no CPU), 1 trial at a time" in said
    assert "3 CPUs on 3 nodes" in said
    assert not (tmp_path / "out").exists(), "nothing is written"
    job = up.head.run(
        f"export RAY_AUTH_MODE=token; {RAY} job submit --address http://127.0.0.1:8265 -- bash -c "
        f"'cd ~/raydisp && {PYTHON} -m raydisp.study {path}' 2>&1",
        timeout=500,
    )
    assert job.returncode == 0, job.stdout[-5000:]
    assert "2 completed; see" in job.stdout
    rows = results.read_tables(str(tmp_path / "out" / "tiny")).attempts.to_pylist()
    assert [(row["trial"], row["attempt"], row["status"]) for row in rows] == [
        (0, 1, "completed"),
        (1, 1, "completed"),
    ]
    for row in rows:
        assert row["world_size"] == 2
        assert len(set(hosts_of(row))) == 2, "two hosts"
        assert set(hosts_of(row)) <= {"head", *WORKERS}
    check_every_row(tree, tmp_path / "out" / "tiny", tmp_path, {0: 1, 1: 1})


def workers_now(up: Up) -> list[Host]:
    """Worker hosts on which a process of a trial's training runs."""
    return [
        host
        for host in (up.hosts[name] for name in WORKERS)
        if any("RayTrainWorker" in " ".join(_command_line(process)) for process in host.processes())
    ]


def _command_line(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_the_link_of_a_host_is_cut_for_a_minute(up: Up, tree: dict[str, Any], tmp_path: Path) -> None:
    path = two_worker_study(tree, tmp_path, 360)
    folder = tmp_path / "out" / "tiny"
    process = up.start_study(path)
    try:
        wait_for(lambda: replay_is_certain(folder, 0), seconds=240)
        victim = workers_now(up)[-1]
        victim.cut()
        time.sleep(60)
        victim.mend()
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    attempts = results.read_tables(str(folder)).attempts.to_pylist()
    first = [row for row in attempts if row["trial"] == 0]
    assert first[0]["error_type"] in ("WorkerLost", "CollectiveTimeout", "ProcessLost")
    assert victim.name in hosts_of(first[0]), "the row tells where it ran"
    assert victim.name not in hosts_of(first[1]), "it went on elsewhere"
    check_every_row(tree, folder, tmp_path, {0: 2, 1: 1})
    # Ray's autoscaler starts Ray there again.
    wait_for(lambda: up.alive() == ["head", *WORKERS], seconds=240)


def test_a_host_loses_its_power(up: Up, tree: dict[str, Any], tmp_path: Path) -> None:
    path = two_worker_study(tree, tmp_path, 360)
    folder = tmp_path / "out" / "tiny"
    process = up.start_study(path)
    try:
        wait_for(lambda: replay_is_certain(folder, 0), seconds=240)
        victim = workers_now(up)[-1]
        victim.power_off()
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    attempts = results.read_tables(str(folder)).attempts.to_pylist()
    for row in attempts:
        assert len(set(hosts_of(row))) == 2, "the interrupted attempt names them too"
    assert victim.name in hosts_of(attempts[0])
    again = [row for row in attempts if (row["trial"], row["attempt"]) == (0, 2)]
    assert victim.name not in hosts_of(again[0])
    check_every_row(tree, folder, tmp_path, {0: 2, 1: 1})


def test_ray_down_leaves_nothing(up: Up) -> None:
    done = up.ray("down", "-y", str(up.file))
    assert done.returncode == 0, done.stdout + done.stderr

    def left_over() -> list[str]:
        return [
            f"{host.name}: {line}"
            for host in up.hosts.values()
            for line in (" ".join(_command_line(process)) for process in host.processes())
            if "raylet" in line or "gcs_server" in line
        ]

    assert not [line for line in left_over() if line.startswith("head")]
    # On machines that are not the cloud's, the workers' Ray notices by itself that the head is gone.
    wait_for(lambda: not left_over())
