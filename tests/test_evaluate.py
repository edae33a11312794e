"""Evaluation against a slow loop, and its sums over workers."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from raydisp import data, models
from raydisp.condensation import layer_cosine
from raydisp.config import StudyConfig
from raydisp.evaluate import Evaluation, evaluate, token_losses
from raydisp.parallel import Layout


@pytest.fixture
def model_and_blocks(
    study: StudyConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, data.TokenBlocks]:
    trial = study.trial
    folder = data.prepare(trial, str(tmp_path_factory.mktemp("cache")))
    model = models.build_model(trial.model, context_length=16, eos_token_id=0, seed=5)
    return model, data.TokenBlocks(folder, "validation")


def run(model: torch.nn.Module, blocks: data.TokenBlocks, **options: object) -> Evaluation:
    settings: dict[str, object] = {"max_tokens": None, "condensation_tokens": 128, "batch_sequences": 3}
    return evaluate(
        model,
        blocks,
        split="validation",
        layout=Layout(),
        autocast=contextlib.nullcontext(),
        **{**settings, **options},
    )


def test_against_a_loop_over_tokens(model_and_blocks: tuple[torch.nn.Module, data.TokenBlocks]) -> None:
    model, blocks = model_and_blocks
    found = run(model, blocks)
    per_sequence, states = [], []
    with torch.no_grad():
        for index in range(len(blocks)):
            ids = blocks[[index]]
            output = model(input_ids=ids, output_hidden_states=True)
            logs = output.logits.double().log_softmax(-1)[0]
            per_sequence.append([-logs[t, ids[0, t + 1]].item() for t in range(15)])
            states.append(output.hidden_states)
    flat = [value for sequence in per_sequence for value in sequence]
    # the model computes in float32
    assert found.loss == pytest.approx(math.fsum(flat) / len(flat), rel=1e-6)
    assert found.num_tokens == len(flat)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(
        found.loss / math.log(2) * blocks.num_tokens / blocks.num_bytes, rel=1e-12
    )
    means = torch.tensor([sum(sequence) / 15 for sequence in per_sequence])
    assert found.stderr == pytest.approx((means.std() / len(means) ** 0.5).item(), rel=1e-4)
    measured = [torch.cat([state[layer] for state in states[:8]]) for layer in range(3)]
    assert found.condensation.num_sequences == 8
    assert found.condensation.cosine_mean == pytest.approx(layer_cosine(measured).tolist(), rel=1e-5)
    assert found.layer_cosine_mean == pytest.approx(sum(found.condensation.cosine_mean[1:]) / 2)


@pytest.mark.parametrize("batch_sequences", [1, 5, 100])
def test_batches_do_not_matter(
    model_and_blocks: tuple[torch.nn.Module, data.TokenBlocks], batch_sequences: int
) -> None:
    model, blocks = model_and_blocks
    one, other = run(model, blocks), run(model, blocks, batch_sequences=batch_sequences)
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.condensation.spearman == other.condensation.spearman
    assert one.num_tokens == other.num_tokens


def test_limits_and_training_mode(model_and_blocks: tuple[torch.nn.Module, data.TokenBlocks]) -> None:
    model, blocks = model_and_blocks
    model.train()
    found = run(model, blocks, max_tokens=5 * 16 + 3)
    assert found.num_tokens == 5 * 15
    assert found.condensation.num_sequences == 5
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert run(model, blocks, max_tokens=1).num_tokens == 15, "at least one sequence"
    assert run(model, blocks, max_tokens=1).stderr is None, "one sequence has no spread"


def test_token_losses_are_per_token_nats() -> None:
    logits = torch.zeros(2, 4, 10)
    losses = token_losses(logits, torch.zeros(2, 4, dtype=torch.int64))
    assert losses.shape == (2, 3)
    assert torch.allclose(losses, torch.full((2, 3), math.log(10)))
