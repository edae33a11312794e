"""Time and memory of the losses: ours, the textbook autograd form, and the bare matrix products.

    python benchmarks/losses.py                     # the table, L = 256, 1024, 4096
    python benchmarks/losses.py --json losses.json  # and the numbers, for comparison over time
    python benchmarks/losses.py --step              # a GPT-2 124M training step with and without the loss

In each round the three run one after the other on the same input, and ratios are medians over the rounds, so
that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raydisp.losses import VARIANTS

BATCH, FEATURES = 4, 768
MEBI = 2**20


def _cosines(hidden: Tensor, floor: float = 1e-6) -> Tensor:
    unit = hidden / hidden.norm(dim=-1, keepdim=True).clamp_min(floor)
    return unit @ unit.mT


def _angles(hidden: Tensor, clamp: float = 0.1) -> Tensor:
    unit = hidden / (hidden.norm(dim=-1, keepdim=True) + 0.01)
    cosines = unit @ unit.mT
    limited = cosines + (cosines.clamp(-1 + clamp, 1 - clamp) - cosines).detach()
    return torch.arccos(limited) / math.pi


def _different(matrix: Tensor) -> Tensor:
    """[B, L (L - 1)]: the entries off the diagonal."""
    keep = ~torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix[:, keep]


def _squared_distances(hidden: Tensor) -> Tensor:
    squares = hidden.square().sum(-1)
    return (squares[:, :, None] + squares[:, None, :] - 2 * hidden @ hidden.mT).clamp_min(0)


def plain_angular_spread(hidden: Tensor) -> Tensor:
    return (torch.exp(-_different(_angles(hidden))).mean(-1).log() + 0.01).mean()


def plain_orthogonalization(hidden: Tensor) -> Tensor:
    return (0.5 - _different(_angles(hidden))).clamp_min(0).square().mean()


def plain_l2_repel(hidden: Tensor) -> Tensor:
    pairs = torch.exp(-_squared_distances(hidden)).mean((1, 2)).log().mean()
    return pairs + 0.01 + 0.1 * hidden.square().mean()


def plain_decorrelation(hidden: Tensor) -> Tensor:
    rows = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, keepdim=True)
    return _different(rows @ rows.mT / (hidden.shape[-1] - 1)).square().mean()


def plain_uniformity(hidden: Tensor) -> Tensor:
    return torch.exp(-4 + 4 * _different(_cosines(hidden))).mean(-1).log().mean()


def plain_cosine(hidden: Tensor) -> Tensor:
    return _different(_cosines(hidden)).mean()


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "angular_spread": plain_angular_spread,
    "orthogonalization": plain_orthogonalization,
    "l2_repel": plain_l2_repel,
    "decorrelation": plain_decorrelation,
    "uniformity": plain_uniformity,
    "cosine": plain_cosine,
}


def forward_backward(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    hidden.grad = None
    loss(hidden).backward()


class Floor:
    """The two matrix products that any textbook form needs: Z Z^T forward, G Z backward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden.detach()
        length = hidden.shape[1]
        self.products = torch.empty(hidden.shape[0], length, length, dtype=hidden.dtype, device=hidden.device)
        self.result = torch.empty_like(self.hidden)

    def __call__(self) -> None:
        torch.bmm(self.hidden, self.hidden.mT, out=self.products)
        torch.bmm(self.products, self.hidden, out=self.result)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], None], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def status_bytes(field: str) -> int:
    """VmRSS (memory held now) or VmHWM (the most that was held) of this process, from Linux."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_extra_bytes(call: Callable[[], None], gradient_bytes: int, device: str) -> int:
    """Most memory beyond what was held before the call and the gradient that it leaves behind.

    On a CPU this is the resident set's high-water mark, so it has to run in a fresh process, whose allocator
    holds no freed pages to hide in; the matrix library's own buffers are in it too.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the high-water mark
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before - gradient_bytes


