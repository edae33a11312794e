"""Speed, start-up and memory of the training loop beside a bare PyTorch loop and transformers.Trainer.

    python benchmarks/training.py                     # model, data and batch of studies/weight_search.yaml
    python benchmarks/training.py --size gpt2         # GPT-2 124M from scratch, context 512, batches of 4
    python benchmarks/training.py --workers ddp fsdp  # one process of 2 threads beside two of 1 thread
    python benchmarks/training.py --share             # what evaluations, rows and checkpoints take of a trial
    python benchmarks/training.py --json FILE         # and the numbers, for comparison over time

Every measurement is made in a fresh process. In each round the contenders take turns, in an order that
rotates; a ratio is formed within a round, and the median over the rounds is shown, so that a machine whose
speed drifts slows all of them alike. Throughput is that of the steps after the warm-up ones, by the clock on
the wall, data and rows included. All start from the same weights and see the same batches in the same order;
the run fails where their losses part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MEBI = 2**20
STUDY = Path(__file__).resolve().parent.parent / "studies" / "weight_search.yaml"
CONTENDERS = ("ours", "bare", "Trainer")
SIZES: dict[str, dict[str, Any]] = {
    "default": {"changes": {}, "steps": 60, "warmup": 10},
    "gpt2": {
        "changes": {
            "model.num_layers": 12,
            "model.hidden_size": 768,
            "model.num_heads": 12,
            "model.vocab_size": 50257,
            "data.context_length": 512,
            "train.global_batch_tokens": 2048,
            "train.micro_batch_tokens": 1024,
            "train.learning_rate": 6e-4,
        },
        "steps": 8,
        "warmup": 2,
    },
}
SAME_STEPS, MOST_APART = 16, 1e-3
"""In the first steps the contenders' losses are so many nats apart at the most. Later ones tell nothing: Adam
at this learning rate makes of a rounding error of 1e-8, as another thread brings it, 1e-2 within 60 steps."""


# --- in the measured process --------------------------------------------------------------------------


class Clock:
    """When each step ended, in seconds of time.perf_counter."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._ends: list[float] = []
        self._startup_s = math.nan
        self._started = math.nan

    def start(self) -> None:
        """The first step begins."""
        self._started = time.perf_counter()

    def tick(self) -> None:
        """A step has ended. A GPU is waited for only at the ends of what is reported."""
        import torch

        number = len(self._ends) + 1
        if self._job["device"] == "cuda" and number in (1, self._job["warmup"], self._job["steps"]):
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())
        if number == 1:
            self._startup_s = time.time() - self._job["started"]

    def result(self, losses: list[float]) -> dict[str, Any]:
        """Throughput of the steady and of all steps, start-up until the first has ended, peak, losses."""
        job = self._job
        assert len(self._ends) == len(losses) == job["steps"]
        warmup = job["warmup"]
        tokens_per_step = job["trial"]["train"]["global_batch_tokens"]
        steady_s = self._ends[-1] - self._ends[warmup - 1]
        return {
            "tokens_per_s": (job["steps"] - warmup) * tokens_per_step / steady_s,
            "all_steps_tokens_per_s": job["steps"] * tokens_per_step / (self._ends[-1] - self._started),
            "startup_s": self._startup_s,
            "peak_bytes": peak_bytes(job["device"]),
            "losses": losses,
        }


def peak_bytes(device: str) -> int:
    """Most memory of this process so far: CUDA's allocator, or the resident set's high-water mark (Linux)."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise KeyError("VmHWM")


def load(job: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(trial, model, training blocks, validation blocks) of a job."""
    from raydisp import data, models
    from raydisp.config import TrialConfig

    trial = TrialConfig.model_validate(job["trial"])
    folder = job["prepared"]
    model = models.build_model(
        trial.model,
        context_length=trial.data.context_length,
        eos_token_id=data.read_meta(folder)["eos_token_id"],
        seed=trial.seed,
    )
    return trial, model, data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation")


