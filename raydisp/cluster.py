"""What the machines offer, what a trial needs, and how many trials fit; starting and joining Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raydisp.config import ResourcesConfig, StudyConfig
from raydisp.errors import ResourceError

DRIVER_RESOURCES = {"node:__internal_head__": 0.001}
"""What the process that only waits for a trial's Ray Train workers asks for: a place on the head node and no
CPU. Drivers that take CPUs can take all of them, and then no worker ever starts."""

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, AMD and Windows' own Linux; without any of these files torch finds no GPU."""
PRELOADED = ("raydisp.train", "transformers.modeling_utils")
"""What a trial that trains in its own process imports: 4 s that pass while Ray and the study start."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs that one machine offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Plan:
    """What each trial gets and how many run at a time."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_concurrent_trials: int

    def describe(self) -> str:
        """For example `1 worker x 1 CPU, 2 trials at a time`."""
        worker = (
            f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''} x {self.cpus_per_worker:g} CPU"
        )
        if self.gpus_per_worker:
            worker += f" + {self.gpus_per_worker:g} GPU"
        trials = self.max_concurrent_trials
        return f"{worker} per trial, {trials} trial{'s' if trials > 1 else ''} at a time"


def plan_resources(study: StudyConfig, nodes: Sequence[Node], *, where: str) -> Plan:
    """How the study's trials fit on these machines.

    Args:
        where: what the machines are, for the sentence: "this machine" or "the cluster at ...".
    Raises:
        ResourceError: one trial cannot fit, with both numbers.
    """
    wanted: ResourcesConfig = study.resources
    gpus = wanted.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    slots = sum(_workers_that_fit(node, wanted.cpus_per_worker, gpus) for node in nodes)
    if slots < wanted.num_workers:
        needs = f"{_count(wanted.num_workers * wanted.cpus_per_worker, 'CPU')}"
        has = f"{_count(sum(node.cpus for node in nodes), 'CPU')}"
        if gpus:
            needs += f" and {_count(wanted.num_workers * gpus, 'GPU')}"
            has += f" and {_count(sum(node.gpus for node in nodes), 'GPU')}"
        raise ResourceError(
            f"resources: a trial of {wanted.num_workers} worker(s) needs {needs}, and {where} offers "
            f"{has}, which is room for {slots} worker(s); lower resources.num_workers, "
            "cpus_per_worker or gpus_per_worker, or use more machines (--address)"
        )
    fitting = slots // wanted.num_workers
    if wanted.max_concurrent_trials == "auto":
        # One more than there are trials would only wait.
        concurrent = min(fitting, study.search.num_trials + 1)
    elif wanted.max_concurrent_trials > fitting:
        raise ResourceError(
            f"resources.max_concurrent_trials = {wanted.max_concurrent_trials}, but {where} has room for "
            f"{fitting} at a time; lower it, or use auto"
        )
    else:
        concurrent = wanted.max_concurrent_trials
    return Plan(wanted.num_workers, wanted.cpus_per_worker, float(gpus), concurrent)


def _workers_that_fit(node: Node, cpus: float, gpus: float) -> int:
    # Ray counts in steps of 0.0001.
    by_cpus = int(node.cpus / cpus + 1e-6)
    return min(by_cpus, int(node.gpus / gpus + 1e-6)) if gpus else by_cpus


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def this_machine() -> Node:
    """CPUs that this process may use, and the GPUs that torch sees."""
    gpus = 0
    if sys.platform != "linux" or any(os.path.exists(place) for place in GPU_DEVICES):
        import torch  # not where there is no GPU to ask for: it takes a second or two

        gpus = torch.cuda.device_count()
    return Node(cpus=len(os.sched_getaffinity(0)), gpus=gpus)


def joins_cluster(address: str | None) -> bool:
    """Whether `running_ray` would join Ray that is already there, as on the head node of a cluster."""
    if address is not None:
        return address != "local"
    from ray._private.utils import read_ray_address

    return bool(os.environ.get("RAY_ADDRESS") or read_ray_address())


@contextlib.contextmanager
def running_ray(address: str | None, *, num_workers: int = 1, verbose: bool = False) -> Iterator[list[Node]]:
    """Ray for the time of a study: a cluster joined, or a local one started and ended again.

    Args:
        address: of a cluster, or "local"; None: RAY_ADDRESS, else one started on this machine by `ray start`,
            else a local one.
        num_workers: of a trial: with one, nobody uses Ray Train.
    Yields:
        The nodes that are alive.
    Raises:
        ResourceError: the cluster does not answer.
    """
    joining = joins_cluster(address)
    # Ray reads these when it is imported or started; what the user has set stays.
    if not joining:  # nobody takes this machine away, and it is one process per trial
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `search` has its own
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "60")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    if num_workers == 1:
        # In every process of a local Ray as it starts; those that Ray starts ahead wait for the first trials.
        os.environ.setdefault("RAY_preload_python_modules", ",".join(PRELOADED))
    import ray

    level = logging.INFO if verbose else logging.ERROR
    options = {"log_to_driver": verbose, "logging_level": level}
    try:
        if joining:
            ray.init(address=address or "auto", **options)
        else:
            # Ray Train needs the dashboard: without it it cannot clean up its placement groups, and the
            # second wave of trials waits for ever. It stays on loopback. Elsewhere it would only cost.
            node = this_machine()
            ray.init(
                address="local",
                num_cpus=int(node.cpus),
                num_gpus=int(node.gpus),
                include_dashboard=num_workers > 1,
                dashboard_host="127.0.0.1",
                **options,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
        raise ResourceError(
            f"Ray {where} cannot be reached: {' '.join(str(error).split())[:300]}; check the address and "
            "that the cluster runs, or give --address local to start Ray here"
        ) from None
    if not verbose:
        # A trial that fails is a row and a line of ours; Ray would print its traceback in between.
        for name in ("ray.tune", "ray.train", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield [
            Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            for node in ray.nodes()
            if node["Alive"]
        ]
    finally:
        ray.shutdown()
