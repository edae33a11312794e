"""The errors a user can cause.

Each message says where the mistake is, what was found, what is allowed and what to do. The command line
prints the message alone and exits with 2; a trial turns one into its row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE, EXIT_FAILED_TRIALS, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
"""What the commands return."""


class RaydispError(Exception):
    """A mistake that the user can mend; its text is complete without a traceback."""

    hub_unreachable = False
    """Whether all that is wrong is that the Hugging Face hub does not answer now."""


class ConfigError(RaydispError):
    """The study file, or an override of it, says something that is not allowed."""


class DataError(RaydispError):
    """The corpus cannot be found, read or cut into blocks."""


class ModelError(RaydispError):
    """The model or its tokenizer cannot be found, read or built."""


class ResourceError(RaydispError):
    """The machine or the cluster cannot offer what a trial needs."""


class NodeError(RaydispError):
    """A node of the cluster is not fit for the study; one sentence per problem."""


class OutputError(RaydispError):
    """The results folder cannot be written, or holds something else."""


class VerdictError(RaydispError):
    """The rows of a confirm phase cannot be judged: there are none, or they do not belong together."""


class CheckpointError(RaydispError):
    """A checkpoint cannot be gone on from: it is of another model, or not what it should be."""


class DivergedError(Exception):
    """Loss or gradient stopped being finite; carries the step at which it was seen."""

    def __init__(self, step: int, quantity: str, value: float) -> None:
        super().__init__(step, quantity, value)  # all of it, so that it survives pickling
        self.step = step
        self.quantity = quantity
        self.value = value

    def __str__(self) -> str:
        return f"{self.quantity} is {self.value} at step {self.step}"


class OutOfMemoryError(Exception):
    """A forward or backward pass did not fit into memory; carries what may be made smaller."""

    def __init__(self, step: int, micro_batch_tokens: int, reason: str) -> None:
        super().__init__(step, micro_batch_tokens, reason)
        self.step = step
        self.micro_batch_tokens = micro_batch_tokens
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"out of memory at step {self.step} with micro-batches of {self.micro_batch_tokens} tokens: "
            f"{self.reason}"
        )


class TaskError(Exception):
    """A benchmark could not be evaluated; its text says which, and why."""


class PreemptedError(Exception):
    """The machine is about to be taken away; a checkpoint of the step has been saved, if there are any."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(step, reason)
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        return f"stopped after step {self.step}: {self.reason}"


class LeaseLostError(Exception):
    """Another command has taken over the results folder: nothing more may be written to it."""


class PlacementTimeoutError(Exception):
    """The workers of a trial were not placed in time; its text has the numbers."""


class UnfitProcessError(Exception):
    """A trial has ended and its row is written, but its process must not be given another trial."""


def suggest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean "last"?' for a near miss, '' otherwise."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