def measure_ours(job: dict[str, Any], rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """`raydisp.train.train` with rows written.

    Its evaluations, one before and one after the steady steps, see 2 sequences.
    """
    import torch

    from raydisp.data import TokenBlocks
    from raydisp.parallel import Layout
    from raydisp.results import RowWriter
    from raydisp.train import train

    clock, losses = Clock(job), []

    class TimedRows(RowWriter):
        def add(self, table: str, row: Any) -> None:
            super().add(table, row)
            if table == "steps":
                losses.append(row["loss"])
                clock.tick()

    class TwoBlocks(TokenBlocks):
        def __len__(self) -> int:
            return min(2, super().__len__())

    trial, model, blocks, _ = load(job)
    rows = TimedRows(job["folder"], 0, 1, resumed_step=0) if rank == 0 else None
    validation = TwoBlocks(job["prepared"], "validation")
    layout = Layout(rank, world_size, torch.device(job["device"]))
    result = train(model, blocks, validation, trial, layout=layout, rows=rows)
    if trial.train.strategy == "fsdp":
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(model, FSDPModule):
            raise RuntimeError("this version of raydisp does not shard the model")
    if rank != 0:
        return {}
    return {**clock.result(losses), "all_steps_tokens_per_s": result.tokens_per_s}


def measure_bare(job: dict[str, Any]) -> dict[str, Any]:
    """The floor: a loop of the same forward and backward passes and nothing around them."""
    import torch

    from raydisp.attach import DispersionTerm
    from raydisp.data import batch_indices
    from raydisp.memory import micro_batch_sequences
    from raydisp.optimizer import learning_rate_factor, make_optimizer
    from raydisp.parallel import Layout
    from raydisp.precision import make_autocast, resolve_precision

    clock, losses = Clock(job), []
    trial, model, blocks, _ = load(job)
    device = torch.device(job["device"])
    model.to(device)
    settings, per_step = trial.train, trial.sequences_per_step
    autocast = make_autocast(resolve_precision(settings.precision, device), device)
    micro = micro_batch_sequences(trial, Layout(device=device), vocab_size=model.config.vocab_size)
    optimizer = make_optimizer(model, settings)
    term = DispersionTerm(model, **term_settings(trial))
    clock.start()
    for step in range(job["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, job["steps"], settings)
        batch = blocks[batch_indices(len(blocks), trial.seed, step, per_step)]
        total = torch.zeros((), device=device)
        for part in batch.split(micro):
            input_ids = part.to(device, non_blocking=True)
            with autocast, term.recording():
                logits = model(input_ids=input_ids, use_cache=False).logits
            # The last position of each sequence predicts nothing; a label to ignore costs less than a copy
            # of the logits without it.
            targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss = (loss + term.weight * term.loss()) * (len(part) / per_step)
            loss.backward()
            total += loss.detach()
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        clock.tick()
    return clock.result(losses)


def measure_trainer(job: dict[str, Any]) -> dict[str, Any]:
    """transformers.Trainer and the textbook loss on its hidden states: what one would write without raydisp.

    No evaluation, no saving, no report; logging as by default, every 500 steps.
    """
    import torch
    from losses import PLAIN
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from raydisp.data import batch_indices
    from raydisp.layers import resolve_layers
    from raydisp.memory import micro_batch_sequences
    from raydisp.optimizer import learning_rate_factor
    from raydisp.parallel import Layout
    from raydisp.precision import resolve_precision

    trial, model, blocks, _ = load(job)
    device = torch.device(job["device"])
    settings, dispersion = trial.train, trial.dispersion
    plain = PLAIN[dispersion.variant]
    layers = resolve_layers(dispersion.layers, model.config.num_hidden_layers)
    micro = micro_batch_sequences(trial, Layout(device=device), vocab_size=model.config.vocab_size)
    accumulated = trial.sequences_per_step // micro
    assert accumulated * micro == trial.sequences_per_step, "Trainer wants equal micro-batches"
    clock, parts = Clock(job), []

    class Texts(torch.utils.data.Dataset[dict[str, Any]]):
        """The sequences of all steps, in the order that ours takes them."""

        def __init__(self) -> None:
            steps = [
                batch_indices(len(blocks), trial.seed, step, trial.sequences_per_step)
                for step in range(job["steps"])
            ]
            self.order = [int(index) for step in steps for index in step]

        def __len__(self) -> int:
            return len(self.order)

        def __getitem__(self, position: int) -> dict[str, Any]:
            ids = blocks[[self.order[position]]][0]
            return {"input_ids": ids, "labels": ids}

    class DispersionTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs, output_hidden_states=True)
            spread = torch.stack([plain(outputs.hidden_states[layer].float()) for layer in layers]).mean()
            loss = outputs.loss + dispersion.weight * spread
            parts.append(loss.detach())
            return (loss, outputs) if return_outputs else loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate_factor(step, job["steps"], settings)
            )
            return self.lr_scheduler

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    arguments = TrainingArguments(
        output_dir=job["folder"],
        max_steps=job["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.grad_clip or 0.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        bf16=resolve_precision(settings.precision, device) == "bf16",
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=trial.seed,
    )
    trainer = DispersionTrainer(model=model, args=arguments, train_dataset=Texts(), callbacks=[Ticks()])
    # Our loss is a mean, so that Trainer has to divide it by the number of accumulated batches.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    values = torch.stack(parts).view(job["steps"], accumulated).mean(1).tolist()
    return clock.result(values)


def term_settings(trial: Any) -> dict[str, Any]:
    names = ("weight", "variant", "temperature", "clamp", "margin", "layers", "max_tokens")
    return {name: getattr(trial.dispersion, name) for name in names}


def measure_two_workers(job: dict[str, Any]) -> dict[str, Any]:
    """Ours in two processes of one thread each, gloo (nccl on GPUs) between them."""
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, job), nprocs=2)
    return json.loads(Path(job["folder"], "rank-0.json").read_text())


