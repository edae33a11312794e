"""The attached loss: in plain loops, under the frameworks, across processes, and gone when removed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from raydisp.attach import DispersionTerm, attach_dispersion
from raydisp.losses import dispersion_loss
from raydisp.schedules import WeightSchedule
from raydisp.trainer_callback import DispersionSteps

pytestmark = pytest.mark.usefixtures("one_thread")


VOCABULARY = 61
WEIGHT = 0.5
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = ["gpt2", "llama", "qwen3"]


def tiny_model(family: str = "llama", num_layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_layer=num_layers, n_embd=16, n_head=2, n_positions=32, **no_dropout, **TOKENS)
        return GPT2LMHeadModel(config).train()
    sizes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **TOKENS,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)).train()
    return LlamaForCausalLM(LlamaConfig(**sizes)).train()


def input_ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def reference_loss(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy + WEIGHT x dispersion, and the dispersion, from output_hidden_states=True."""
    outputs = model(input_ids=ids, labels=ids, attention_mask=mask, output_hidden_states=True)
    values = [dispersion_loss(state, mask=mask) for state in outputs.hidden_states[1:]]
    dispersion = torch.stack(values).mean()
    return outputs.loss + WEIGHT * dispersion, dispersion


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # float32, another order of sums


# ---------------------------------------------------------------------- one model, one pass


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_term_joins_the_loss(family: str, checkpointing: bool, masked: bool) -> None:
    model, ids = tiny_model(family), input_ids()
    mask = torch.ones_like(ids)
    if masked:
        mask[0, 5:] = 0
    expected, dispersion = reference_loss(model, ids, mask)
    expected_gradients = gradients_of(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable()
    attach_dispersion(model, weight=WEIGHT)
    outputs = model(input_ids=ids, labels=ids, attention_mask=mask)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.dispersion_loss, dispersion)
    assert_same_gradients(gradients_of(model, outputs.loss), expected_gradients)
    assert isinstance(outputs, type(model.eval()(input_ids=ids)))  # still what the model returns otherwise


def test_the_chosen_layers_and_settings_are_used() -> None:
    model, ids = tiny_model(), input_ids()
    settings: dict[str, Any] = {"temperature": 0.3, "clamp": 0.2}
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    handle = attach_dispersion(model, layers="late_half", **settings)
    assert handle.term.layers == (2, 3)
    found = model(input_ids=ids, labels=ids).dispersion_loss
    expected = [dispersion_loss(states[number], **settings) for number in (2, 3)]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_evaluation_adds_nothing() -> None:
    model, ids = tiny_model().eval(), input_ids()
    plain = model(input_ids=ids, labels=ids)
    attach_dispersion(model)
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.loss == plain.loss
    assert type(outputs) is type(plain)
    with torch.no_grad():  # nor does generation inside training
        assert model.train()(input_ids=ids, labels=ids).loss == plain.loss


def test_remove_restores_the_model(tmp_path: Path) -> None:
    model, ids = tiny_model(), input_ids()
    plain = model(input_ids=ids, labels=ids)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    handle = attach_dispersion(model)
    assert model(input_ids=ids, labels=ids).loss != plain.loss
    handle.remove()
    assert model(input_ids=ids, labels=ids).loss == plain.loss
    assert hooks == {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    }
    assert handle.term.layers == ()


def test_save_pretrained_writes_a_plain_model(tmp_path: Path) -> None:
    model = tiny_model()
    expected = model.state_dict()
    attach_dispersion(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert "dispersion" not in (tmp_path / "config.json").read_text()


def test_tuples_get_the_term_too() -> None:
    model, ids = tiny_model(), input_ids()
    attach_dispersion(model, weight=WEIGHT)
    expected = model(input_ids=ids, labels=ids)
    outputs = model(input_ids=ids, labels=ids, return_dict=False)
    assert outputs[0] == expected.loss
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], expected.logits)


def test_without_labels_the_term_is_reported_and_a_warning_given_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny_model(), input_ids()
    attach_dispersion(model)
    with caplog.at_level(logging.WARNING, logger="raydisp.attach"):
        outputs = model(input_ids=ids)
        model(input_ids=ids)
    assert outputs.loss is None
    assert outputs.dispersion_loss.requires_grad
    assert len(caplog.records) == 1
    assert "without labels" in caplog.text


def test_max_tokens_follow_the_generator() -> None:
    model, ids = tiny_model(), input_ids()
    values = []
    for seed in (3, 3, 4):
        handle = attach_dispersion(model, max_tokens=4, generator=torch.Generator().manual_seed(seed))
        values.append(model(input_ids=ids, labels=ids).dispersion_loss.item())
        handle.remove()
    assert values[0] == values[1] != values[2]


