"""Noisy embeddings and active forgetting against plain loops, on every layout, over a resume, and off."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError
from torch.distributed.tensor import DTensor

from raydisp import data, models
from raydisp.checkpoint import CheckpointFolder
from raydisp.config import StudyConfig, TrialConfig, replace_fields
from raydisp.data import BatchLoader, TokenBlocks
from raydisp.embeddings import ActiveForgetting, EmbeddingNoise, draw_noise, forgetting_factor
from raydisp.errors import DivergedError
from raydisp.evaluate import evaluate, token_losses
from raydisp.methods import make_term
from raydisp.optimizer import learning_rate_factor, make_optimizer, training_tensors
from raydisp.parallel import Layout, clip_gradients, seed_step
from raydisp.precision import make_autocast
from raydisp.search.space import column_types, searchable_fields
from raydisp.seeds import derive_seed
from raydisp.train import TrainResult, accumulate_gradients, train

CPU = torch.device("cpu")
NOISE = {"noisy_embedding.alpha": 5.0}
FORGETTING = {"active_forgetting.every_steps": 6, "active_forgetting.learning_rate": 5e-3}
# At the tiny study's rate of 0.01 Adam blows rounding up over 20 steps; this is the default's.
TWENTY_STEPS = {"train.budget_tokens": 2560, "train.learning_rate": 2e-3, "evaluate.every_tokens": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2, tied": {},
    "gpt2": {"model.tie_embeddings": False},
    "llama, tied": {"model.family": "llama"},
    "llama": {"model.family": "llama", "model.tie_embeddings": False},
}
METHODS: dict[str, dict[str, Any]] = {
    "noise": NOISE,
    "forgetting": FORGETTING,
    "both": {**NOISE, **FORGETTING},
}


class Rows:
    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {"steps": [], "evals": [], "layers": []}
        self.flushed: list[int] = []

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.tables[table].append(row)

    def flush(self, step: int) -> None:
        self.flushed.append(step)

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.tables["steps"]]


def build(trial: TrialConfig) -> torch.nn.Module:
    return models.build_model(
        trial.model, context_length=trial.data.context_length, eos_token_id=0, seed=trial.seed
    )


def blocks_of(trial: TrialConfig, cache_dir: str) -> dict[str, TokenBlocks]:
    folder = data.prepare(trial, cache_dir)
    return {split: TokenBlocks(folder, split) for split in ("train", "validation", "test")}


Run = Callable[..., tuple[TrainResult, Rows, torch.nn.Module]]


@pytest.fixture
def run(study: StudyConfig, cache_dir: str) -> Run:
    """Trains the tiny trial with changes: run({"train.beta1": 0.8}, checkpoints=...)."""

    def train_with(changes: dict[str, Any] | None = None, model: Any = None, **options: Any) -> Any:
        trial = replace_fields(study.trial, changes or {})
        model = build(trial) if model is None else model
        blocks = blocks_of(trial, cache_dir)
        rows = Rows()
        result = train(
            model, blocks["train"], blocks["validation"], trial, layout=Layout(), rows=rows, **options
        )
        return result, rows, model

    return train_with


def hooks_on(model: torch.nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if hook.__module__.startswith("raydisp")
    ]


# --- the methods, slowly, from their description --------------------------------------------------------


def scrambled(number: int) -> int:
    """`lowbias32` in Python's whole numbers."""
    number &= 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return number ^ (number >> 16)


def plain_noise(seed: int, step: int, sequence: int, length: int, num_features: int) -> torch.Tensor:
    """[L, F] numbers from (-1, 1), one by one."""
    base = derive_seed("noisy_embedding", seed, step)
    of_sequence = scrambled(sequence + (base & 0xFFFFFFFF))
    rows = []
    for token in range(length):
        stream = scrambled(of_sequence ^ (token + (base >> 32)))
        numbers = [scrambled(stream ^ scrambled(feature)) >> 8 for feature in range(num_features)]
        rows.append([(number + 0.5) / 2**23 - 1.0 for number in numbers])
    return torch.tensor(rows)


