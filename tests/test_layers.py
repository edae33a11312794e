"""Which layers a choice means, and that the captures are what Hugging Face calls hidden states."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from raydisp.layers import LAYER_CHOICES, HiddenStateCapture, num_hidden_layers, resolve_layers

VOCABULARY = 61
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def tiny_model(family: str, num_layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(n_layer=num_layers, n_embd=16, n_head=2, n_positions=32, **no_dropout, **TOKENS)
        )
    sizes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **TOKENS,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes))


FAMILIES = ["gpt2", "llama", "qwen3"]


def input_ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("choice", "num_layers", "expected"),
    [
        ("all", 4, (1, 2, 3, 4)),
        ("last", 4, (4,)),
        ("early_half", 4, (1, 2)),
        ("late_half", 4, (3, 4)),
        ("early_half", 5, (1, 2)),
        ("late_half", 5, (3, 4, 5)),
        ("early_half", 1, (1,)),
        ("late_half", 1, (1,)),
        ("all", 1, (1,)),
        ([3, 0, 5], 5, (0, 3, 5)),
        ((2,), 2, (2,)),
    ],
)
def test_choices(choice: str | list[int], num_layers: int, expected: tuple[int, ...]) -> None:
    assert resolve_layers(choice, num_layers) == expected


@pytest.mark.parametrize("num_layers", range(2, 14))
def test_the_halves_make_up_the_whole(num_layers: int) -> None:
    early, late = resolve_layers("early_half", num_layers), resolve_layers("late_half", num_layers)
    assert early + late == resolve_layers("all", num_layers)
    assert len(early) == num_layers // 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("lasst", r'layers = "lasst" is not one of all, last, .* Did you mean "last"\?'),
        ("everything", "is not one of all, last, early_half, late_half or a list"),
        ([], "empty list; name at least one layer of 0..4"),
        ([1, 5], r"holds 5, but this model has layers 0 .* to 4"),
        ([-1], "holds -1, but"),
        ([2, 2], "names 2 more than once"),
        ([1.5], "holds 1.5, which is not a whole number"),
        ([True], "holds True, which is not a whole number"),
        (["1"], "holds '1', which is not a whole number"),
    ],
)
def test_bad_choices_are_refused(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layers(choice, 4)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        resolve_layers("all", 0)


def test_the_words_are_the_documented_ones() -> None:
    assert LAYER_CHOICES == ("all", "last", "early_half", "late_half")


def test_choosing_layers_does_not_import_torch() -> None:
    program = "import sys; from raydisp.layers import resolve_layers; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


# ---------------------------------------------------------------------- the captures


def caught(model: nn.Module, layers: list[int], **inputs: Any) -> dict[int, torch.Tensor]:
    capture = HiddenStateCapture(model, layers)
    with capture.recording():
        model(input_ids=input_ids(), **inputs)
    states = capture.take()
    capture.remove()
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_are_hugging_faces_hidden_states(family: str) -> None:
    model = tiny_model(family).eval()
    expected = model(input_ids=input_ids(), output_hidden_states=True).hidden_states
    states = caught(model, [0, 1, 2, 3])
    assert list(states) == [0, 1, 2, 3]
    for number, state in states.items():
        assert torch.equal(state, expected[number])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_state_is_taken_after_the_final_norm(family: str) -> None:
    model = tiny_model(family).eval()
    base = model.transformer if family == "gpt2" else model.model
    blocks, norm = (base.h, base.ln_f) if family == "gpt2" else (base.layers, base.norm)
    from_block: list[torch.Tensor] = []
    blocks[-1].register_forward_hook(lambda block, args, output: from_block.append(output))
    (state,) = caught(model, [3]).values()
    assert torch.equal(state, norm(from_block[0]))
    assert not torch.equal(state, from_block[0])


def test_only_the_chosen_layers_carry_hooks() -> None:
    model = tiny_model("gpt2")
    capture = HiddenStateCapture(model, [3, 1])
    assert capture.layers == (1, 3)
    assert set(capture.handles) == {1, 3}
    hooked = [len(block._forward_pre_hooks) for block in model.transformer.h]
    assert hooked == [0, 1, 0]
    assert len(model.transformer._forward_hooks) == 1
    capture.remove()
    assert capture.handles == {}
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_nothing_is_caught_outside_recording_nor_held_after_take() -> None:
    model = tiny_model("llama")
    capture = HiddenStateCapture(model, [1, 3])
    model(input_ids=input_ids())
    with pytest.raises(RuntimeError, match=r"Layers \[1, 3\] were not recorded \(recorded: none\)"):
        capture.take()
    with capture.recording():
        model(input_ids=input_ids())
    capture.take()
    with pytest.raises(RuntimeError, match="were not recorded"):
        capture.take()


def test_a_failed_pass_does_not_leave_recording_on() -> None:
    model = tiny_model("llama")
    capture = HiddenStateCapture(model, [1])
    with pytest.raises(RuntimeError, match="the data ran out"), capture.recording():
        raise RuntimeError("the data ran out")
    model(input_ids=input_ids())
    with pytest.raises(RuntimeError, match="not recorded"):
        capture.take()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_under_activation_checkpointing(family: str, use_reentrant: bool) -> None:
    """Recomputation in backward runs the blocks again; it must neither be caught nor lose the gradient."""
    results = []
    for checkpointing in (False, True):
        model = tiny_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        capture = HiddenStateCapture(model, [0, 1, 2, 3])
        with capture.recording():
            loss = model(input_ids=input_ids(), labels=input_ids()).loss
            states = capture.take()
            total = loss + sum(state.square().mean() for state in states.values())
            total.backward()  # inside recording on purpose
        results.append([parameter.grad for parameter in model.parameters()])
        assert capture._states == {}
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)  # float32, recomputed


def test_captures_work_in_a_compiled_model() -> None:
    model = tiny_model("llama").eval()
    expected = model(input_ids=input_ids(), output_hidden_states=True).hidden_states
    torch._dynamo.reset()
    states = caught(torch.compile(model, backend="eager"), [0, 2, 3])
    for number, state in states.items():
        torch.testing.assert_close(state, expected[number])


def test_wrappers_are_looked_through() -> None:
    model = tiny_model("gpt2")

    class Wrapper(nn.Module):  # as DistributedDataParallel holds its model
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert num_hidden_layers(Wrapper(model)) == 3
    assert num_hidden_layers(torch.compile(Wrapper(model))) == 3
    assert HiddenStateCapture(Wrapper(model), [2]).layers == (2,)


def test_models_whose_blocks_cannot_be_found_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no config\.num_hidden_layers"):
        num_hidden_layers(nn.Linear(2, 2))
    model = tiny_model("gpt2")
    model.config.n_layer = 5
    with pytest.raises(ValueError, match=r"num_hidden_layers = 5 modules is needed, found none"):
        HiddenStateCapture(model, [1])


def test_encoder_decoder_models_are_refused() -> None:
    config = T5Config(num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"found encoder\.block, decoder\.block.*Only decoder-only"):
        HiddenStateCapture(T5ForConditionalGeneration(config), [1])