def make_input(length: int, device: str, dtype: torch.dtype, batch: int = BATCH) -> Tensor:
    """A moderately condensed layer: tokens share a direction, mean cosine near 0.5."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, FEATURES, generator=generator)
    hidden += torch.randn(batch, 1, FEATURES, generator=generator)
    return hidden.to(device, dtype).requires_grad_()


def contender(name: str, variant: str, hidden: Tensor) -> Callable[[], None]:
    if name == "floor":
        return Floor(hidden)
    loss = VARIANTS[variant] if name == "ours" else PLAIN[variant]
    return lambda: forward_backward(loss, hidden)


def measure_memory(name: str, variant: str, length: int, device: str, dtype: torch.dtype) -> int:
    """In this process: one call after a small one that loads the code."""
    contender(name, variant, make_input(8, device, dtype))()
    hidden = make_input(length, device, dtype)
    gradient_bytes = hidden.numel() * hidden.element_size()
    if name != "floor":
        return peak_extra_bytes(contender(name, variant, hidden), gradient_bytes, device)
    return peak_extra_bytes(lambda: contender(name, variant, hidden)(), gradient_bytes, device)


def memory_in_fresh_process(name: str, variant: str, length: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, variant, str(length)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


def compare(variant: str, length: int, rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row: medians over interleaved rounds of ours, plain autograd and the floor, and peak memory."""
    hidden = make_input(length, device, dtype)
    calls = {name: contender(name, variant, hidden) for name in ("ours", "plain", "floor")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        seconds(call, device)
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    row: dict[str, Any] = {"variant": variant, "length": length, "rounds": rounds}
    for name in calls:
        row[f"{name}_s"] = statistics.median(times[name])
    row["ours_over_floor"] = statistics.median(
        ours / floor for ours, floor in zip(times["ours"], times["floor"], strict=True)
    )
    row["plain_over_ours"] = statistics.median(
        plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)
    )
    del calls, hidden
    for name in ("ours", "plain"):
        if device == "cuda":
            row[f"{name}_peak_bytes"] = measure_memory(name, variant, length, device, dtype)
        else:
            row[f"{name}_peak_bytes"] = memory_in_fresh_process(name, variant, length)
    return row


def step_overhead(rounds: int, layers: str = "all") -> dict[str, Any]:
    """A GPT-2 124M step (B = 1, context 1024, AdamW), angular_spread on all layers and tokens or not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from raydisp.attach import DispersionTerm

    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    input_ids = torch.randint(0, config.vocab_size, (1, 1024))
    term = DispersionTerm(model, weight=0.1, layers=layers)

    def step(with_term: bool) -> None:
        if with_term:
            with term.recording():
                loss = model(input_ids, labels=input_ids).loss
            loss = loss + term.weight * term.loss()
        else:
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[bool, list[float]] = {False: [], True: []}
    for with_term in (False, True):
        step(with_term)
    for _ in range(rounds):
        for with_term in (False, True):
            times[with_term].append(seconds(lambda flag=with_term: step(flag), "cpu"))  # type: ignore[misc]
    return {
        "plain_step_s": statistics.median(times[False]),
        "dispersion_step_s": statistics.median(times[True]),
        "ratio": statistics.median(
            with_it / without for with_it, without in zip(times[True], times[False], strict=True)
        ),
        "rounds": rounds,
    }


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        return ", ".join(sorted(names)) or platform.processor()
    except OSError:
        return platform.processor()


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['variant']:<18} {row['length']:>5}"
        f" {1e3 * row['ours_s']:>10.1f} {1e3 * row['plain_s']:>10.1f} {1e3 * row['floor_s']:>10.1f}"
        f" {row['ours_over_floor']:>11.2f} {row['plain_over_ours']:>11.2f}"
        f" {row['ours_peak_bytes'] / MEBI:>9.1f} {row['plain_peak_bytes'] / MEBI:>9.1f}"
        f" {row['plain_peak_bytes'] / row['ours_peak_bytes']:>10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write machine, versions and rows here too")
    parser.add_argument("--step", action="store_true", help="the end-to-end training step instead")
    parser.add_argument("--memory-of", nargs=3, metavar=("NAME", "VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.memory_of:
        name, variant, length = arguments.memory_of
        print(measure_memory(name, variant, int(length), arguments.device, dtype))
        return
    machine = {
        "processor": torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.step:
        rows = [step_overhead(arguments.rounds)]
        print(
            "GPT-2 124M step, context 1024: {plain_step_s:.3f} s, with angular_spread on 12 layers and all "
            "tokens {dispersion_step_s:.3f} s, ratio {ratio:.3f} (median of {rounds} pairs)".format(**rows[0])
        )
    else:
        print(
            f"B = {BATCH}, F = {FEATURES}; ms, medians of {arguments.rounds} interleaved rounds; peaks in MiB"
        )
        print(
            f"{'variant':<18} {'L':>5} {'ours':>10} {'plain':>10} {'floor':>10} {'ours/floor':>11}"
            f" {'plain/ours':>11} {'ours':>9} {'plain':>9} {'plain/ours':>10}"
        )
        rows = []
        for variant in arguments.variants:
            for length in arguments.lengths:
                rounds = arguments.rounds if length < 4096 else max(3, arguments.rounds // 3)
                rows.append(compare(variant, length, rounds, arguments.device, dtype))
                print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