def plain_embeddings(seed: int, step: int, num_rows: int, num_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed("active_forgetting", seed, step))
    return torch.normal(0.0, 0.02, (num_rows, num_features), generator=generator)


def plain_rate(g: int, num_steps: int, every: int, peak: float) -> float:
    index = (g * math.floor(num_steps / every)) % num_steps
    warmup = 0.08 * num_steps
    return peak * (index / warmup if index < warmup else (num_steps - index) / (num_steps - warmup))


def plain_training(trial: TrialConfig, blocks: TokenBlocks) -> tuple[list[float], torch.nn.Module]:
    """Losses of all steps and the model at the end, by AdamW written out and no hooks."""
    model: Any = build(trial)
    embedding = model.get_input_embeddings()
    parameters = list(model.parameters())
    moments = {p: [0, torch.zeros_like(p), torch.zeros_like(p)] for p in parameters}
    settings, alpha = trial.train, trial.noisy_embedding.alpha
    every, peak = trial.active_forgetting.every_steps, trial.active_forgetting.learning_rate
    length, num_steps = trial.data.context_length, trial.num_steps
    losses = []
    with BatchLoader(
        blocks, seed=trial.seed, sequences_per_step=trial.sequences_per_step, num_steps=num_steps
    ) as batches:
        for g, batch in enumerate(batches):
            inputs = torch.nn.functional.embedding(batch, embedding.weight)
            if alpha:
                size = (length, inputs.shape[-1])
                noise = [plain_noise(trial.seed, g, number, *size) for number in range(len(batch))]
                inputs = inputs + torch.stack(noise) * alpha / math.sqrt(length * inputs.shape[-1])
            logits = model(inputs_embeds=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, parameters)
            losses.append(loss.item())
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            factor = min(1.0, settings.grad_clip / norm.item())
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    state = moments[p]
                    lr = settings.learning_rate * learning_rate_factor(g, num_steps, settings)
                    if p is embedding.weight and every is not None:
                        lr = plain_rate(g, num_steps, every, peak)
                    if p.dim() >= 2:
                        p *= 1 - lr * settings.weight_decay
                    state[0] += 1
                    state[1] = settings.beta1 * state[1] + (1 - settings.beta1) * gradient * factor
                    state[2] = settings.beta2 * state[2] + (1 - settings.beta2) * (gradient * factor) ** 2
                    mean = state[1] / (1 - settings.beta1 ** state[0])
                    square = state[2] / (1 - settings.beta2 ** state[0])
                    p -= lr * mean / (square.sqrt() + 1e-8)
                done = g + 1
                if every is not None and done % every == 0 and done < num_steps:
                    embedding.weight.copy_(plain_embeddings(trial.seed, done, *embedding.weight.shape))
                    moments[embedding.weight] = [0, *(torch.zeros_like(embedding.weight) for _ in range(2))]
    return losses, model


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_training_is_that_of_a_plain_loop(
    study: StudyConfig, cache_dir: str, run: Run, family: str, method: str
) -> None:
    changes = {**TWENTY_STEPS, **FAMILIES[family], **METHODS[method], "dispersion.weight": 0.0}
    trial = replace_fields(study.trial, changes)
    expected, plain = plain_training(trial, blocks_of(trial, cache_dir)["train"])
    _, rows, model = run(changes)
    assert len(expected) == 20
    # float32 sums in another order, over 20 steps
    assert rows.column("lm_loss") == pytest.approx(expected, rel=1e-5)
    ours, theirs = (one.get_input_embeddings().weight for one in (model, plain))
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    _, without, _ = run({**changes, "noisy_embedding.alpha": 0.0, "active_forgetting.every_steps": None})
    difference = [abs(a - b) for a, b in zip(rows.column("lm_loss"), without.column("lm_loss"), strict=True)]
    assert max(difference) > 1e-3, "it does something"


def test_a_tied_head_is_lost_with_the_embeddings(study: StudyConfig) -> None:
    for tied in (True, False):
        trial = replace_fields(study.trial, {"model.tie_embeddings": tied})
        model: Any = build(trial)
        head = model.get_output_embeddings().weight.detach().clone()
        optimizer = make_optimizer(model, trial.train)
        forgetting(model, optimizer, 5).forget(5)
        assert torch.equal(model.get_output_embeddings().weight, head) is not tied


