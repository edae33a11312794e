"""A process trains one trial after the other, and each must find it as the first one did.

`left_as_found` puts back what a trial may change for its whole process: the working folder, the environment,
torch's settings, the states of all generators. What the trial held is given back to the machine. What cannot
be undone, a thread that still runs, is named by `leftovers`, so that the process is not used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

Undo = Callable[[], None]


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """Around an attempt at a trial, or as a decorator of it: the process is afterwards as it was before."""
    undo = [*_process_state(), *_torch_state()]
    try:
        yield
    finally:
        for restore in undo:
            restore()
        release_memory()


def release_memory() -> None:
    """Give what nobody refers to any more back to the machine: Python's, CUDA's and the C library's."""
    torch = sys.modules.get("torch")
    if torch is not None and "torch._dynamo" in sys.modules:
        # Compiled code of the last trial's model; without this its shapes count against the next one's.
        torch.compiler.reset()
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def threads() -> set[threading.Thread]:
    """The Python threads that run now."""
    return set(threading.enumerate())


def leftovers(before: Collection[threading.Thread], *, patience_s: float = 2.0) -> list[str]:
    """Names of the threads that were not there before and would keep a process from ending.

    Daemons do not count: libraries start them once for a process, and they die with it.

    Args:
        patience_s: how long a thread that is about to end is waited for.
    """
    deadline = time.monotonic() + patience_s
    for thread in threads() - set(before):
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(t.name for t in threads() - set(before) if t.is_alive() and not t.daemon)


def _process_state() -> Iterator[Undo]:
    folder, environment, path = os.getcwd(), dict(os.environ), list(sys.path)
    python, numpy = random.getstate(), np.random.get_state()

    def restore_environment() -> None:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    def restore_folder() -> None:
        with contextlib.suppress(OSError):  # it may have been deleted meanwhile
            os.chdir(folder)

    def restore_path() -> None:
        sys.path[:] = path

    yield restore_folder
    yield restore_environment
    yield restore_path
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(numpy)


def _torch_state() -> Iterator[Undo]:
    # Imported even where the trial has yet to do so: what it changes first is known only then.
    import torch

    for get, put in (
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_rng_state, torch.set_rng_state),
    ):
        yield _putting_back(put, get())
    for place, name in (
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ):
        yield _putting_back(_setter(place, name), getattr(place, name))
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()

    def restore_determinism() -> None:
        if (deterministic, warn_only) != (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ):  # setting it loads torch's compiler
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

    yield restore_determinism
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore_cuda() -> None:
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.Generator().initial_seed())  # as a process begins

    yield restore_cuda


def _putting_back(put: Callable[[Any], Any], value: Any) -> Undo:
    return lambda: put(value)


def _setter(place: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(place, name, value)
