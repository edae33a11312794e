"""What `parallelise` makes of a model in one process, the clipping, and what is refused."""

from __future__ import annotations

import contextlib
import math
import shutil
from typing import Any

import pytest
import torch
from test_layers import input_ids, tiny_model
from torch import nn
from transformers import PreTrainedModel

from raydisp import data, models
from raydisp.config import StudyConfig, replace_fields
from raydisp.config.train import TrainConfig
from raydisp.errors import ConfigError
from raydisp.layers import HiddenStateCapture
from raydisp.parallel import Layout, clip_gradients, parallelise
from raydisp.train import train

pytestmark = pytest.mark.processes  # of the compiler, and the minutes that it takes

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(budget_tokens=128, global_batch_tokens=128, learning_rate=1e-3, **changes)


# ---------------------------------------------------------------------- states and gradients


def run(
    model: nn.Module, wrapped: nn.Module, capture: HiddenStateCapture
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The captured states and the gradients of one pass in training."""
    with capture.recording():
        output = wrapped(input_ids=input_ids(), use_cache=False)
    states = list(capture.take().values())
    (output.logits.square().mean() + sum(state.square().mean() for state in states)).backward()
    return states, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"activation_checkpointing": True}, id="recomputed"),
        pytest.param({"compile": True}, id="compiled", marks=needs_compiler),
        pytest.param({"activation_checkpointing": True, "compile": True}, id="both", marks=needs_compiler),
    ],
)
def test_states_and_gradients_are_those_of_the_plain_model(family: str, changes: dict[str, Any]) -> None:
    if changes.get("compile") and family == "qwen3":
        pytest.skip("as llama, and it takes ten seconds")
    plain, model = tiny_model(family).train(), tiny_model(family).train()
    names = list(model.state_dict())
    expected = plain(input_ids=input_ids(), output_hidden_states=True, use_cache=False)
    loss = expected.logits.square().mean() + sum(s.square().mean() for s in expected.hidden_states)
    loss.backward()
    wrapped = parallelise(model, Layout(), settings(**changes), "fp32")
    assert wrapped is model
    assert list(model.state_dict()) == names
    capture = HiddenStateCapture(model, range(4))
    states, gradients = run(model, wrapped, capture)
    close: dict[str, float] = (
        {"rtol": 1e-5, "atol": 1e-6} if changes.get("compile") else {"rtol": 0, "atol": 0}
    )
    for state, other in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other, **close)
    for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, **close)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of activations that one forward pass keeps for backward."""
    total = 0
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size() if tensor.data_ptr() not in weights else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=input_ids(4, 32), use_cache=False)
    return total


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=needs_compiler)], ids=["eager", "compiled"]
)
def test_activation_checkpointing_saves_memory(compiled: bool) -> None:
    kept, recomputed = (
        saved_bytes(
            parallelise(
                tiny_model("llama").train(),
                Layout(),
                settings(activation_checkpointing=on, compile=compiled),
                "fp32",
            )
        )
        for on in (False, True)
    )
    assert recomputed < kept / 2


@needs_compiler
def test_alike_blocks_share_what_is_compiled() -> None:
    """Two graphs, one for training and one for evaluation, however many blocks; and none broken up."""
    from torch._dynamo.utils import counters

    model = tiny_model("gpt2", num_layers=12)
    counters.clear()
    parallelise(model, Layout(), settings(compile=True), "fp32")
    capture = HiddenStateCapture(model, [0, 5, 12])
    for training in (False, True):
        model.train(training)
        with capture.recording(), contextlib.nullcontext() if training else torch.no_grad():
            model(input_ids=input_ids(), use_cache=False)
        capture.take()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# ---------------------------------------------------------------------- training with it


def losses(study: StudyConfig, cache_dir: str, changes: dict[str, Any]) -> list[float]:
    trial = replace_fields(study.trial, {"train.learning_rate": 2e-3, **changes})
    folder = data.prepare(trial, cache_dir)
    model = models.build_model(trial.model, context_length=16, eos_token_id=0, seed=trial.seed)
    found: list[float] = []

    class Rows:
        def add(self, table: str, row: dict[str, Any]) -> None:
            if table == "steps":
                found.append(row["loss"])
            elif table == "evals" and row["name"] == "loss":
                found.append(row["value"])

        def flush(self, step: int) -> None:
            pass

    blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
    train(model, *blocks, trial, layout=Layout(), rows=Rows())
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_have_the_same_dropout(
    study: StudyConfig, tmp_path_factory: pytest.TempPathFactory, precision: str
) -> None:
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    changes = {"model.dropout": 0.2, "train.precision": precision}
    kept = losses(study, cache_dir, changes)
    assert losses(study, cache_dir, {**changes, "train.activation_checkpointing": True}) == kept
    assert losses(study, cache_dir, {**changes, "model.dropout": 0.0}) != kept


@needs_compiler
def test_a_compiled_training_is_the_same_and_so_is_the_next_one(
    study: StudyConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    for changes in ({"model.hidden_size": 16}, {"model.hidden_size": 32}):
        kept = losses(study, cache_dir, changes)
        compiled = losses(study, cache_dir, {**changes, "train.compile": True})
        assert compiled == pytest.approx(kept, rel=1e-5)


# ---------------------------------------------------------------------- clipping


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for parameter in parameters[:2]:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters  # the last has none


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_clipping_is_torchs_own_after_unscaling(max_norm: float | None, scale: float) -> None:
    expected, parameters = with_gradients(), with_gradients(scale)
    norm = nn.utils.clip_grad_norm_(expected, math.inf if max_norm is None else max_norm)
    found = clip_gradients(parameters, max_norm, unscale=1 / scale)
    assert found.shape == ()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm, rtol=1e-6, atol=0)
    for parameter, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_told(value: float) -> None:
    parameters = with_gradients()
    gradient = parameters[0].grad
    assert gradient is not None
    gradient[0, 0] = value
    assert not clip_gradients(parameters, 1.0).isfinite()


# ---------------------------------------------------------------------- what is refused


def test_one_worker_cannot_shard() -> None:
    with pytest.raises(ConfigError, match=r"strategy = fsdp .* there is 1; use ddp, or give .* 2 workers"):
        parallelise(tiny_model("gpt2"), Layout(), settings(strategy="fsdp"), "fp32")


def test_a_model_without_activation_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    for other in (model, nn.Linear(2, 2)):
        message = rf"activation_checkpointing = true, but {type(other).__name__} does not support it; set it"
        with pytest.raises(ConfigError, match=message):
            parallelise(other, Layout(), settings(activation_checkpointing=True), "fp32")


def test_a_single_number_cannot_be_sharded() -> None:
    model: PreTrainedModel = tiny_model("gpt2")
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="temperature of GPT2LMHeadModel is a single number; use ddp"):
        parallelise(model, Layout(0, 2), settings(strategy="fsdp"), "fp32")