# --- noise ----------------------------------------------------------------------------------------------


def noise_of(*sequences: int, length: int = 16, num_features: int = 24, seed: int = 3, step: int = 7) -> Any:
    numbers = torch.tensor(sequences)
    return draw_noise(numbers, length=length, num_features=num_features, seed=seed, step=step)


def test_noise_is_a_function_of_seed_step_and_sequence() -> None:
    together = noise_of(0, 1, 5, 2**31)
    for place, sequence in enumerate((0, 1, 5, 2**31)):
        assert torch.equal(together[place], noise_of(sequence)[0])
        assert torch.equal(together[place], plain_noise(3, 7, sequence, 16, 24))
    others = [noise_of(0), noise_of(1), noise_of(0, step=8), noise_of(0, seed=4)]
    for i, one in enumerate(others):
        for other in others[:i]:
            assert (one == other).sum() < 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_is_the_same_on_a_gpu() -> None:
    numbers = torch.arange(64)
    settings: dict[str, int] = {"length": 128, "num_features": 96, "seed": 3, "step": 7}
    assert torch.equal(draw_noise(numbers.cuda(), **settings).cpu(), draw_noise(numbers, **settings))


def test_noise_is_uniform_and_independent() -> None:
    noise = noise_of(*range(64), length=32, num_features=64).double()  # 131,072 numbers
    assert noise.abs().max() < 1
    assert abs(noise.mean()) < 0.008  # five standard errors of 0.0016
    assert abs(noise.square().mean() - 1 / 3) < 0.005
    counts = torch.histc(noise.flatten(), bins=32, min=-1, max=1)
    expected = noise.numel() / 32
    assert ((counts - expected) ** 2 / expected).sum() < 80  # chi-squared, 31 degrees: above 80 in 3 of 10^6
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):
        assert abs((noise * shifted).mean()) < 0.005
    rows = noise.flatten(0, 1)
    correlations = torch.corrcoef(rows.T) - torch.eye(64)
    assert correlations.abs().max() < 0.12  # of 2,048 each: five standard errors are 0.11


def test_noise_has_the_amplitude_of_its_alpha(study: StudyConfig) -> None:
    model: Any = build(study.trial)
    embedding = model.get_input_embeddings()
    ids = torch.arange(32).reshape(2, 16)
    clean = embedding(ids)
    noise = EmbeddingNoise(model, alpha=4.0, seed=3)
    assert torch.equal(embedding(ids), clean), "only within `added`"
    with noise.added(step=2, first_sequence=6):
        noisy = embedding(ids)
    bound = 4.0 / math.sqrt(16 * 16)
    expected = torch.stack([plain_noise(3, 2, sequence, 16, 16) for sequence in (6, 7)]) * bound
    assert torch.allclose(noisy - clean, expected, rtol=0, atol=1e-7)
    assert 0.95 * bound < (noisy - clean).abs().max() <= bound
    assert torch.equal(embedding(ids), clean)
    noise.remove()
    assert hooks_on(model) == []


def test_noise_is_off_in_evaluation(study: StudyConfig, cache_dir: str, run: Run) -> None:
    changes = {"noisy_embedding.alpha": 50.0}
    reports: list[list[dict[str, Any]]] = [[], []]
    noisy, _, model = run(changes, on_evaluation=reports[0].append)
    run(on_evaluation=reports[1].append)
    assert reports[0][0]["val_loss"] == reports[1][0]["val_loss"], "before the first step"
    assert reports[0][1]["val_loss"] != reports[1][1]["val_loss"]
    trial = study.trial
    found = evaluate(
        model,
        blocks_of(trial, cache_dir)["validation"],
        split="validation",
        layout=Layout(),
        max_tokens=None,
        condensation_tokens=256,
        batch_sequences=8,
        autocast=make_autocast("fp32", CPU),
    )
    assert noisy.final.loss == found.loss


