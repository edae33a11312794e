"""What ended an attempt: out of an exception, and what Ray has wrapped around it, the columns of a row."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

from raydisp.errors import DivergedError, OutOfMemoryError, PlacementTimeoutError

MAX_MESSAGE_LENGTH = 2000


def describe_failure(error: BaseException, tokens_per_step: int) -> dict[str, Any]:
    """Status and error columns for what ended an attempt."""
    cause, trace = root_cause(error)
    kind, message = _kind_and_message(cause, trace)
    columns: dict[str, Any] = {
        "status": "failed",
        "error_type": kind,
        "error_message": message[:MAX_MESSAGE_LENGTH],
        "traceback": trace,
    }
    if isinstance(cause, DivergedError):
        columns["status"] = "diverged"
        columns["num_steps"] = cause.step - 1
        columns["num_tokens"] = (cause.step - 1) * tokens_per_step
    if isinstance(cause, OutOfMemoryError):
        columns["micro_batch_tokens"] = cause.micro_batch_tokens
    return columns


def _kind_and_message(cause: BaseException, trace: str) -> tuple[str, str]:
    """What ended an attempt, in a word and a sentence; the words of `retries.LOST` are ours."""
    told = str(cause).strip() or type(cause).__name__
    if isinstance(cause, PlacementTimeoutError):
        return "PlacementTimeout", told
    first_line = told.splitlines()[0]
    if _is_collective(cause, trace):
        if re.search(r"timed? ?out", told, re.IGNORECASE):
            return "CollectiveTimeout", (
                "a worker got no answer from the others within failures.collective_timeout_s: one of them "
                f"hangs, or the network between them is down ({first_line})"
            )
        return "WorkerLost", f"a worker lost the connection to another one, which has ended ({first_line})"
    if type(cause).__module__.startswith("ray."):
        return "WorkerLost", f"a worker's process or its node was lost ({first_line})"
    return type(cause).__name__, told


def _is_collective(cause: BaseException, trace: str) -> bool:
    """Whether an error came out of an exchange between workers."""
    frames = [line for line in trace.splitlines() if line.lstrip().startswith('File "')]
    return (
        type(cause).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
        or bool(re.search(r"gloo|NCCL|[Cc]onnection (closed|reset) by peer", str(cause)))
        or (bool(frames) and "distributed_c10d.py" in frames[-1])
    )


def root_cause(error: BaseException) -> tuple[BaseException, str]:
    """The exception that a worker raised, out of what Ray Train wraps around it, and its traceback."""
    trace = "".join(traceback.format_exception(error))
    failures: Mapping[int, Any] = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    traces = [getattr(failure, "_traceback_str", trace) for _, failure in sorted(failures.items())]
    # When one worker stops, its peers fail in their collectives; those errors say nothing. Nor does Ray's
    # word that a process is gone, beside an exception that the process raised.
    ranked = sorted(
        zip(causes, traces, strict=True),
        key=lambda pair: (
            not isinstance(pair[0], DivergedError),
            _is_collective(*pair),
            type(pair[0]).__module__.startswith("ray."),
        ),
    )
    return ranked[0] if ranked else (error, trace)
