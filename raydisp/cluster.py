"""What the machines offer, what a trial needs, and how many trials fit; starting and joining Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from raydisp.autoscaler import HEAD_RESOURCE, node_of, read_growth
from raydisp.capacity import Node, Offer, count, describe_workers
from raydisp.config import StudyConfig
from raydisp.errors import ResourceError
from raydisp.resources_config import ResourcesConfig

DRIVER_RESOURCES = {HEAD_RESOURCE: 0.001}
"""What the process that only waits for a trial's Ray Train workers asks for: a place on the head node and no
CPU. Drivers that take CPUs can take all of them, and then no worker ever starts."""
MAX_DRIVERS = 1000
"""That the head node has room for, whatever its memory."""
DRIVER_BYTES = 700 << 20
"""Memory of what a trial of several workers has on the head: its driver, Ray Train's controller and its
placement group's cleaner; measured at 681 MiB (docs/scaling.md)."""
HEADLESS_DRIVER_RESOURCES = {"memory": 1.0}
"""Where no node calls itself the head: one byte, because Tune does not place what asks for nothing."""

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, AMD and Windows' own Linux; without any of these files torch finds no GPU."""
PRELOADED = ("raydisp.train", "transformers.modeling_utils")
"""What a trial that trains in its own process imports: 4 s that pass while Ray and the study start."""


@dataclass(frozen=True)
class Plan:
    """What each trial gets and how many run at a time."""

    num_workers: int
    """The most, where it is a range."""
    cpus_per_worker: float
    gpus_per_worker: float
    max_concurrent_trials: int
    num_now: int | None = None
    """Trials that the nodes hold that are there; None: as many as run at a time."""
    driver_resources: Mapping[str, float] = field(default_factory=lambda: dict(DRIVER_RESOURCES))
    """Of the process that waits for a trial's several workers."""
    accelerator_type: str | None = None
    min_workers: int | None = None
    """The fewest, where it is a range."""
    through_ray_train: bool = False
    bounded_by_head: bool = False
    """The head's memory, and nothing else, keeps it from more trials at a time."""

    @property
    def needs(self) -> str:
        """For example `2 workers x 1 CPU + 1 GPU`."""
        text = describe_workers(
            self.num_workers, self.cpus_per_worker, self.gpus_per_worker, at_least=self.min_workers
        )
        return text + (f" ({self.accelerator_type})" if self.accelerator_type else "")

    def describe(self) -> str:
        """For example `1 worker x 1 CPU per trial, 2 trials at a time`."""
        driver = " (its driver takes no CPU)" if self.through_ray_train else ""
        text = f"{self.needs} per trial{driver}, {count(self.max_concurrent_trials, 'trial')} at a time"
        if self.bounded_by_head:
            text += (
                f", for whose drivers the head has memory ({DRIVER_BYTES >> 20} MiB each; "
                "resources.max_concurrent_trials overrides it)"
            )
        if self.num_now is None or self.num_now >= self.max_concurrent_trials:
            return text
        now = f"{self.num_now or 'none'} {'fits' if self.num_now < 2 else 'fit'} on the nodes that are there"
        return f"{text}, of which {now}; the others wait for nodes to join"


def plan_resources(study: StudyConfig, offer: Offer, *, where: str) -> Plan:
    """How the study's trials fit on these machines, counted as if nobody else used them.

    A trial of one worker trains in its own process, which is all that is counted; the driver of a trial of
    several takes no CPU.

    Args:
        where: what the machines are, for the sentence: "this machine" or "the cluster at ...".
    Raises:
        ResourceError: one trial can never fit, with both numbers.
    """
    wanted: ResourcesConfig = study.resources
    cpus = wanted.cpus_per_worker
    gpus = wanted.gpus_per_worker
    kind = wanted.accelerator_type
    if gpus == "auto":
        gpus = 1.0 if offer.has_gpus or kind is not None else 0.0
    has_head = offer.has_head
    if kind is not None:
        offer = offer.only(kind)
        where = f"{where}, counting only nodes with {kind},"
    room = offer.room(cpus, gpus)
    # An elastic trial is planned for in full; where not even one fits so, for as few workers as it may have.
    planned = wanted.max_workers if room >= wanted.max_workers else wanted.min_workers
    fitting = room // planned
    if wanted.goes_through_ray_train and has_head:
        fitting = min(fitting, MAX_DRIVERS)
    # What may join and has no known size is no ground for a refusal: the placement timeout decides.
    certain = not offer.num_unsized
    if not fitting and certain:
        needs = count(planned * cpus, "CPU")
        if gpus:
            needs += f" and {count(planned * gpus, 'GPU')}"
        raise ResourceError(
            f"resources: a trial of {describe_workers(planned, cpus, gpus)} needs {needs}, and "
            f"{where} offers {offer.describe(cpus, gpus)}, which is room for "
            f"{count(room, 'worker')}; lower resources.num_workers, cpus_per_worker or "
            "gpus_per_worker, or use more machines (--address)"
        )
    bounded_by_head = False
    if wanted.max_concurrent_trials == "auto":
        # One more than there are trials would only wait.
        concurrent = min(max(1, fitting), study.search.num_trials + 1)
        if wanted.goes_through_ray_train and offer.head_memory_bytes is not None:
            room_on_head = max(1, int(offer.head_memory_bytes / DRIVER_BYTES))
            bounded_by_head = room_on_head < concurrent
            concurrent = min(concurrent, room_on_head)
    elif wanted.max_concurrent_trials > fitting and certain:
        raise ResourceError(
            f"resources.max_concurrent_trials = {wanted.max_concurrent_trials}, but {where} has room for "
            f"{fitting} at a time; lower it, or use auto"
        )
    else:
        concurrent = wanted.max_concurrent_trials
    return Plan(
        wanted.max_workers,
        cpus,
        float(gpus),
        concurrent,
        num_now=offer.room_now(cpus, gpus) // planned,
        driver_resources=DRIVER_RESOURCES if has_head else HEADLESS_DRIVER_RESOURCES,
        accelerator_type=kind,
        min_workers=wanted.min_workers,
        through_ray_train=wanted.goes_through_ray_train,
        bounded_by_head=bounded_by_head,
    )


