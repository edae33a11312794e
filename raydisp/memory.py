"""Memory of a training process: how much fits into one forward pass, when it did not, and the peak."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

from raydisp.config import TrialConfig
from raydisp.parallel import Layout


def micro_batch_sequences(trial: TrialConfig, layout: Layout, *, vocab_size: int) -> int:
    """Sequences per forward pass of one worker.

    `auto` bounds the float32 logits, which dominate in small models, to 256 MiB on a CPU and 2 GiB on a GPU;
    logits, their gradient and the softmax then take about three times that. Where a teacher is beside the
    model, its logits and the gradient of the divergence from them are as large; all five then take no more.
    """
    mine = trial.sequences_per_step // layout.world_size
    if trial.train.micro_batch_tokens != "auto":
        return min(mine, trial.train.micro_batch_tokens // trial.data.context_length)
    limit_bytes = 3 * (2**31 if layout.device.type == "cuda" else 2**28)
    copies = 5 if trial.distillation.is_on else 3
    per_sequence = copies * trial.data.context_length * vocab_size * 4
    return min(mine, max(1, limit_bytes // per_sequence))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA's own error, Python's, or that of torch's allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next, in this process from now on.

    By default glibc gives large blocks back to the system at once, and every step of a training on a CPU gets
    the same pages anew, page fault by page fault: a sixth of the time of the default study's steps. The peak
    is the same; between trials `tidy.release_memory` gives back what is kept. Other C libraries are left
    as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on: a process may have trained other trials before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux, where the process may
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory since `reset_peak_memory`: of CUDA's allocator on a GPU, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