def test_the_term_alone_reads_back_its_settings() -> None:
    term = DispersionTerm(
        tiny_model(), weight=0.2, variant="orthogonalization", margin=0.4, layers=[0, 3], max_tokens=5
    )
    settings = (term.weight, term.variant, term.temperature, term.clamp, term.margin, term.max_tokens)
    assert settings == (0.2, "orthogonalization", 1.0, 0.1, 0.4, 5)
    assert term.layers == (0, 3)
    with pytest.raises(RuntimeError, match="not recorded"):
        term.loss()
    term.remove()
    assert term.layers == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": float("nan")}, "weight = nan must be a finite number"),
        ({"variant": "angular"}, '"angular" is not one of'),
        ({"temperature": 0}, "temperature = 0 must be"),
        ({"layers": [4]}, "holds 4, but this model has layers 0 .* to 3"),
        ({"max_tokens": 1}, "max_tokens = 1 must be at least 2"),
    ],
)
def test_bad_settings_are_refused_before_a_hook_is_set(settings: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        attach_dispersion(model, **settings)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_compiled_model_has_no_graph_break() -> None:
    model, ids = tiny_model(), input_ids()
    attach_dispersion(model, weight=WEIGHT)
    expected = model(input_ids=ids, labels=ids)
    expected_gradients = gradients_of(model, expected.loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = compiled(input_ids=ids, labels=ids)
    torch.testing.assert_close(outputs.dispersion_loss, expected.dispersion_loss)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert_same_gradients(gradients_of(model, outputs.loss), expected_gradients)


# ---------------------------------------------------------------------- a weight that changes


def test_a_schedule_weighs_each_step() -> None:
    model, ids = tiny_model(), input_ids()
    plain = model(input_ids=ids, labels=ids)
    expected, dispersion = reference_loss(model, ids)
    schedule = WeightSchedule(4, "delayed", start_frac=0.5)
    handle = attach_dispersion(model, weight=WEIGHT, schedule=schedule)
    with pytest.raises(RuntimeError, match="follows a schedule, and no step is known"):
        model(input_ids=ids, labels=ids)
    handle.step = 1
    outputs = model(input_ids=ids, labels=ids)
    assert type(outputs) is type(plain), "where the weight is 0, nothing is added, nor computed"
    assert outputs.loss == plain.loss
    handle.step = 2
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    handle.term.schedule = WeightSchedule(4, "linear_warmup", warmup_frac=1.0)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain.loss + 0.75 * WEIGHT * dispersion)
    assert model.eval()(input_ids=ids, labels=ids).loss == plain.loss


def test_a_trainer_tells_the_step(tmp_path: Path) -> None:
    model = tiny_model()
    handle = attach_dispersion(
        model, weight=WEIGHT, schedule=WeightSchedule(2, "linear_warmup", warmup_frac=1.0)
    )
    weights: list[float] = []
    model.register_forward_pre_hook(lambda *_: weights.append(handle.term.weight_at(handle.step)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=model, args=arguments, train_dataset=Sequences(), callbacks=[DispersionSteps(handle)]
    ).train()
    assert weights == [WEIGHT / 2] * 3 + [WEIGHT] * 3, "once for each step, however many batches it has"


# ---------------------------------------------------------------------- frameworks


class Sequences(Dataset[dict[str, Tensor]]):
    """Six sequences; some labels are left out, so that batches hold unequal numbers of targets."""

    def __init__(self, ignored: bool = True) -> None:
        self.ids = input_ids(6, 8, seed=2)
        self.labels = self.ids.clone()
        if ignored:
            self.labels[1, 3:] = self.labels[4, 6:] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def step_by_hand(ignored: bool) -> list[Tensor]:
    """Gradients of a step over three batches of two: token means of cross-entropy and dispersion."""
    model, data = tiny_model(), Sequences(ignored)
    num_targets = (data.labels[:, 1:] != -100).sum()
    total = torch.zeros(())
    for start in (0, 2, 4):
        ids, labels = data.ids[start : start + 2], data.labels[start : start + 2]
        outputs = model(input_ids=ids, labels=labels, output_hidden_states=True)
        dispersion = torch.stack([dispersion_loss(state) for state in outputs.hidden_states[1:]]).mean()
        share = (labels[:, 1:] != -100).sum() / num_targets
        total = total + share * (outputs.loss + WEIGHT * dispersion)
    return gradients_of(model, total)


class KeepGradients(torch.optim.SGD):
    """Does nothing but keep the gradients that it would have applied."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.kept = [p.grad.clone() for p in parameters if p.grad is not None]


def test_transformers_trainer_with_accumulation(tmp_path: Path) -> None:
    expected = step_by_hand(ignored=True)
    model = tiny_model()
    attach_dispersion(model, weight=WEIGHT)
    optimizer = KeepGradients(model.parameters(), lr=1.0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    assert_same_gradients(optimizer.kept, expected)


def test_accelerate_with_accumulation() -> None:
    from accelerate import Accelerator

    expected = step_by_hand(ignored=False)  # a plain loop weighs batches equally
    model = tiny_model()
    attach_dispersion(model, weight=WEIGHT)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = KeepGradients(model.parameters(), lr=1.0)
    loader = torch.utils.data.DataLoader(Sequences(ignored=False), batch_size=2)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            prepared.step()
    assert_same_gradients(optimizer.kept, expected)


def test_a_lightning_module_with_accumulation(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model()
            attach_dispersion(self.model, weight=WEIGHT)

        def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.kept = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Sequences(ignored=False), batch_size=2))
    assert_same_gradients(module.kept, step_by_hand(ignored=False))


# ---------------------------------------------------------------------- processes


def _parallel_worker(rank: int, world_size: int, port: int, strategy: str, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        model: nn.Module = tiny_model()
        if strategy == "ddp":
            attach_dispersion(model, weight=WEIGHT)
            model = DistributedDataParallel(model)
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            attach_dispersion(model, weight=WEIGHT)
        ids = input_ids(batch=4)[2 * rank : 2 * rank + 2]
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        full = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients]
        if rank == 0:
            torch.save(full, f"{folder}/gradients.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_parallel_worker, (2, port, strategy, str(tmp_path)), nprocs=2)
    model = tiny_model()
    attach_dispersion(model, weight=WEIGHT)
    ids = input_ids(batch=4)
    expected = gradients_of(model, model(input_ids=ids, labels=ids).loss)
    assert_same_gradients(torch.load(tmp_path / "gradients.pt"), expected)
