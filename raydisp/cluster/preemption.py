"""Whether a trial's machine is about to be taken away: a spot node with notice, a node that is drained."""

from __future__ import annotations

import datetime
import sys


def notice_to_this_node() -> str | None:
    """Why the node of this process must be left, for a trial that trains in its own process; None: it need
    not."""
    if "ray" not in sys.modules:
        return None  # called from a test or a notebook
    import ray
    from ray._private.state import state  # where Ray Train's own watcher looks; there is no public way

    if not ray.is_initialized():
        return None
    deadline_ms = state.get_draining_nodes().get(ray.get_runtime_context().get_node_id())
    return None if deadline_ms is None else _reason(deadline_ms or None)


def notice_to_the_workers() -> str | None:
    """Why the nodes of a Ray Train trial must be left; None: they need not. All workers must call it."""
    import ray.train

    info = ray.train.get_preemption_info()
    return None if info is None else _reason(info.deadline_ms)


def _reason(deadline_ms: int | None) -> str:
    if deadline_ms is None:
        return "its node is about to be taken away"
    deadline = datetime.datetime.fromtimestamp(deadline_ms / 1000, tz=datetime.UTC)
    return f"its node is taken away at {deadline:%Y-%m-%d %H:%M:%S} UTC"