def describe_place(offer: Offer, address: str | None) -> str:
    """What the machines are, for `plan_resources`."""
    if len(offer.nodes) < 2 and offer.growth is None:
        return "Ray"
    return f"the cluster at {address or os.environ.get('RAY_ADDRESS', 'auto')}"


def this_machine() -> Node:
    """CPUs that this process may use, and the GPUs that torch sees."""
    gpus = 0
    if sys.platform != "linux" or any(os.path.exists(place) for place in GPU_DEVICES):
        import torch  # not where there is no GPU to ask for: it takes a second or two

        gpus = torch.cuda.device_count()
    return Node(cpus=len(os.sched_getaffinity(0)), gpus=gpus, is_head=True)


def memory_here() -> float:
    """Bytes that Ray will offer to processes if it is started on this machine now: without its object store,
    for which it takes 30 %."""
    from ray._private.utils import estimate_available_memory

    return 0.7 * float(estimate_available_memory())


def joins_cluster(address: str | None) -> bool:
    """Whether `running_ray` would join Ray that is already there, as on the head node of a cluster."""
    if address is not None:
        return address != "local"
    from ray._private.utils import read_ray_address

    return bool(os.environ.get("RAY_ADDRESS") or read_ray_address())


@contextlib.contextmanager
def running_ray(
    address: str | None, *, through_ray_train: bool = False, verbose: bool = False
) -> Iterator[Offer]:
    """Ray for the time of a study: a cluster joined, or a local one started and ended again.

    Args:
        address: of a cluster, or "local"; None: RAY_ADDRESS, else one started on this machine by `ray start`,
            else a local one.
        through_ray_train: whether trials have workers of their own.
    Yields:
        The nodes that are alive, and what an autoscaler may add to them.
    Raises:
        ResourceError: the cluster does not answer, or the address is of another kind.
    """
    _refuse_other_protocols(address)
    joining = joins_cluster(address)
    # Ray reads these when it is imported or started; what the user has set stays.
    if not joining:  # nobody takes this machine away, and it is one process per trial
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # What Ray starts ahead is not ready when the first trials come, which then get other processes: twice
        # the imports at the same time.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `search` has its own
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "60")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    if not through_ray_train:
        # In every process of a local Ray as it starts, while the command goes on.
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
                include_dashboard=through_ray_train,
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
        # A Ray of one's own does not grow.
        yield read_offer(can_grow=joining)
    finally:
        ray.shutdown()


def _refuse_other_protocols(address: str | None) -> None:
    """A study runs on a node: the addresses of Ray Client (ray://) and the dashboard (http://) are others."""
    told = f"--address {address}"
    if address is None:
        address = os.environ.get("RAY_ADDRESS", "")
        told = f"RAY_ADDRESS {address}"
    if "://" in address:
        raise ResourceError(
            f"{told} is no address that a study can join: it runs on a node of its cluster. Log in to the "
            "head (ray attach cluster.yaml) and give the command there, without --address; or hand it in "
            "(ray job submit --address http://127.0.0.1:8265 -- python -m raydisp.study ...)"
        )


def read_offer(*, can_grow: bool = True) -> Offer:
    """What the cluster that Ray is connected to offers at this moment.

    Args:
        can_grow: whether to ask for the limits of an autoscaler, which may take seconds.
    """
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    return Offer(
        tuple(node_of(of_one) for of_one in resources),
        read_growth() if can_grow else None,
        free=Node(free.get("CPU", 0), free.get("GPU", 0)),
        head_memory_bytes=next(
            (of_one.get("memory") for of_one in resources if HEAD_RESOURCE in of_one), None
        ),
    )