def _worker(rank: int, port: int, job: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = measure_ours(job, rank, 2)
        Path(job["folder"], f"rank-{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def measure_share(job: dict[str, Any]) -> dict[str, Any]:
    """A trial as its study file says, and how long each part of it took. All times in seconds."""
    import torch

    import raydisp.train
    from raydisp.checkpoint import CheckpointFolder
    from raydisp.parallel import Layout
    from raydisp.results import RowWriter

    spent: dict[str, list[float]] = {"evaluations": [], "rows": [], "checkpoints": []}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part].append(time.perf_counter() - start)

        return measured

    trial, model, blocks, validation = load(job)
    rows = RowWriter(job["folder"], 0, 1, resumed_step=0)
    checkpoints = CheckpointFolder(str(Path(job["folder"], "checkpoints")), "benchmark")
    # The row writer's and the folder's methods are replaced on the objects, and the name by which the loop
    # calls `evaluate`: nothing in the product has to know of this.
    rows.add = timed("rows", rows.add)  # type: ignore[method-assign]
    rows.flush = timed("rows", rows.flush)  # type: ignore[method-assign]
    checkpoints.save = timed("checkpoints", checkpoints.save)  # type: ignore[method-assign]
    raydisp.train.evaluate = timed("evaluations", raydisp.train.evaluate)
    result = raydisp.train.train(
        model,
        blocks,
        validation,
        trial,
        layout=Layout(device=torch.device(job["device"])),
        rows=rows,
        checkpoints=checkpoints if trial.checkpoint.every_tokens else None,
    )
    assert result.tokens_per_s is not None
    steps_s = result.num_tokens / result.tokens_per_s
    *during, final = spent["evaluations"]
    parts = {
        "steps_s": steps_s,
        "evaluations_s": sum(during),
        "final_evaluation_s": final,
        "rows_s": sum(spent["rows"]),
        "checkpoints_s": sum(spent["checkpoints"]),
    }
    return {
        **parts,
        "rest_s": result.train_s - sum(parts.values()),
        "train_s": result.train_s,
        "num_steps": result.num_steps,
        "num_evaluations": len(during),
        "num_checkpoints": len(spent["checkpoints"]),
        "profile_ms": profile_evaluation(trial, model, validation, job["device"]),
    }


def profile_evaluation(trial: Any, model: Any, validation: Any, device_name: str) -> dict[str, float]:
    """Milliseconds of one evaluation of evaluate.max_tokens, and of its parts on all of its sequences."""
    import torch

    from raydisp import condensation
    from raydisp.evaluate import evaluate, token_losses
    from raydisp.memory import micro_batch_sequences
    from raydisp.parallel import Layout
    from raydisp.precision import make_autocast, resolve_precision

    device = torch.device(device_name)
    layout = Layout(device=device)
    autocast = make_autocast(resolve_precision(trial.train.precision, device), device)
    micro = micro_batch_sequences(trial, layout, vocab_size=model.config.vocab_size)
    tokens = trial.evaluate.max_tokens or len(validation) * validation.context_length
    num_sequences = min(len(validation), tokens // validation.context_length)
    micro = min(micro, num_sequences)
    repeats = num_sequences / micro
    model.eval()
    input_ids = validation[list(range(micro))].to(device)

    def whole() -> None:
        evaluate(
            model,
            validation,
            split="validation",
            layout=layout,
            max_tokens=tokens,
            condensation_tokens=tokens,
            batch_sequences=micro,
            autocast=autocast,
        )

    def forward() -> Any:
        with autocast:
            return model(input_ids=input_ids, output_hidden_states=True, use_cache=False)

    with torch.no_grad():
        output = forward()
        states = output.hidden_states
        accumulator = condensation.CondensationAccumulator(len(states), device=device)
        parts: dict[str, tuple[Callable[[], Any], float]] = {
            "whole evaluation": (whole, 1),
            "forward passes": (forward, repeats),
            "cross-entropy": (lambda: token_losses(output.logits, input_ids), repeats),
            "condensation": (lambda: accumulator.update(states), repeats),
            "of it effective rank": (lambda: condensation.effective_rank(states), repeats),
            "of it histogram": (lambda: condensation.cosine_histogram(states), repeats),
            "of it mean cosine": (lambda: condensation.layer_cosine(states), repeats),
            "of it centred cosine": (lambda: condensation.layer_cosine_centred(states), repeats),
            "result with quantiles and trends": (accumulator.result, 1),
        }
        return {name: 1e3 * factor * typical_s(call, device_name) for name, (call, factor) in parts.items()}


def typical_s(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    import torch

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


MEASUREMENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": measure_ours,
    "bare": measure_bare,
    "Trainer": measure_trainer,
    "one": measure_ours,
    "ddp": measure_two_workers,
    "fsdp": measure_two_workers,
    "share": measure_share,
}


def run_job(path: str) -> None:
    """What the fresh process does: the job of a file, and its result beside it."""
    import torch

    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    found = MEASUREMENTS[job["contender"]](job)
    Path(job["folder"], "result.json").write_text(json.dumps(found))


# --- around it ----------------------------------------------------------------------------------------


def measure(contender: str, base: dict[str, Any], changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """One measurement in a fresh process, whose start-up counts from here."""
    with tempfile.TemporaryDirectory() as folder:
        job = {**base, **(changes or {}), "contender": contender, "folder": folder, "started": time.time()}
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--job", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{contender} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return json.loads(Path(folder, "result.json").read_text())


def take_turns(
    contenders: tuple[str, ...], rounds: int, call: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Results by contender, one per round; who begins rotates."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for name in contenders[first:] + contenders[:first]:
            found[name].append(call(name))
            speed = found[name][-1]["tokens_per_s"]
            print(f"  round {number + 1} of {rounds}, {name}: {speed:.0f} tokens/s", file=sys.stderr)
    return found


def check_losses(found: dict[str, list[dict[str, Any]]]) -> float:
    """The most that the loss of an early step differs between contenders, nats; ends the run where it is too
    much."""
    runs = [result["losses"][:SAME_STEPS] for results in found.values() for result in results]
    apart = max(max(losses) - min(losses) for losses in zip(*runs, strict=True))
    if not apart <= MOST_APART:
        raise SystemExit(
            f"the losses of the contenders are up to {apart:.1e} nats apart: they do not do the same"
        )
    return apart


def median_ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str = "tokens_per_s") -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a[key] / b[key] for a, b in zip(over, under, strict=True))


def summary(found: dict[str, list[dict[str, Any]]], reference: str) -> list[dict[str, Any]]:
    """A row per contender: medians over the rounds, and its throughput over the reference's."""
    rows = []
    for name, results in found.items():
        row: dict[str, Any] = {"contender": name, "rounds": len(results)}
        for key in ("tokens_per_s", "startup_s", "peak_bytes", "all_steps_tokens_per_s"):
            row[key] = statistics.median(result[key] for result in results)
        ratios = [
            a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(results, found[reference], strict=True)
        ]
        row[f"over_{reference}"] = statistics.median(ratios)
        row["lowest_ratio"], row["highest_ratio"] = min(ratios), max(ratios)
        rows.append(row)
    return rows


def print_comparison(rows: list[dict[str, Any]], reference: str) -> None:
    print(f"| contender | tokens/s | / {reference} (lowest, highest) | start-up, s | peak, MiB |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['contender']} | {row['tokens_per_s']:.0f} | {row[f'over_{reference}']:.3f}"
            f" ({row['lowest_ratio']:.3f}, {row['highest_ratio']:.3f}) | {row['startup_s']:.1f}"
            f" | {row['peak_bytes'] / MEBI:.0f} |"
        )


def compare_loops(base: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    found = take_turns(CONTENDERS, rounds, lambda name: measure(name, base))
    rows = summary(found, "bare")
    apart = check_losses(found)
    print_comparison(rows, "bare")
    all_steps = median_ratio(found["ours"], found["bare"], "all_steps_tokens_per_s")
    over_trainer = median_ratio(found["ours"], found["Trainer"])
    print(
        f"\nours / Trainer {over_trainer:.3f}; losses of the first {SAME_STEPS} steps at most {apart:.1e} "
        f"nats apart; with the first steps, by TrainResult.tokens_per_s, ours / bare {all_steps:.3f}"
    )
    rows[0]["all_steps_over_bare"] = all_steps
    rows[0]["over_Trainer"] = over_trainer
    rows[0]["losses_apart"] = apart
    return rows


def compare_workers(base: dict[str, Any], rounds: int, strategies: list[str]) -> list[dict[str, Any]]:
    def call(name: str) -> dict[str, Any]:
        if name == "one":
            return measure(name, {**base, "threads": 2})
        trial = {**base["trial"], "train": {**base["trial"]["train"], "strategy": name}}
        return measure(name, {**base, "trial": trial, "threads": 1})

    found = take_turns(("one", *strategies), rounds, call)
    check_losses(found)
    rows = summary(found, "one")
    print_comparison(rows, "one")
    print("\none: 1 process of 2 threads; the others: 2 processes of 1 thread, peak of the first one")
    return rows


def show_share(base: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    runs = [measure("share", base) for _ in range(rounds)]
    parts = [key for key in runs[0] if key.endswith("_s") and key != "train_s"]
    row: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in ("train_s", *parts)}
    for key in parts:
        row[key.replace("_s", "_share")] = statistics.median(run[key] / run["train_s"] for run in runs)
    row.update({key: runs[0][key] for key in ("num_steps", "num_evaluations", "num_checkpoints")})
    row["profile_ms"] = {
        name: statistics.median(run["profile_ms"][name] for run in runs) for name in runs[0]["profile_ms"]
    }
    print("| part of the training | s | % of train_s |\n|---|---|---|")
    for key in parts:
        name = key.removesuffix("_s").replace("_", " ")
        print(f"| {name} | {row[key]:.2f} | {100 * row[key.replace('_s', '_share')]:.1f} |")
    share = statistics.median(
        (run["evaluations_s"] + run["rows_s"]) / (run["train_s"] - run["final_evaluation_s"]) for run in runs
    )
    row["evaluations_and_rows_share"] = share
    print(
        f"\n{row['num_steps']} steps, {row['num_evaluations']} evaluations before the final one of the whole "
        f"split, {row['num_checkpoints']} checkpoints. Evaluations and rows: {100 * share:.1f} % of the time "
        "without the final evaluation.\n"
    )
    print("| part of an evaluation | ms |\n|---|---|")
    for name, value in row["profile_ms"].items():
        print(f"| {name} | {value:.0f} |")
    return [row]


@contextlib.contextmanager
def cache_folder(given: str | None) -> Iterator[str]:
    """Where prepared data goes: the folder given, or one that goes away again."""
    if given is not None:
        yield given
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        return ", ".join(sorted(names)) or platform.processor()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, help="steps of each training; default 60 (gpt2: 8), of --share the study's"
    )
    parser.add_argument("--warmup", type=int, help="first steps that throughput leaves out; 10 (gpt2: 2)")
    parser.add_argument("--threads", type=int, help="of each process; default 1 as in the study, gpt2: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--workers", nargs="+", choices=["ddp", "fsdp"], help="two processes beside one instead"
    )
    what.add_argument("--share", action="store_true", help="what evaluations take of a whole trial instead")
    parser.add_argument("--cache", metavar="DIR", help="keep the prepared data here, to find it next time")
    parser.add_argument("--json", metavar="FILE", help="write machine, settings and rows here too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments.job)
        return
    if arguments.workers and arguments.device != "cpu":
        parser.error("--workers compares two halves of a CPU")

    import torch

    from raydisp import data
    from raydisp.config import replace_fields
    from raydisp.studyfile import load_study

    size = SIZES[arguments.size]
    trial = replace_fields(load_study(STUDY).trial, size["changes"])
    steps = arguments.steps or (trial.num_steps if arguments.share else size["steps"])
    warmup = arguments.warmup or min(size["warmup"], steps - 1)
    if not 1 <= warmup < steps:
        parser.error(f"--warmup {warmup} must leave some of the {steps} steps, and is at least 1")
    changes: dict[str, Any] = {"train.budget_tokens": steps * trial.train.global_batch_tokens}
    if not arguments.share:
        changes.update({"evaluate.every_tokens": None, "checkpoint.every_tokens": None})
    trial = replace_fields(trial, changes)
    threads = arguments.threads or (1 if arguments.size == "default" else torch.get_num_threads())
    machine = {
        "processor": torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    settings = {
        "size": arguments.size,
        "steps": steps,
        "warmup": warmup,
        "rounds": arguments.rounds,
        "tokens per step": trial.train.global_batch_tokens,
        "threads": "2 and 2 x 1" if arguments.workers else threads,
    }
    for line in (machine, settings):
        print(", ".join(f"{key} {value}" for key, value in line.items()))
    print(flush=True)
    with cache_folder(arguments.cache) as cache:
        base = {
            "trial": trial.model_dump(mode="json"),
            "prepared": data.prepare(trial, cache),
            "steps": steps,
            "warmup": warmup,
            "threads": threads,
            "device": arguments.device,
        }
        if arguments.workers:
            rows = compare_workers(base, arguments.rounds, arguments.workers)
        elif arguments.share:
            rows = show_share(base, arguments.rounds)
        else:
            rows = compare_loops(base, arguments.rounds)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "settings": settings, "rows": rows}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
