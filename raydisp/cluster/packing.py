"""What a trial needs, and how many trials the machines hold at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raydisp.cluster.autoscaler import HEAD_RESOURCE
from raydisp.cluster.capacity import Offer, count, describe_workers
from raydisp.config import StudyConfig
from raydisp.config.resources import ResourcesConfig
from raydisp.errors import ResourceError

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
