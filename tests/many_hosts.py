"""Hosts of the test's own on this machine: each a network, mount, process and name space with an sshd in it.

They share the file system but for the home folder, Ray's temporary folder and shared memory, and see each
other through a bridge. Needs root, iproute2, openssh-server and rsync.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TOOLS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "rsync")
RAY_TEMP = "/tmp/ray"
HOME = "/mnt"
"""Root's home on them; a folder that every machine has, and not the one where its Python may lie."""
SUBNET = "10.213.7"
PREFIX = "rdt"
"""Of the names of everything that is made: what an earlier run has left is found by it."""


def why_not() -> str | None:
    """What keeps this machine from having hosts of its own; None: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, openssh-server, openssh-client, rsync)"
    # A bridge and a pair of cable ends, in a network of the probe's own, and a file system in memory.
    needed = (
        "ip link add rdtprobe type bridge && ip link add rdtprobe-a type veth peer name rdtprobe-b && "
        "mount -t tmpfs tmpfs /mnt"
    )
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "sh", "-c", needed],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return None if probe.returncode == 0 else f"needs namespaces: {probe.stderr.strip()}"


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    home: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    shell: Sequence[str] = field(repr=False)

    @property
    def link(self) -> str:
        """Its cable's end on the bridge."""
        return f"{PREFIX}-{self.name}"

    def command(self, text: str) -> list[str]:
        """What runs a shell command on it through SSH, as `ray up` would."""
        return [*self.shell, f"root@{self.address}", text]

    def run(self, text: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(text), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def power_off(self) -> None:
        """No goodbye: with the first process of its process space all others are killed at once."""
        victims = self.processes()
        for process in psutil.Process(self.process.pid).children():  # unshare waits for that first process
            process.kill()
        self.process.wait(timeout=20)
        psutil.wait_procs(victims, timeout=20)

    def cut(self) -> None:
        """Pull its cable."""
        _run("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        _run("ip", "link", "set", self.link, "up")


@contextlib.contextmanager
def many_hosts(
    names: Sequence[str], folder: Path, *, shared_memory: dict[str, str] | None = None
) -> Iterator[dict[str, Host]]:
    """Hosts of these names, on a bridge to which this machine belongs too, for the time of the block.

    Args:
        folder: for keys and homes.
        shared_memory: name -> size of its /dev/shm, as `mount` has it; others have 1 GiB and a half.
    """
    with _only_one(), _hosts(names, folder, shared_memory or {}) as hosts:
        yield hosts


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Names and addresses are the same every time: a second test run waits for the first one's end."""
    with open(os.path.join(tempfile.gettempdir(), f"{PREFIX}-hosts.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _hosts(names: Sequence[str], folder: Path, shared_memory: dict[str, str]) -> Iterator[dict[str, Host]]:
    _clean_up(names)
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    # One log-in of the head, which logs in to the workers with the same key.
    (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    os.makedirs(RAY_TEMP, exist_ok=True)
    addresses = {name: f"{SUBNET}.{10 + index}" for index, name in enumerate(names)}
    hosts_file = "\n".join(["127.0.0.1 localhost", *(f"{addresses[name]} {name}" for name in names), ""])
    (folder / "hosts").write_text(hosts_file)
    (folder / "passwd").write_text(
        f"root:x:0:0:root:{HOME}:/bin/bash\nsshd:x:100:65534::/run/sshd:/bin/false\n"
    )
    hosts: dict[str, Host] = {}
    try:
        _run("ip", "link", "add", f"{PREFIX}-bridge", "type", "bridge")
        _run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", f"{PREFIX}-bridge")
        _run("ip", "link", "set", f"{PREFIX}-bridge", "up")
        for name in names:
            size = shared_memory.get(name, "1536m")
            hosts[name] = _start(name, addresses[name], folder, key, size)
        for host in hosts.values():
            _wait_for_ssh(host)
        yield hosts
    finally:
        for host in hosts.values():
            with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
                host.power_off()
        _clean_up(names)


def _start(name: str, address: str, folder: Path, key: Path, shared_memory: str) -> Host:
    space, link = f"{PREFIX}-{name}", f"{PREFIX}-{name}"
    home = folder / f"home-{name}"
    home.mkdir()
    _run("ip", "netns", "add", space)
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    _run("ip", "link", "set", link, "master", f"{PREFIX}-bridge", "up")
    _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", space, "link", "set", "eth0", "up")
    _run("ip", "-n", space, "link", "set", "lo", "up")
    config = folder / f"sshd-{name}"
    config.write_text(
        f"ListenAddress {address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
        "MaxStartups 100\nMaxSessions 100\nUseDNS no\nAcceptEnv none\n"
    )
    script = f"""
        set -e
        hostname {name}
        mount -t tmpfs -o size={shared_memory} tmpfs /dev/shm
        mount -t tmpfs tmpfs {RAY_TEMP}
        mount --bind {home} {HOME}
        mount --bind {folder}/passwd /etc/passwd
        mount --bind {folder}/hosts /etc/hosts
        exec {_which("sshd")} -D -e -f {config}
    """
    unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    log = (folder / f"sshd-{name}.log").open("wb")
    process = subprocess.Popen(
        ["ip", "netns", "exec", space, *unshare, "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_end_with_the_parent,
    )
    shell = ["ssh", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    return Host(name, address, home, process, [*shell, "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"])


def _end_with_the_parent() -> None:
    """A test run that is killed leaves no hosts behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait_for_ssh(host: Host) -> None:
    deadline = time.monotonic() + 30
    while host.run("true").returncode:
        assert host.process.poll() is None, f"{host.name} ended"
        assert time.monotonic() < deadline, f"{host.name} does not answer"
        time.sleep(0.2)


def _clean_up(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", f"{PREFIX}-{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{PREFIX}-{name}"], capture_output=True)
    subprocess.run(["ip", "link", "del", f"{PREFIX}-bridge"], capture_output=True)


def _which(tool: str) -> str:
    found = shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    assert found is not None
    return found


def _run(*command: str) -> None:
    subprocess.run([_which(command[0]), *command[1:]], check=True, capture_output=True, text=True)