@pytest.mark.parametrize("micro_batch_tokens", [16, 48, 64])
@pytest.mark.parametrize("changes", [{}, {"dispersion.layers": [0, 1], "dispersion.max_tokens": 6}], ids=str)
def test_micro_batches_get_the_same_noise(run: Run, micro_batch_tokens: int, changes: dict[str, Any]) -> None:
    changes = {**TWENTY_STEPS, **METHODS["both"], **changes}
    whole = run(changes)[1]
    split = run({**changes, "train.micro_batch_tokens": micro_batch_tokens})[1]
    # float32 sums in another order, over 20 steps
    for name in ("lm_loss", "dispersion_loss"):
        assert split.column(name) == pytest.approx(whole.column(name), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"train.activation_checkpointing": True}, {"train.compile": True}, {"train.precision": "bf16"}],
    ids=str,
)
def test_effort_changes_nothing(run: Run, changes: dict[str, Any]) -> None:
    base = {**TWENTY_STEPS, **METHODS["both"]}
    expected, found = run(base)[1].column("loss"), run({**base, **changes})[1].column("loss")
    # fused kernels round otherwise; bf16 has eight bits of mantissa
    assert found == pytest.approx(expected, rel=2e-2 if "train.precision" in changes else 1e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_no_hook_is_left(run: Run, study: StudyConfig, method: str) -> None:
    _, _, model = run(METHODS[method] | {"active_forgetting.every_steps": 3})
    assert hooks_on(model) == []
    model = build(study.trial)
    with pytest.raises(DivergedError):
        run({**METHODS[method], "train.learning_rate": 1e30, "train.grad_clip": None}, model=model)
    assert hooks_on(model) == []


# --- forgetting -----------------------------------------------------------------------------------------


def forgetting(model: Any, optimizer: Any, every: int, num_steps: int = 100) -> ActiveForgetting:
    return ActiveForgetting(
        model, optimizer, every_steps=every, learning_rate=5e-5, seed=3, num_steps=num_steps
    )


class Lookup(torch.nn.Module):
    """Nothing but an embedding, of more rows than are drawn at a time."""

    def __init__(self, padding_row: int | None) -> None:
        super().__init__()
        self.config = None
        self.table = torch.nn.Embedding(9001, 6, padding_idx=padding_row)
        self.bias = torch.nn.Parameter(torch.zeros(6))

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table


@pytest.mark.parametrize("padding_row", [None, 0, 4096, 9000, -1])
def test_new_embeddings_are_normal_and_moments_cleared(study: StudyConfig, padding_row: int | None) -> None:
    model = Lookup(padding_row)
    optimizer = make_optimizer(model, study.train)
    method = forgetting(model, optimizer, 5)
    (model.table(torch.arange(9001)).square().sum() + model.bias.sum()).backward()
    optimizer.step()
    before = model.table.weight.detach().clone()
    for step in (1, 4, 6, 0, 100, 105):
        assert not method.forget(step), step
    assert torch.equal(model.table.weight, before)
    assert method.forget(10)
    new = model.table.weight.detach().clone()
    if padding_row is not None:
        assert torch.equal(new[padding_row], torch.zeros(6))
    zero_rows = (new == 0).all(1).sum()
    assert zero_rows == (padding_row is not None)
    assert abs(new.mean()) < 5 * 0.02 / math.sqrt(new.numel())
    assert new.std().item() == pytest.approx(0.02, rel=0.02)
    assert len({tuple(row) for row in new.tolist()}) == 9001, "no part is drawn twice"
    states = optimizer.state[model.table.weight]
    assert all((states[name] == 0).all() for name in ("step", "exp_avg", "exp_avg_sq"))
    assert optimizer.state[model.bias]["step"] == 1, "of the others nothing is forgotten"
    method.forget(15)
    assert not torch.equal(model.table.weight, new), "another step, other embeddings"
    method.forget(10)
    assert torch.equal(model.table.weight, new)


def test_embeddings_have_a_group_of_their_own(study: StudyConfig) -> None:
    model: Any = build(study.trial)
    optimizer = make_optimizer(model, study.train)
    decayed = set(optimizer.param_groups[0]["params"])
    method = forgetting(model, optimizer, 10)
    first, plain, own = optimizer.param_groups
    assert own["params"] == [model.get_input_embeddings().weight]
    assert {*first["params"], *own["params"]} == decayed
    assert own["weight_decay"] == first["weight_decay"] == 0.1
    assert own["betas"] == first["betas"]
    assert own["fused"] == first["fused"]
    assert plain["weight_decay"] == 0.0
    assert method.group is own
    method.set_learning_rate(3)
    assert (own["lr"], first["lr"]) == (pytest.approx(plain_rate(3, 100, 10, 5e-5)), 0.01)


@pytest.mark.parametrize(("num_steps", "every"), [(100, 10), (100, 99), (103, 10), (20, 6), (2, 1)])
def test_their_learning_rate_runs_through_its_course_between_resets(num_steps: int, every: int) -> None:
    factors = [forgetting_factor(step, num_steps, every) for step in range(num_steps)]
    assert factors == pytest.approx([plain_rate(g, num_steps, every, 1.0) for g in range(num_steps)])
    assert all(0 <= factor <= 1 for factor in factors)
    if (num_steps, every) == (100, 10):
        # indices 0, 10, ..., 90; the warm-up's 8 lie before the second of them
        assert factors[:10] == pytest.approx([0.0, *[(100 - index) / 92 for index in range(10, 100, 10)]])
        assert factors[10:20] == factors[:10]


@pytest.mark.parametrize(("every", "resets"), [(9, [9]), (5, [5]), (4, [4, 8]), (1, list(range(1, 10)))])
def test_the_last_step_is_never_forgotten(
    run: Run, monkeypatch: pytest.MonkeyPatch, every: int, resets: list[int]
) -> None:
    forgotten: list[int] = []
    forget = ActiveForgetting.forget

    def remember(self: ActiveForgetting, steps_done: int) -> bool:
        did = forget(self, steps_done)
        forgotten.extend([steps_done] if did else [])
        return did

    monkeypatch.setattr(ActiveForgetting, "forget", remember)
    # K = T - 1, K that divides T = 10, one that does not, and every step
    result, _, model = run({"active_forgetting.every_steps": every})
    assert forgotten == resets
    weight: Any = model.get_input_embeddings().weight
    assert not torch.equal(weight, plain_embeddings(3, 10, *weight.shape))
    assert result.num_steps == 10


def test_the_rows_have_the_learning_rate_of_the_rest(run: Run) -> None:
    changes = {"active_forgetting.every_steps": 3}
    assert run(changes)[1].column("learning_rate") == run()[1].column("learning_rate")


def test_an_evaluation_sees_the_model_before_and_a_checkpoint_has_the_one_after(
    study: StudyConfig, run: Run, tmp_path: Path
) -> None:
    model: Any = build(study.trial)
    weight = model.get_input_embeddings().weight
    new = plain_embeddings(3, 8, *weight.shape)
    seen: dict[int, torch.Tensor] = {}

    def look(report: dict[str, Any]) -> None:
        seen[report["step"]] = weight.detach().clone()

    folder = CheckpointFolder(str(tmp_path), "x")
    changes = {"active_forgetting.every_steps": 8, "checkpoint.every_tokens": 512}
    run(changes, model=model, checkpoints=folder, on_evaluation=look)
    assert not torch.equal(seen[8], new)
    saved = folder.find()
    assert saved is not None
    assert saved.step == 8
    fresh = build(study.trial)
    optimizer = make_optimizer(fresh, study.train)
    for parameter in fresh.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = training_tensors(fresh, optimizer)
    folder.load(saved, tensors)
    name = next(n for n, p in fresh.named_parameters() if p is fresh.get_input_embeddings().weight)  # type: ignore[operator]
    assert torch.equal(tensors[f"model.{name}"], new)
    assert tensors[f"optimizer.{name}.step"] == 0
    about = [json.loads((tmp_path / f"step-{step:08d}" / "state.json").read_text()) for step in (4, 8)]
    assert about[0]["value"] is not None
    assert about[1]["value"] is None, "the loss is that of another model"


class KilledError(Exception):
    pass


@pytest.mark.parametrize("every", [3, 4, 2], ids=["between two", "at one", "at one that is not the first"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_killed_and_continued_equals_never_killed(
    run: Run, tmp_path: Path, every: int, dropout: float
) -> None:
    changes = {
        **NOISE,
        "active_forgetting.every_steps": every,
        "active_forgetting.learning_rate": 5e-3,
        "checkpoint.every_tokens": 512,
        "train.weight_decay": 0.5,
        "model.dropout": dropout,
    }
    whole, rows, model = run(changes, checkpoints=CheckpointFolder(str(tmp_path / "whole"), "x"))
    folder = CheckpointFolder(str(tmp_path / "killed"), "x")

    def kill(report: dict[str, Any]) -> None:
        if report["step"] == 8:  # after the evaluation of step 8, before its checkpoint: back to step 4
            raise KilledError

    with pytest.raises(KilledError):
        run(changes, checkpoints=folder, on_evaluation=kill)
    latest = folder.find()
    assert latest is not None
    assert latest.step == 4
    continued, later_rows, later_model = run(changes, checkpoints=folder, resume_from=latest)
    assert later_rows.column("loss") == rows.column("loss")[4:]
    assert continued.final.loss == whole.final.loss
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, later_model.state_dict()[name]), name


# --- several processes ----------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, micro-batches": {"train.micro_batch_tokens": 32},
    "ddp, recomputed, compiled": {"train.activation_checkpointing": True, "train.compile": True},
    "fsdp": {"train.strategy": "fsdp"},
    "fsdp, micro-batches, kept": {
        "train.strategy": "fsdp",
        "train.micro_batch_tokens": 16,
        "train.reshard_after_forward": False,
    },
    "fsdp, recomputed": {"train.strategy": "fsdp", "train.activation_checkpointing": True},
}
PAIRED = ("gpt2, tied", "llama")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _found(trial: TrialConfig, cache_dir: str, layout: Layout) -> dict[str, Any]:
    """Losses, and the embeddings after each reset and at the end."""
    model: Any = build(trial)
    blocks, rows = blocks_of(trial, cache_dir), Rows()
    embeddings: list[torch.Tensor] = []
    ended: list[str] = []
    forget = ActiveForgetting.forget

    def remember(self: ActiveForgetting, steps_done: int) -> bool:
        did = forget(self, steps_done)
        if did:
            embeddings.append(_whole(model.get_input_embeddings().weight))
        return did

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActiveForgetting, "forget", remember)
        result = train(
            model,
            blocks["train"],
            blocks["validation"],
            trial,
            layout=layout,
            rows=rows,
            test_blocks=blocks["test"],
            on_end=lambda wrapped: ended.append(type(wrapped).__name__),
        )
    return {
        "losses": rows.column("loss"),
        "val_loss": result.final.loss,
        "test_loss": result.test_loss,
        "embeddings": embeddings,
        "end": _whole(model.get_input_embeddings().weight),
        "ended": ended,
        "hooks": len(hooks_on(model)),
    }


