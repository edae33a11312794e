"""One result whatever the layout: one process, two with DDP, two with FSDP2, and any micro-batch."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from raydisp import data, models
from raydisp.attach import DispersionTerm
from raydisp.config import StudyConfig, TrialConfig, replace_fields
from raydisp.errors import ConfigError, DivergedError
from raydisp.methods import make_term
from raydisp.parallel import Layout, clip_gradients, parallelise
from raydisp.precision import make_autocast
from raydisp.train import accumulate_gradients, train

pytestmark = pytest.mark.processes


class _Losses:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def add(self, table: str, row: dict[str, Any]) -> None:
        if table == "steps":
            self.steps.append(row)

    def flush(self, step: int) -> None:
        pass


def _build(trial: TrialConfig) -> torch.nn.Module:
    return models.build_model(
        trial.model, context_length=trial.data.context_length, eos_token_id=0, seed=trial.seed
    )


def _train(trial: TrialConfig, cache_dir: str, layout: Layout) -> dict[str, Any]:
    folder = data.prepare(trial, cache_dir)
    model = _build(trial)
    rows = _Losses()
    blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
    try:
        result = train(model, *blocks, trial, layout=layout, rows=rows if layout.is_main else None)
    except DivergedError as error:
        return {"diverged": error.step, "losses": [row["loss"] for row in rows.steps]}
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return {
        "losses": [row["loss"] for row in rows.steps],
        "norms": [row["grad_norm"] for row in rows.steps],
        "val_loss": result.final.loss,
        "stderr": result.final.stderr,
        "num_tokens": result.final.num_tokens,
        "cosines": result.final.condensation.cosine_mean,
        "histogram": result.final.condensation.histogram,
        "sharded": [sum(p.to_local().numel() for p in sharded), sum(p.numel() for p in sharded)],
        "names": sorted(name for name, _ in model.named_parameters()),
    }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gradient(trial: TrialConfig, layout: Layout, micro: int) -> torch.Tensor:
    """All gradients at the initial weights, of one batch."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 300, (trial.sequences_per_step, trial.data.context_length), generator=generator)
    share = batch.chunk(layout.world_size)[layout.rank]
    model = _build(trial)
    term = make_term(model, trial)
    wrapped = parallelise(model, layout, trial.train, "fp32")
    autocast = make_autocast("fp32", layout.device)
    accumulate_gradients(wrapped, share, term, trial, 0, layout, micro, autocast)
    if trial.train.grad_clip is not None:
        clip_gradients(model.parameters(), trial.train.grad_clip)
    return torch.cat([_whole(p.grad).flatten() for p in model.parameters() if p.grad is not None])


def _states(trial: TrialConfig, layout: Layout, precision: str) -> list[torch.Tensor]:
    """What the dispersion term catches in all layers, on a batch that is the same on all workers."""
    model = _build(trial)
    term = DispersionTerm(model, layers=list(range(trial.model.num_layers + 1)))  # type: ignore[union-attr]
    wrapped = parallelise(model, layout, trial.train, precision)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 300, (2, trial.data.context_length), generator=generator)
    with term.recording(), make_autocast(precision, layout.device):
        output = wrapped(input_ids=batch, use_cache=False)
    states = list(term._capture.take().values())
    (
        output.logits.float().square().mean() + sum(state.float().square().mean() for state in states)
    ).backward()
    return [state.detach() for state in states]


Case = tuple[str, dict[str, Any]]


