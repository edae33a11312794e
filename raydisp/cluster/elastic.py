"""How many workers an attempt of an elastic trial begins with: as many as there is room for.

Ray Train can change the number in the middle of a run. It is not asked to: it would begin anew inside an
attempt, with any number between the two, also one that cannot share the batch evenly. Here an attempt keeps
its workers to its end, so that its rows are of one layout; when a worker is lost the attempt ends, and the
next one goes on from the checkpoint with those there are. The global batch stays the same, and with it the
result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from raydisp.cluster.capacity import Node
from raydisp.config.resources import ResourcesConfig

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long an attempt waits for room for all its workers before it begins with fewer: about what Ray takes to
notice that a node is gone, and a trial that has ended to give back its place."""
LOOK_EVERY_S = 2.0


def choose_num_workers(
    resources: ResourcesConfig,
    num_sequences: int,
    gpus: float,
    *,
    again: bool,
    free_nodes: Callable[[str | None], Sequence[Node]] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """The number of workers to ask Ray Train for.

    Where there is not room for the fewest either, all are asked for: an autoscaler learns of them, and the
    placement timeout says when that has been too long. A first attempt asks at once; a later one may be
    early, while what it has lost is being given back.

    Args:
        num_sequences: of the global batch, which they must share evenly.
        gpus: of one worker.
        again: whether an attempt came before.
        free_nodes: what is free on each node, of one kind of accelerator.
    """
    most = resources.max_workers
    if not resources.is_elastic:
        return most
    look = free_nodes or _free_nodes
    started = now()
    while True:
        room = sum(node.room(resources.cpus_per_worker, gpus) for node in look(resources.accelerator_type))
        enough = room >= resources.min_workers
        if room >= most or not (enough or again):
            return most
        if now() - started >= PATIENCE_S:
            if not enough:
                return most
            chosen = max(number for number in resources.worker_counts(num_sequences) if number <= room)
            logger.warning("there is room for %d workers and not for %d; %d begin", room, most, chosen)
            return chosen
        sleep(LOOK_EVERY_S)


def _free_nodes(accelerator_type: str | None) -> list[Node]:
    from ray._private.state import available_resources_per_node  # the public sum does not tell where

    from raydisp.cluster.autoscaler import node_of

    nodes = [node_of(free) for free in available_resources_per_node().values()]
    return [node for node in nodes if accelerator_type in (None, node.accelerator_type)]
