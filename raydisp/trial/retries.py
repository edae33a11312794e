"""Which attempts of a trial are followed by another one, and with what.

Both answers are functions of the rows of the attempts so far, so that the trial's own process, the search and
the next run of the command give the same ones.

| what ended the attempt | what follows |
|---|---|
| process, worker or node was lost; workers hung | the last checkpoint, `failures.max_failures` times |
| the node gave notice; no place in time while others run | the last checkpoint, as often as it happens |
| out of memory | once, with half the micro-batch: the same global batch in more passes |
| the user stopped the study | the last checkpoint, with the next run of the command |
| a failure, and the user gives `--retry-failed` | a new beginning |
| anything else | nothing: it would happen again |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOST = ("ProcessLost", "WorkerLost", "CollectiveTimeout")
"""`error_type` of attempts that were lost through no fault of the trial."""
OUT_OF_MEMORY = "OutOfMemoryError"
PREEMPTED = "PreemptedError"
NOT_PLACED = "PlacementTimeout"
"""Goes on as long as other trials of the study run, whose place it may have next (`search.dispatch`)."""

Row = Mapping[str, Any]


def goes_on(attempts: Sequence[Row], *, context_length: int, max_failures: int) -> bool:
    """Whether the last of these attempts, which ended by an error, is followed by another.

    Args:
        attempts: rows of all attempts of one trial, in order, the last with its error columns.
        context_length: of the trial: a micro-batch is one sequence at least.
    """
    # A failed trial that the user has put up again begins with a clean slate.
    failed = [index for index, row in enumerate(attempts[:-1]) if row.get("status") == "failed"]
    attempts = attempts[failed[-1] + 1 :] if failed else attempts
    last = attempts[-1]
    if last["error_type"] in (PREEMPTED, NOT_PLACED):
        return True
    if last["error_type"] in LOST:
        return sum(row.get("error_type") in LOST for row in attempts) <= max_failures
    if last["error_type"] == OUT_OF_MEMORY:
        first = sum(row.get("error_type") == OUT_OF_MEMORY for row in attempts) == 1
        return first and (last.get("micro_batch_tokens") or 0) >= 2 * context_length
    return False


def reduced_micro_batch(attempts: Sequence[Row], *, context_length: int) -> int | None:
    """Tokens of a micro-batch after an attempt ran out of memory: half of its, in whole sequences; None
    where none did."""
    for row in attempts:
        if row.get("error_type") == OUT_OF_MEMORY and row.get("micro_batch_tokens"):
            sequences = row["micro_batch_tokens"] // context_length
            return max(1, sequences // 2) * context_length
    return None