def _worker(
    rank: int, port: int, cases: dict[str, dict[str, Any]], tree: Any, cache_dir: str, out: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    base = TrialConfig.model_validate(tree)
    try:
        for name, changes in cases.items():
            found = _found(replace_fields(base, changes), cache_dir, Layout(rank, 2))
            torch.save(found, Path(out) / f"{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def paired_trial(corpus_dir: Path) -> TrialConfig:
    tree = {
        "seed": 3,
        # an odd number of embeddings: two workers hold unequal shards of them
        "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 321},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
        "dispersion": {"weight": 0.3},
        "evaluate": {"every_tokens": 512, "max_tokens": 256},
    }
    # evaluations at resets too
    changes = {**TWENTY_STEPS, **METHODS["both"], "evaluate.every_tokens": 768}
    return replace_fields(TrialConfig.model_validate(tree), changes)


@pytest.fixture(scope="module")
def pair(
    paired_trial: TrialConfig, cache_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], dict[str, Any]]:
    """Every case on one pair of gloo processes: pair("ddp", 0) is what the first of them found."""
    out = tmp_path_factory.mktemp("pair")
    cases = {
        f"{family}:{layout}": {**FAMILIES[family], **changes}
        for family in PAIRED
        for layout, changes in LAYOUTS.items()
    }
    data.prepare(paired_trial, cache_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, cases, paired_trial.model_dump(mode="json"), cache_dir, str(out)), nprocs=2)
    return lambda name, rank: torch.load(out / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def alone(paired_trial: TrialConfig, cache_dir: str) -> dict[str, dict[str, Any]]:
    return {
        family: _found(replace_fields(paired_trial, FAMILIES[family]), cache_dir, Layout())
        for family in PAIRED
    }


@pytest.mark.processes
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("family", PAIRED)
def test_two_processes_equal_one(pair: Any, alone: dict[str, Any], family: str, layout: str) -> None:
    one = alone[family]
    main, other = (pair(f"{family}:{layout}", rank) for rank in range(2))
    assert len(one["losses"]) == 20
    assert len(one["embeddings"]) == 3
    # float32 sums in another order, over 20 steps
    assert main["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for key in ("val_loss", "test_loss"):
        assert main[key] == other[key]
        assert main[key] == pytest.approx(one[key], rel=1e-5)
    for found in (main, other):
        for mine, theirs in zip(found["embeddings"], one["embeddings"], strict=True):
            assert torch.equal(mine, theirs), "one draw for all"
        assert found["hooks"] == 0
        assert len(found["ended"]) == 1
        assert "DistributedDataParallel" in found["ended"] or layout.startswith("fsdp")
    assert (main["end"] - one["end"]).norm() <= 1e-3 * one["end"].norm()


# --- off ------------------------------------------------------------------------------------------------


def test_off_is_the_loop_as_it_was(study: StudyConfig, cache_dir: str, run: Run) -> None:
    trial = study.trial
    model = build(trial)
    term = make_term(model, trial)
    assert term is not None
    optimizer = make_optimizer(model, trial.train)
    losses = []
    with BatchLoader(
        blocks_of(trial, cache_dir)["train"],
        seed=trial.seed,
        sequences_per_step=trial.sequences_per_step,
        num_steps=trial.num_steps,
    ) as batches:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, trial.num_steps, trial.train)
            seed_step(trial.seed, step, Layout())
            lm_loss, dispersion, _ = accumulate_gradients(
                model, batch, term, trial, step, Layout(), 8, make_autocast("fp32", CPU)
            )
            clip_gradients(model.parameters(), trial.train.grad_clip)
            losses.append(lm_loss.item() + 0.3 * dispersion.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    off = {"noisy_embedding.alpha": 0.0, "active_forgetting.every_steps": None}
    found, rows, trained = run({**off, "active_forgetting.learning_rate": 1.0})
    assert rows.column("loss") == losses
    for mine, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert found.used["noisy_embedding.alpha"] == 0.0
    assert found.used["active_forgetting.every_steps"] is None


def test_what_was_used_is_read_back(run: Run) -> None:
    used = run({**METHODS["both"], "train.learning_rate": 0.004})[0].used
    assert {name: used[name] for name in METHODS["both"]} == METHODS["both"]
    assert used["train.learning_rate"] == 0.004
    assert used["train.weight_decay"] == 0.1


# --- the end --------------------------------------------------------------------------------------------


def test_the_test_split_is_evaluated_at_the_end(study: StudyConfig, cache_dir: str, run: Run) -> None:
    blocks = blocks_of(study.trial, cache_dir)["test"]
    reported: list[int] = []
    events: list[Any] = []

    def on_end(wrapped: torch.nn.Module) -> None:
        events.append((wrapped, len(hooks_on(wrapped)), list(reported)))

    result, rows, model = run(
        NOISE, test_blocks=blocks, on_evaluation=lambda report: reported.append(report["step"]), on_end=on_end
    )
    assert reported == [0, 4, 8, 10], "of the validation split alone"
    assert rows.flushed.count(10) == 1, "a file of rows is written once"
    tested = [row for row in rows.tables["evals"] if row["split"] == "test"]
    assert {row["step"] for row in tested} == {10}
    assert [row["name"] for row in tested] == ["loss", "perplexity", "bits_per_byte"]
    assert tested[0]["value"] == result.test_loss
    assert tested[0]["num_items"] == len(blocks) * 15
    assert [row["step"] for row in rows.tables["layers"]].count(10) == 3, "no condensation of the test split"
    with torch.no_grad():
        nats = token_losses(
            model.eval()(input_ids=blocks[range(len(blocks))]).logits, blocks[range(len(blocks))]
        )
    assert result.test_loss == pytest.approx(nats.mean().item(), rel=1e-6)
    ((wrapped, num_hooks, before),) = events
    assert wrapped is model
    assert num_hooks > 0, "nothing is let go of yet"
    assert before == reported
    plain, _, _ = run(NOISE)
    assert plain.test_loss is None
    assert plain.final.loss == result.final.loss


def test_one_that_is_stopped_or_diverges_has_no_end(study: StudyConfig, cache_dir: str, run: Run) -> None:
    blocks = blocks_of(study.trial, cache_dir)["test"]
    ended: list[Any] = []
    options: dict[str, Any] = {"test_blocks": blocks, "on_end": ended.append}
    result, rows, _ = run(must_stop=lambda metrics: True, **options)
    assert (result.final, result.test_loss) == (None, None)
    with pytest.raises(DivergedError):
        run({"train.learning_rate": 1e30, "train.grad_clip": None}, **options)
    assert ended == []
    assert {row["split"] for row in rows.tables["evals"]} == {"validation"}


# --- the study file -------------------------------------------------------------------------------------

FILE = {
    "seed": 3,
    "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
    "data": {"source": "files", "paths": ["corpus/*.txt"], "context_length": 16},
    "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
    "evaluate": {"every_tokens": 512, "max_tokens": 256},
}


@pytest.mark.parametrize(
    ("parts", "sha256"),
    [
        ({"dispersion": {"weight": 0.3}}, "58fa711b3842aefb55c04383fb222b212285fff4915b2321ed18010fb564ecf8"),
        ({}, "6a8df7013b2bedaff0b67cdebde6af73559db4e9c87aed8ed7a0133a00ad42bf"),
        ({"dispersion": {"weight": 0.0}}, "33edad74e3dfff9b995b655085c46206096d7e8dbc7939ea7a6c74b8bc5960da"),
    ],
)
def test_trials_of_before_keep_their_identity(parts: dict[str, Any], sha256: str) -> None:
    """As computed before there were these methods."""
    trial = TrialConfig.model_validate({**FILE, **parts})
    assert trial.sha256 == sha256
    off = {"noisy_embedding": {"alpha": 0.0}, "active_forgetting": {"every_steps": None}}
    assert TrialConfig.model_validate({**FILE, **parts, **off}).sha256 == sha256
    allowed = {"dispersion": {**parts.get("dispersion", {}), "allow_negative_weight": True}}
    assert TrialConfig.model_validate({**FILE, **parts, **allowed}).sha256 == sha256
    others = [replace_fields(trial, {name: value}).sha256 for name, value in METHODS["both"].items()]
    assert len({sha256, *others}) == 4


@pytest.mark.parametrize("every", [10, 11, 10**6])
def test_what_would_never_be_forgotten_is_refused(study: StudyConfig, every: int) -> None:
    assert study.trial.num_steps == 10
    replace_fields(study.trial, {"active_forgetting.every_steps": 9})
    with pytest.raises(ValidationError, match=rf"every_steps = {every} is not below the 10 steps.*at most 9"):
        replace_fields(study.trial, {"active_forgetting.every_steps": every})


def test_both_sections_can_be_searched(study: StudyConfig) -> None:
    fields = searchable_fields(study)
    assert {"noisy_embedding.alpha", "active_forgetting.every_steps"} < set(fields)
    assert "dispersion.allow_negative_weight" not in fields
    tree = study.model_dump(mode="json")
    tree["search"]["space"] = {
        "noisy_embedding.alpha": {"low": 0.0, "high": 10.0},
        "active_forgetting.every_steps": [None, 3, 5],
    }
    types = column_types(StudyConfig.model_validate(tree))
    assert {name: str(kind) for name, kind in types.items()} == {
        "noisy_embedding.alpha": "double",
        "active_forgetting.every_steps": "int64",
    }
