"""The study file's `resources` and `failures`: what a trial gets, and what it may lose."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydisp.config.section import Int, PositiveInt, Section


class FailuresConfig(Section):
    """What a trial may lose before it counts as failed."""

    max_failures: Annotated[
        Int,
        Field(
            ge=0,
            le=1000,
            description="times that a trial goes on from its last checkpoint after a worker, its process or "
            "its node was lost or hung; a node that gave notice does not count",
        ),
    ] = 2
    collective_timeout_s: Annotated[
        float, Field(gt=0.0, description="how long workers wait for one another before the trial is hung")
    ] = 1800.0
    max_failed_trials: Annotated[
        Annotated[Int, Field(ge=0, le=100_000)] | None,
        Field(
            description="failed trials that a study bears; with one more it starts no others, so that "
            "what is broken stops early; null: any number"
        ),
    ] = 5


class ResourcesConfig(Section):
    """What one trial gets, and how many run at a time."""

    num_workers: Annotated[
        Annotated[Int, Field(ge=1, le=10_000)]
        | Annotated[list[Annotated[Int, Field(ge=1, le=10_000)]], Field(min_length=2, max_length=2)],
        Field(
            description="data-parallel processes of a trial; [min, max]: an attempt begins with as many as "
            "there is room for"
        ),
    ] = 1
    cpus_per_worker: Annotated[float, Field(gt=0.0, description="a part of one is allowed")] = 1
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0.0)] | Literal["auto"], Field(description="auto: 1 where there are GPUs")
    ] = "auto"
    accelerator_type: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
            description="only on nodes with GPUs of this kind, by Ray's name for it: L4, A100, H100, ...",
        ),
    ] = None
    max_concurrent_trials: Annotated[
        PositiveInt | Literal["auto"],
        Field(description="auto: as many as fit, counting what an autoscaler may add"),
    ] = "auto"
    placement_timeout_s: Annotated[
        float,
        Field(
            gt=0.0,
            description="how long a trial waits for CPUs and GPUs while no other of the study runs (with "
            "several workers: how long its workers wait) before that is an error",
        ),
    ] = 1800.0

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @property
    def goes_through_ray_train(self) -> bool:
        """Else a trial trains in its own process."""
        return self.is_elastic or self.max_workers > 1

    def worker_counts(self, num_sequences: int) -> list[int]:
        """The numbers of workers that share a batch of so many sequences evenly, in order."""
        return [
            number for number in range(self.min_workers, self.max_workers + 1) if num_sequences % number == 0
        ]

    @model_validator(mode="after")
    def _fewer_to_more(self) -> ResourcesConfig:
        if self.is_elastic and self.min_workers >= self.max_workers:
            raise ValueError(
                f"num_workers = [{self.min_workers}, {self.max_workers}] is no range; give [min, max] with "
                "min below max, or one number"
            )
        return self

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesConfig:
        gpus = self.gpus_per_worker
        if gpus != "auto" and gpus > 1 and not gpus.is_integer():
            raise ValueError(
                f"gpus_per_worker = {gpus:g}: Ray gives parts of one GPU, or whole ones; use "
                f"{math.floor(gpus)} or {math.ceil(gpus)}"
            )
        if gpus == 0 and self.accelerator_type is not None:
            raise ValueError(
                f"accelerator_type = {self.accelerator_type} names a GPU, and gpus_per_worker = 0 asks for "
                "none; leave one of them out"
            )
        return self
