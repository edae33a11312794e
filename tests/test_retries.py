"""Which attempts are followed by another one."""

from __future__ import annotations

from typing import Any

import pytest

from raydisp.trial.retries import goes_on, reduced_micro_batch


def attempts(*error_types: str | None, micro_batch_tokens: int | None = 64) -> list[dict[str, Any]]:
    return [{"error_type": kind, "micro_batch_tokens": micro_batch_tokens} for kind in error_types]


@pytest.mark.parametrize(
    ("error_types", "expected"),
    [
        (["ProcessLost"], True),
        (["ProcessLost", "WorkerLost"], True),
        (["ProcessLost", "WorkerLost", "CollectiveTimeout"], False),
        # the user's own stops and the machines' notices do not count
        (["ProcessLost", None, "PreemptedError", "ProcessLost"], True),
        (["PreemptedError"] * 9, True),
        (["OutOfMemoryError"], True),
        (["OutOfMemoryError", "ProcessLost"], True),
        (["OutOfMemoryError", "ProcessLost", "OutOfMemoryError"], False),
        (["ConfigError"], False),
        (["DivergedError"], False),
        (["RuntimeError"], False),
    ],
)
def test_what_goes_on(error_types: list[str | None], expected: bool) -> None:
    assert goes_on(attempts(*error_types), context_length=16, max_failures=2) is expected


def test_no_failure_is_borne_where_the_file_says_so() -> None:
    assert not goes_on(attempts("ProcessLost"), context_length=16, max_failures=0)


@pytest.mark.parametrize(("tokens", "half"), [(64, 32), (48, 16), (32, 16)])
def test_the_micro_batch_is_halved_in_whole_sequences(tokens: int, half: int) -> None:
    rows = attempts("OutOfMemoryError", micro_batch_tokens=tokens)
    assert goes_on(rows, context_length=16, max_failures=0)
    assert reduced_micro_batch(rows, context_length=16) == half


@pytest.mark.parametrize("tokens", [16, None])
def test_one_sequence_cannot_be_halved(tokens: int | None) -> None:
    rows = attempts("OutOfMemoryError", micro_batch_tokens=tokens)
    assert not goes_on(rows, context_length=16, max_failures=9)


def test_attempts_that_had_enough_memory_keep_their_micro_batch() -> None:
    assert reduced_micro_batch(attempts(None, "ProcessLost"), context_length=16) is None
