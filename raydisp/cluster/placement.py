"""How long a trial waits for its place, and the sentence when it has waited too long."""

from __future__ import annotations

from raydisp.cluster.capacity import Offer
from raydisp.errors import ResourceError


class PlacementWatch:
    """Watches trials that wait while nothing of their study runs.

    As long as one trial runs, the others wait for it to end, which is as it should be. Where none runs, the
    cluster has no place, and that may be for ever.
    """

    def __init__(self, timeout_s: float, needs: str) -> None:
        """Nothing waits as yet.

        Args:
            needs: what one trial needs, for the sentence: "1 worker x 1 CPU".
        """
        self._timeout_s = timeout_s
        self._needs = needs
        self._since: float | None = None

    def saw(self, *, pending: bool, running: bool, now: float) -> bool:
        """Take note of how things stand, and say whether the wait has been too long.

        Args:
            pending: whether any trial of the study waits to be placed.
            running: whether any is placed.
            now: seconds, of a clock that is never set back.
        """
        if not pending or running:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since > self._timeout_s

    def error(self, offer: str) -> ResourceError:
        """The error to end the study with.

        Args:
            offer: a fresh `describe_offer`.
        """
        return ResourceError(not_placed(self._needs, self._timeout_s, offer))


def not_placed(needs: str, timeout_s: float, offer: str, *, what: str = "a trial") -> str:
    """The sentence of what has waited for its place for too long."""
    return (
        f"resources: {what} of {needs} was not placed within placement_timeout_s = {timeout_s:g} s; {offer}. "
        "Wait until others are done or nodes have joined and give the same command again, ask for less, or "
        "raise resources.placement_timeout_s"
    )


def describe_offer(offer: Offer, cpus: float, gpus: float, *, where: str = "the cluster") -> str:
    """`the cluster offers 2 CPUs, 1 CPU of it free at the moment`, for workers of so many CPUs and GPUs."""
    free = offer.describe_free(gpus)
    return f"{where} offers {offer.describe(cpus, gpus)}" + (f"; {free}" if free else "")
