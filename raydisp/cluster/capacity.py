"""What machines offer, now and after an autoscaler has done all it may, and how many workers fit.

Plain values and counting; `autoscaler` and `session` read them from Ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs that one machine offers."""

    cpus: float
    gpus: float
    is_head: bool = False
    accelerator_type: str | None = None
    """Ray's name for the kind of its GPUs."""

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs it holds.

        One worker never spans two nodes, and Ray gives a part of a GPU from one GPU: with 0.4 each, two share
        one, and the rest is left.
        """
        by_cpus = _times(self.cpus, cpus)
        if not gpus:
            return by_cpus
        by_gpus = int(self.gpus) * _times(1, gpus) if gpus < 1 else _times(self.gpus, gpus)
        return min(by_cpus, by_gpus)


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that an autoscaler may start."""

    name: str
    node: Node | None
    """One of them; None where its configuration does not say how large they are (nodes of one's own)."""
    max_nodes: int


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may make of a cluster."""

    groups: tuple[NodeGroup, ...]
    max_nodes: int
    """Of all groups together, those that run already included."""
    with_head: bool = False
    """Whether the head node is of one of the groups; else it comes on top."""

    def nodes(self, cpus: float, gpus: float) -> list[tuple[Node, int]]:
        """The nodes, with their numbers, that hold the most workers of so many CPUs and GPUs."""
        chosen = []
        left = self.max_nodes
        sized = [(group.node, group.max_nodes) for group in self.groups if group.node is not None]
        # Each node costs one of `max_nodes`, whatever it holds: the roomiest first.
        for node, number in sorted(
            sized, key=lambda pair: (pair[0].room(cpus, gpus), pair[0].gpus, pair[0].cpus), reverse=True
        ):
            taken = min(number, left)
            left -= taken
            if taken:
                chosen.append((node, taken))
        return chosen


@dataclass(frozen=True)
class Offer:
    """What a machine or a cluster has, and what it can become."""

    nodes: tuple[Node, ...]
    """Those that are alive."""
    growth: Growth | None = None
    """None: no autoscaler, or none that tells its limits."""
    free: Node | None = None
    """Of all nodes together, what nobody has taken; None: nobody was asked."""
    head_memory_bytes: float | None = None
    """That the head node has for processes; None: not known, or no node calls itself the head."""

    @property
    def has_head(self) -> bool:
        return any(node.is_head for node in self.nodes)

    @property
    def has_gpus(self) -> bool:
        """Whether any node has a whole GPU, or will."""
        groups = self.growth.groups if self.growth else ()
        ahead = [group.node for group in groups if group.node is not None]
        return any(node.gpus >= 1 for node in (*self.nodes, *ahead))

    @property
    def num_unsized(self) -> int:
        """Nodes that may still come and of which nobody knows how large they are."""
        if self.growth is None:
            return 0
        # Every node but the head counts as one that the autoscaler started: Ray does not always say.
        running = sum(not node.is_head for node in self.nodes)
        unsized = sum(group.max_nodes for group in self.growth.groups if group.node is None)
        return max(0, min(unsized, self.growth.max_nodes) - running)

    def room_now(self, cpus: float, gpus: float) -> int:
        """Workers that the nodes hold that are alive, were they empty."""
        return sum(node.room(cpus, gpus) for node in self.nodes)

    def room(self, cpus: float, gpus: float) -> int:
        """Workers that the nodes can hold once the autoscaler has started all it may."""
        grown = sum(number * node.room(cpus, gpus) for node, number in self._grown(cpus, gpus))
        return max(self.room_now(cpus, gpus), grown)

    def only(self, accelerator_type: str) -> Offer:
        """What of it has GPUs of one kind: other nodes are there, and hold nothing."""

        def part(node: Node) -> Node:
            fits = node.accelerator_type == accelerator_type
            return node if fits else dataclasses.replace(node, cpus=0, gpus=0)

        growth = self.growth
        if growth is not None:
            groups = tuple(
                group
                for group in growth.groups
                if group.node is None or group.node.accelerator_type == accelerator_type
            )
            growth = dataclasses.replace(growth, groups=groups)
        return dataclasses.replace(self, nodes=tuple(part(node) for node in self.nodes), growth=growth)

    def starts(self, num_workers: int, cpus: float, gpus: float) -> list[tuple[str, int]]:
        """Names and numbers of the nodes that an autoscaler starts for so many workers, at most.

        It starts the roomiest first, as counted here; a real one may choose others of the same size. Nodes
        of unknown size are left out.
        """
        if self.growth is None:
            return []
        missing = num_workers - self.room_now(cpus, gpus)
        running = sum(not node.is_head for node in self.nodes)
        left = self.growth.max_nodes - running - (1 if self.growth.with_head else 0)
        chosen = []
        for group in sorted(
            (group for group in self.growth.groups if group.node is not None and group.node.room(cpus, gpus)),
            key=lambda group: group.node.room(cpus, gpus) if group.node is not None else 0,
            reverse=True,
        ):
            assert group.node is not None
            number = min(-(-missing // group.node.room(cpus, gpus)), group.max_nodes, left)
            if number <= 0:
                break
            chosen.append((group.name, number))
            missing -= number * group.node.room(cpus, gpus)
            left -= number
        return chosen

    def describe(self, cpus: float, gpus: float) -> str:
        """`10 CPUs and 4 GPUs on 3 nodes now` and what it can become, for workers of so many of each."""
        text = self._total([(node, 1) for node in self.nodes], gpus)
        if len(self.nodes) > 1:
            most = _amount(max(n.cpus for n in self.nodes), max(n.gpus for n in self.nodes), gpus, "or")
            text += f" on {len(self.nodes)} nodes (none with more than {most})"
        if self.growth is None:
            return text
        text += " now"
        grown = self._grown(cpus, gpus)
        kinds = [
            f"{group.max_nodes} of {_amount(group.node.cpus, group.node.gpus, gpus)}"
            for group in self.growth.groups
            if group.node is not None
        ]
        if kinds:
            limit = f"up to {', '.join(kinds)}"
            if sum(group.max_nodes for group in self.growth.groups) > self.growth.max_nodes:
                limit += f", {self.growth.max_nodes} in all"
            text += f", and can grow to {self._total(grown, gpus)} (autoscaler: {limit})"
        if self.num_unsized:
            text += f", and {count(self.num_unsized, 'node')} of unknown size may join"
        if not kinds and not self.num_unsized:
            text += ", and its autoscaler may start no more"
        return text

    def describe_free(self, gpus: float) -> str:
        """`1 CPU and 0 GPUs are free`, or '' where nobody was asked."""
        if self.free is None:
            return ""
        return f"{_amount(self.free.cpus, self.free.gpus, gpus)} of it free at the moment"

    def _grown(self, cpus: float, gpus: float) -> list[tuple[Node, int]]:
        if self.growth is None:
            return []
        head = [] if self.growth.with_head else [(node, 1) for node in self.nodes if node.is_head]
        return [*head, *self.growth.nodes(cpus, gpus)]

    def _total(self, nodes: list[tuple[Node, int]], gpus: float) -> str:
        return _amount(sum(n.cpus * k for n, k in nodes), sum(n.gpus * k for n, k in nodes), gpus)


def describe_workers(num_workers: int, cpus: float, gpus: float, *, at_least: int | None = None) -> str:
    """`2 workers x 1 CPU + 1 GPU`, or `1 to 2 workers x 1 CPU`."""
    fewer = "" if at_least is None or at_least == num_workers else f"{at_least} to "
    text = f"{fewer}{count(num_workers, 'worker')} x {cpus:g} CPU"
    return text + (f" + {gpus:g} GPU" if gpus else "")


def _times(whole: float, part: float) -> int:
    # Ray counts in steps of 0.0001.
    return int(whole / part + 1e-6)


def count(number: float, unit: str) -> str:
    """`1 CPU`, `2 CPUs`."""
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def _amount(cpus: float, gpus: float, asked_gpus: float, word: str = "and") -> str:
    # GPUs are told of where they are asked for.
    return count(cpus, "CPU") + (f" {word} {count(gpus, 'GPU')}" if asked_gpus else "")