def _worker(rank: int, port: int, cases: list[Case], tree: dict[str, Any], cache_dir: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layout = Layout(rank, 2)
    base = TrialConfig.model_validate(tree)
    try:
        for name, changes in cases:
            trial = replace_fields(base, changes)
            kind = name.split(":")[0]
            if kind == "train":
                found = _train(trial, cache_dir, layout)
                (Path(out) / f"{name}-{rank}.json").write_text(json.dumps(found))
            elif kind == "gradient":
                micro = trial.train.micro_batch_tokens
                size = 4 if micro == "auto" else micro // trial.data.context_length
                torch.save(_gradient(trial, layout, size), Path(out) / f"{name}-{rank}.pt")
            else:
                states = _states(trial, layout, trial.train.precision)
                torch.save(states, Path(out) / f"{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_pair(cases: list[Case], trial: TrialConfig, cache_dir: str, out: Path) -> None:
    """Run cases on two gloo processes, which leave what they found in a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, cases, trial.model_dump(mode="json"), cache_dir, str(out)), nprocs=2)


def run_two(trial: TrialConfig, cache_dir: str, out: Path) -> list[dict[str, Any]]:
    """Train on two gloo processes; what each of them found."""
    run_pair([("train:it", {})], trial, cache_dir, out)
    return [json.loads((out / f"train:it-{rank}.json").read_text()) for rank in range(2)]


# At the tiny study's rate of 0.01 Adam blows rounding up to 4e-5 within 20 steps; this is the default's.
TWENTY_STEPS = {"train.budget_tokens": 2560, "train.learning_rate": 2e-3}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"model.family": "llama", "model.tie_embeddings": False},
    "qwen3": {"model.family": "qwen3", "dispersion.max_tokens": 6},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, micro-batches": {"train.micro_batch_tokens": 32},
    "fsdp": {"train.strategy": "fsdp"},
    "fsdp, micro-batches, kept": {
        "train.strategy": "fsdp",
        "train.micro_batch_tokens": 16,
        "train.reshard_after_forward": False,
    },
    "fsdp, recomputed": {"train.strategy": "fsdp", "train.activation_checkpointing": True},
}
PRECISIONS = ("fp32", "bf16")
STATES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"train.strategy": "fsdp"},
    "ddp, recomputed": {"train.activation_checkpointing": True},
    "fsdp, recomputed": {"train.strategy": "fsdp", "train.activation_checkpointing": True},
    "fsdp, recomputed, compiled": {
        "train.strategy": "fsdp",
        "train.activation_checkpointing": True,
        "train.compile": True,
    },
}


@pytest.fixture(scope="module")
def trial(corpus_dir: Path) -> TrialConfig:
    tree = {
        "seed": 3,
        "model": {"source": "scratch", "num_layers": 3, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
        "dispersion": {"weight": 0.3},
        "evaluate": {"every_tokens": 512, "max_tokens": 256},
    }
    return TrialConfig.model_validate(tree)


@pytest.fixture(scope="module")
def pair(trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every case on one pair of processes, and the cache of their data."""
    out = tmp_path_factory.mktemp("pair")
    cases: list[Case] = []
    for family, of_family in FAMILIES.items():
        for layout, of_layout in LAYOUTS.items():
            cases.append((f"train:{family}:{layout}", {**TWENTY_STEPS, **of_family, **of_layout}))
            cases.append((f"gradient:{family}:{layout}", {**of_family, **of_layout, "train.grad_clip": 0.5}))
        for layout, of_layout in STATES.items():
            for precision in PRECISIONS:
                changes = {**of_family, **of_layout, "train.precision": precision}
                cases.append((f"states:{family}:{layout}:{precision}", changes))
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    data.prepare(trial, cache_dir)
    run_pair(cases, trial, cache_dir, out)
    return out, cache_dir


@pytest.fixture(scope="module")
def alone(trial: TrialConfig, pair: tuple[Path, str]) -> dict[str, dict[str, Any]]:
    return {
        family: _train(replace_fields(trial, {**TWENTY_STEPS, **changes}), pair[1], Layout())
        for family, changes in FAMILIES.items()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_two_processes_equal_one(
    pair: tuple[Path, str], alone: dict[str, dict[str, Any]], family: str, layout: str
) -> None:
    one = alone[family]
    main, other = (
        json.loads((pair[0] / f"train:{family}:{layout}-{rank}.json").read_text()) for rank in range(2)
    )
    assert len(one["losses"]) == 20
    # float32 sums in another order, over 20 steps
    assert main["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert main["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert max(one["norms"]) > 1.0, "gradients are really clipped"
    for key in ("val_loss", "stderr"):
        assert main[key] == pytest.approx(one[key], rel=1e-5), key
    # a mean of cosines near 0 is a difference of sums near 1: absolute, not relative
    assert main["cosines"] == pytest.approx(one["cosines"], abs=2e-5)
    assert main["num_tokens"] == one["num_tokens"]
    assert [sum(counts) for counts in main["histogram"]] == [sum(counts) for counts in one["histogram"]]
    assert {key: other[key] for key in ("val_loss", "cosines")} == {
        key: main[key] for key in ("val_loss", "cosines")
    }, "all workers know the same evaluation"
    assert main["names"] == one["names"], "checkpoints go by these"
    held = main["sharded"][0] + other["sharded"][0]
    if layout.startswith("fsdp"):
        assert held == main["sharded"][1], "the two together hold each parameter once"
        assert main["sharded"][0] <= 0.6 * main["sharded"][1]
    else:
        assert held == 0


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_those_of_one_process(
    trial: TrialConfig, pair: tuple[Path, str], family: str, layout: str
) -> None:
    changed = replace_fields(trial, {**FAMILIES[family], "train.grad_clip": None})
    one = _gradient(changed, Layout(), 8)
    assert one.norm() > 0.5
    two = torch.load(pair[0] / f"gradient:{family}:{layout}-0.pt")
    clipped = one * (0.5 / one.norm())
    # float32 sums in another order
    assert (two - clipped).norm() <= 1e-5 * clipped.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", list(STATES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_states_are_those_of_the_plain_model(
    trial: TrialConfig, pair: tuple[Path, str], family: str, layout: str, precision: str
) -> None:
    model = _build(replace_fields(trial, FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 300, (2, 16), generator=generator)
    with torch.no_grad(), make_autocast(precision, torch.device("cpu")):
        expected = model(input_ids=batch, output_hidden_states=True, use_cache=False).hidden_states
    found = torch.load(pair[0] / f"states:{family}:{layout}:{precision}-0.pt")
    assert len(found) == len(expected) == 4
    # bf16: eight bits of mantissa, and compiled kernels round at other places
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for number, (state, wanted) in enumerate(zip(found, expected, strict=True)):
        assert state.dtype == wanted.dtype, number
        assert (state - wanted).norm() <= tolerance * wanted.norm(), number


def test_all_processes_diverge_at_the_same_step(study: StudyConfig, tmp_path: Path) -> None:
    trial = replace_fields(study.trial, {"train.learning_rate": 1e30, "train.grad_clip": None})
    main, other = run_two(trial, str(tmp_path / "cache"), tmp_path)
    assert main["diverged"] == other["diverged"] > 1


@pytest.mark.parametrize(
    "changes", [{"train.activation_checkpointing": True}, {"train.compile": True}], ids=str
)
def test_effort_does_not_change_one_process(
    trial: TrialConfig, pair: tuple[Path, str], alone: dict[str, dict[str, Any]], changes: dict[str, Any]
) -> None:
    found = _train(replace_fields(trial, {**TWENTY_STEPS, **changes}), pair[1], Layout())
    # fused kernels round otherwise
    assert found["losses"] == pytest.approx(alone["gpt2"]["losses"], rel=1e-5)
    assert found["names"] == alone["gpt2"]["names"]


def test_sharding_needs_more_than_one_worker(trial: TrialConfig) -> None:
    settings = replace_fields(trial, {"train.strategy": "fsdp"}).train
    with pytest.raises(ConfigError, match=r"train\.strategy = fsdp shards the model over workers"):
        parallelise(_build(trial), Layout(), settings, "fp32")
