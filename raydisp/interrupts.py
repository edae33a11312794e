"""Ctrl-C and SIGTERM: a study stops cleanly, and in bounded time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raydisp.errors import EXIT_INTERRUPTED

STOP_TIMEOUT_S = 30.0
"""How long a clean stop may take. A SIGTERM to the whole process group ends Ray's own processes too; without
a limit the command would wait for them for minutes and then abort."""


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within it, SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    original = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, original)


@contextlib.contextmanager
def stop_tune_on_interrupt(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM let Tune stop its trials and return; the second one interrupts at once.

    Args:
        on_interrupt: called first; Tune returns from `fit` as if all were done.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    original = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: Any) -> None:
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.default_int_handler)
        on_interrupt()
        limit = threading.Timer(STOP_TIMEOUT_S, _give_up)
        limit.daemon = True
        limit.start()
        # Tune's own way to be stopped; its SIGINT handler is off so that we learn of the signal.
        signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.default_int_handler)  # until Tune has set its handler
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in original.items():
            signal.signal(number, handler)


def _give_up() -> None:
    message = (
        f"\nInterrupted; Ray did not stop within {STOP_TIMEOUT_S:g} s. The same command continues the study."
    )
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)
