"""Starting and joining Ray, and what it offers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from raydisp.cluster.autoscaler import HEAD_RESOURCE, node_of, read_growth
from raydisp.cluster.capacity import Node, Offer
from raydisp.errors import ResourceError

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, AMD and Windows' own Linux; without any of these files torch finds no GPU."""
PRELOADED = ("raydisp.train", "transformers.modeling_utils")
"""What a trial that trains in its own process imports: 4 s that pass while Ray and the study start."""


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
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `search.on_tune` has its own
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
