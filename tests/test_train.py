"""The training loop: it learns, repeats itself to the bit, resumes, and stops on what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydisp import data, models
from raydisp import train as train_module
from raydisp.checkpoint import CheckpointFolder
from raydisp.config import StudyConfig, TrialConfig, replace_fields
from raydisp.config.train import TrainConfig
from raydisp.errors import CheckpointError, DivergedError, OutOfMemoryError, PreemptedError
from raydisp.memory import is_out_of_memory, micro_batch_sequences
from raydisp.methods import make_term
from raydisp.optimizer import learning_rate_factor, make_optimizer
from raydisp.parallel import Layout
from raydisp.precision import LossScale, make_autocast, use_tf32
from raydisp.seeds import derive_seed
from raydisp.train import TrainResult, accumulate_gradients, train


class Rows:
    """Keeps rows in memory, with the steps at which they were flushed."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {"steps": [], "evals": [], "layers": []}
        self.flushed: list[int] = []

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.tables[table].append(row)

    def flush(self, step: int) -> None:
        self.flushed.append(step)

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.tables["steps"]]


Run = Callable[..., tuple[TrainResult, Rows, torch.nn.Module]]


@pytest.fixture
def run(study: StudyConfig, cache_dir: str) -> Run:
    """Trains the tiny trial with changes: run({"train.beta1": 0.8}, checkpoints=...)."""

    def train_with(changes: dict[str, Any] | None = None, **options: Any) -> Any:
        trial = replace_fields(study.trial, changes or {})
        model = build(trial, cache_dir)
        folder = data.prepare(trial, cache_dir)
        rows = Rows()
        blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
        result = train(model, *blocks, trial, layout=Layout(), rows=rows, **options)
        return result, rows, model

    return train_with


def build(trial: TrialConfig, cache_dir: str) -> torch.nn.Module:
    meta = data.read_meta(data.prepare(trial, cache_dir))
    return models.build_model(
        trial.model,
        context_length=trial.data.context_length,
        eos_token_id=meta["eos_token_id"],
        seed=trial.seed,
    )


def test_the_loss_falls_and_every_step_has_a_row(run: Run) -> None:
    result, rows, _ = run({"train.budget_tokens": 5120, "dispersion.weight": 0.0})
    assert result.num_steps == 40
    assert rows.column("step") == list(range(1, 41))
    assert rows.column("num_tokens")[-1] == result.num_tokens == 5120
    assert result.final.loss < math.log(320) - 1.5, "14 words are learnt quickly"
    assert rows.column("dispersion_loss") == [None] * 40
    assert rows.column("loss") == rows.column("lm_loss")
    assert result.train_loss == pytest.approx(math.fsum(rows.column("lm_loss")[-4:]) / 4)


def test_evaluations_come_before_between_and_at_the_end(run: Run) -> None:
    reported: list[dict[str, Any]] = []
    result, rows, _ = run(on_evaluation=reported.append)
    assert [report["step"] for report in reported] == [0, 4, 8, 10]
    assert reported[-1]["val_loss"] == result.final.loss
    losses = [row for row in rows.tables["evals"] if row["name"] == "loss"]
    assert [row["step"] for row in losses] == [0, 4, 8, 10]
    # 256 tokens are 16 sequences of 15 predictions; the last evaluation takes the whole split.
    assert [row["num_items"] for row in losses][:3] == [240] * 3
    assert losses[-1]["num_items"] > 240
    layers = [row for row in rows.tables["layers"] if row["step"] == 10]
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert all(sum(row["histogram"]) == 16 * 16 * 16 for row in layers), "every pair of 16 sequences"


def test_evaluations_at_log_spaced_steps(run: Run) -> None:
    changes = {"train.budget_tokens": 6400, "evaluate.every_tokens": None, "evaluate.num_log_spaced": 6}
    reported: list[dict[str, Any]] = []
    result, rows, _ = run(changes, on_evaluation=reported.append)
    # 50 steps: 50^(k/6) is 1, 1.92, 3.68, 7.07, 13.57, 26.05, rounded
    steps = [0, 1, 2, 4, 7, 14, 26, 50]
    assert [report["step"] for report in reported] == steps
    assert sorted({row["step"] for row in rows.tables["layers"]}) == steps
    plain, plain_rows, _ = run({**changes, "evaluate.num_log_spaced": None})
    assert rows.column("loss") == plain_rows.column("loss"), "to look changes nothing"
    assert result.final.loss == plain.final.loss


def test_log_spaced_and_equally_spaced_evaluations_are_one_where_they_meet(run: Run) -> None:
    reported: list[int] = []
    asked: list[int] = []

    def must_stop(metrics: dict[str, Any]) -> bool:
        asked.append(metrics["step"])
        return False

    run(
        {"evaluate.num_log_spaced": 5},
        on_evaluation=lambda report: reported.append(report["step"]),
        must_stop=must_stop,
    )
    assert reported == [0, 1, 2, 3, 4, 6, 8, 10], "1.58 and 2.51 are 2 and 3, 3.98 is 4, as every 512 tokens"
    assert asked == reported[1:-1]


@pytest.mark.parametrize("points", [1, 2, 7, 1000])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000, 10**6])
def test_log_spaced_steps_lie_before_the_end(study: StudyConfig, num_steps: int, points: int) -> None:
    changes = {"train.budget_tokens": 128 * num_steps, "evaluate.num_log_spaced": points}
    steps = replace_fields(study.trial, changes).log_spaced_steps
    assert list(steps) == sorted(set(steps))
    assert all(1 <= step < num_steps for step in steps)
    assert len(steps) <= points
    assert steps[:1] == ((1,) if num_steps > 1 else ())
    if num_steps == 10**6 and points == 7:
        ratios = [later / earlier for earlier, later in zip(steps, [*steps[1:], num_steps], strict=True)]
        assert ratios == pytest.approx([10 ** (6 / 7)] * 7, rel=0.05)  # to whole steps


def test_the_total_is_cross_entropy_plus_weight_times_dispersion(run: Run) -> None:
    _, rows, _ = run()
    for row in rows.tables["steps"]:
        assert row["loss"] == pytest.approx(row["lm_loss"] + 0.3 * row["dispersion_loss"], rel=1e-12)


def test_dispersion_disperses(run: Run) -> None:
    changes = {"train.budget_tokens": 5120}
    cosines = [
        run({**changes, "dispersion.weight": weight})[0].final.layer_cosine_mean for weight in (0.0, 0.3, 2.0)
    ]
    assert cosines[0] > max(cosines[1:]) + 0.05


def test_same_seed_same_bits_and_another_seed_others(run: Run) -> None:
    first, second, other = (run({"seed": seed})[1].column("loss") for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_trial_does_not_depend_on_the_global_generator(run: Run) -> None:
    changes = {"model.dropout": 0.2}
    torch.manual_seed(1)
    first = run(changes)[1].column("loss")
    torch.manual_seed(2)
    assert run(changes)[1].column("loss") == first


@pytest.mark.parametrize("changes", [{}, {"model.dropout": 0.2}, {"dispersion.max_tokens": 5}], ids=str)
def test_killed_and_continued_equals_never_killed(run: Run, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "checkpoint.every_tokens": 512, "train.weight_decay": 0.5}
    whole, rows, model = run(changes, checkpoints=CheckpointFolder(str(tmp_path / "whole"), "x"))
    folder = CheckpointFolder(str(tmp_path / "killed"), "x")

    class KilledError(Exception):
        pass

    def kill(report: dict[str, Any]) -> None:
        if report["step"] == 8:  # after the evaluation of step 8, before its checkpoint: back to step 4
            raise KilledError

    with pytest.raises(KilledError):
        run(changes, checkpoints=folder, on_evaluation=kill)
    latest = folder.find()
    assert latest is not None
    assert latest.step == 4
    continued, later_rows, later_model = run(changes, checkpoints=folder, resume_from=latest)
    assert later_rows.column("step") == list(range(5, 11))
    assert later_rows.column("loss") == rows.column("loss")[4:]
    assert continued.final.loss == whole.final.loss
    assert continued.train_loss == whole.train_loss
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, later_model.state_dict()[name]), name


def test_rows_are_flushed_before_each_checkpoint(run: Run, tmp_path: Path) -> None:
    flushed_at_save: list[list[int]] = []
    rows_seen: list[Rows] = []

    class Folder(CheckpointFolder):
        def save(self, step: int, *arguments: Any, **options: Any) -> None:
            flushed_at_save.append([step, *rows_seen[0].flushed[-1:]])
            super().save(step, *arguments, **options)

    original = Rows.__init__

    def remember(self: Rows) -> None:
        original(self)
        rows_seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "__init__", remember)
        run({"checkpoint.every_tokens": 384}, checkpoints=Folder(str(tmp_path), "x"))
    assert flushed_at_save == [[3, 3], [6, 6], [9, 9]]


@pytest.mark.parametrize("micro_batch_tokens", [16, 48, 64])
def test_micro_batches_do_not_change_the_gradients(
    study: StudyConfig, cache_dir: str, micro_batch_tokens: int
) -> None:
    trial = study.trial
    batch = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for micro in (8, micro_batch_tokens // 16):
        model = build(trial, cache_dir)
        term = make_term(model, trial)
        losses = accumulate_gradients(
            model, batch, term, trial, 0, Layout(), micro, make_autocast("fp32", torch.device("cpu"))
        )
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((*losses, gradients))
    (lm, dispersion, _, whole), (lm_split, dispersion_split, _, split) = found
    # float32 sums in another order
    assert torch.isclose(lm, lm_split, rtol=1e-6)
    assert torch.isclose(dispersion, dispersion_split, rtol=1e-6)
    assert (whole - split).norm() <= 1e-5 * whole.norm()


def test_what_was_used_is_read_back(run: Run) -> None:
    changes = {
        "train.learning_rate": 0.003,
        "train.weight_decay": 0.2,
        "train.beta1": 0.8,
        "dispersion.weight": 0.7,
        "dispersion.temperature": 0.4,
        "dispersion.layers": "late_half",
        "dispersion.clamp": 0.2,
    }
    used = run(changes)[0].used
    for name, value in changes.items():
        expected = [2] if name == "dispersion.layers" else value
        assert used[name] == expected, name
    assert run({"dispersion.weight": 0.0})[0].used["dispersion.weight"] == 0.0


def test_hooks_are_gone_afterwards(run: Run) -> None:
    _, _, model = run()
    hooks = [
        hook
        for module in model.modules()
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    ]
    # transformers leaves hooks of its own, which it uses for output_hidden_states
    assert [hook for hook in hooks if hook.__module__.startswith("raydisp")] == []


def test_a_loss_that_is_not_finite_stops_before_the_step(run: Run) -> None:
    rows: list[int] = []
    with pytest.raises(DivergedError, match=r"(loss|gradient norm) is (nan|inf) at step \d+") as caught:
        run(
            {"train.learning_rate": 1e30, "train.grad_clip": None},
            on_evaluation=lambda r: rows.append(r["step"]),
        )
    assert 1 < caught.value.step <= 10
    assert rows[-1] < caught.value.step


def test_what_was_done_before_the_end_is_flushed(run: Run) -> None:
    seen: list[Rows] = []
    original = Rows.flush

    def flush(self: Rows, step: int) -> None:
        seen.append(self)
        original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "flush", flush)
        with pytest.raises(DivergedError) as caught:
            run({"train.learning_rate": 1e30, "train.grad_clip": None, "evaluate.every_tokens": None})
    assert seen[-1].flushed == [0, caught.value.step - 1]
    assert len(seen[-1].tables["steps"]) == caught.value.step - 1


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Gradients of these steps (counted from 1) are not finite."""
    clip, calls = train_module.clip_gradients, [0]

    def clip_poisoned(parameters: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        parameters = list(parameters)
        if calls[0] in steps:
            parameters[0].grad.fill_(value)
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(train_module, "clip_gradients", clip_poisoned)


def test_a_gradient_that_is_not_finite_ends_the_trial(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {4}, math.inf)
    with pytest.raises(DivergedError, match=r"gradient norm is (inf|nan) at step 4"):
        run()


def test_a_step_can_be_skipped_instead(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 4}, math.nan)
    used: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: used.append(1) or step(self, *args))
    result, rows, model = run({"train.on_nonfinite": "skip_step"})
    assert result.num_skipped_steps == 2
    assert result.num_steps == 10
    assert len(used) == 8, "the optimizer never sees such a gradient"
    assert [math.isfinite(norm) for norm in rows.column("grad_norm")] == [True] * 2 + [False] * 2 + [True] * 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_model_that_is_broken_for_good_diverges_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "MAX_SKIPPED_IN_A_ROW", 3)
    poison(monkeypatch, set(range(3, 11)), math.nan)
    with pytest.raises(DivergedError, match="at step 6"):
        run({"train.on_nonfinite": "skip_step"})


def test_skipped_steps_are_counted_over_attempts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2}, math.nan)
    folder = CheckpointFolder(str(tmp_path), "x")
    changes = {"train.on_nonfinite": "skip_step", "checkpoint.every_tokens": 512}

    def leave(report: dict[str, Any]) -> None:
        if report["step"] == 8:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run(changes, checkpoints=folder, on_evaluation=leave)
    result, _, _ = run(changes, checkpoints=folder, resume_from=folder.find())
    assert result.num_skipped_steps == 1


def test_fp16_halves_its_scale_where_a_gradient_overflows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LossScale", lambda: LossScale(value=2.0**8))  # it overflows at 2^16
    poison(monkeypatch, {1, 5}, math.inf)
    folder = CheckpointFolder(str(tmp_path), "x")
    changes = {"train.precision": "fp16", "checkpoint.every_tokens": 1024, "train.budget_tokens": 5120}
    states: list[Any] = []
    save = folder.save

    def remember(step: int, tensors: Any, state: Any, **options: Any) -> None:
        states.append(state)
        save(step, tensors, state, **options)

    monkeypatch.setattr(folder, "save", remember)
    result, _, model = run(changes, checkpoints=folder)
    assert result.precision == "fp16"
    assert result.num_skipped_steps == 2
    assert states[0]["loss_scale"] == [2.0**6, 3], "halved twice, three good steps since"
    assert result.final.loss < math.log(320) - 1.0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_loss_scale_does_not_show_in_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "LossScale", lambda: LossScale(value=2.0**8))
    half, single = (run({"train.precision": precision})[1] for precision in ("fp16", "fp32"))
    # ten bits of mantissa
    assert half.column("loss") == pytest.approx(single.column("loss"), rel=2e-3)
    assert half.column("grad_norm") == pytest.approx(single.column("grad_norm"), rel=2e-2)


def test_the_loss_scale_grows_and_shrinks() -> None:
    scale = LossScale(value=4.0, growth_interval=2)
    for _ in range(4):
        scale.grow()
    assert scale.value == 16.0
    assert [scale.shrink() for _ in range(5)] == [True] * 4 + [False]
    assert scale.value == 1.0


def test_tf32_is_set_both_ways() -> None:
    for enabled in (True, False):
        use_tf32(enabled)
        assert torch.backends.cuda.matmul.allow_tf32 is enabled


@pytest.mark.parametrize("every_tokens", [512, None])
def test_a_machine_that_goes_is_left_with_a_checkpoint(
    run: Run, tmp_path: Path, every_tokens: int | None
) -> None:
    changes = {"checkpoint.every_tokens": every_tokens}
    whole, rows, _ = run(changes)
    folder = CheckpointFolder(str(tmp_path), "x")
    asked: list[int] = []

    def interruption() -> str | None:
        asked.append(1)
        return "the node is drained"

    with pytest.raises(PreemptedError, match="stopped after step 1: the node is drained"):
        run(changes, checkpoints=folder, interruption=interruption)
    assert asked == [1]
    saved = folder.find()
    assert saved is not None
    assert saved.step == 1
    later, later_rows, _ = run(changes, checkpoints=folder, resume_from=saved, interruption=lambda: None)
    assert later_rows.column("loss") == rows.column("loss")[1:]
    assert later.final.loss == whole.final.loss


def test_a_checkpoint_of_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), "x")
    changes = {"checkpoint.every_tokens": 512}
    run(changes, checkpoints=folder)
    with pytest.raises(CheckpointError):
        run({**changes, "model.hidden_size": 32}, checkpoints=folder, resume_from=folder.find())


def test_an_allocation_that_fails_says_what_may_be_made_smaller(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*arguments: Any, **options: Any) -> Any:
        return torch.empty(2**60)

    monkeypatch.setattr(train_module, "token_losses", allocate)
    with pytest.raises(OutOfMemoryError, match="out of memory at step 1 with micro-batches of 64 tokens: "):
        run({"train.micro_batch_tokens": 64, "evaluate.every_tokens": None})
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_bf16_autocast_learns_too(run: Run) -> None:
    result, _, model = run({"train.precision": "bf16", "train.budget_tokens": 5120})
    assert result.precision == "bf16"
    assert result.final.loss < math.log(320) - 1.0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(budget_tokens=1, global_batch_tokens=1, learning_rate=1.0, **changes)


def test_learning_rate_warms_up_linearly_and_falls_as_half_a_cosine() -> None:
    factors = [learning_rate_factor(step, 10, settings(warmup_frac=0.2)) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert factors[-1] > 0.03, "no step is spent at a rate of 0"
    floor = learning_rate_factor(9, 10, settings(warmup_frac=0.2, min_learning_rate_frac=0.1))
    assert floor == pytest.approx(0.1 + 0.9 * factors[-1])
    assert learning_rate_factor(0, 1, settings(warmup_frac=1.0)) == 1.0
    assert learning_rate_factor(0, 2, settings(warmup_frac=0.0)) == 1.0


def test_weight_decay_leaves_biases_and_norms_alone(study: StudyConfig, cache_dir: str) -> None:
    model = build(study.trial, cache_dir)
    decayed, plain = make_optimizer(model, study.train).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_auto_micro_batch_bounds_the_logits(study: StudyConfig) -> None:
    trial = study.trial
    layout = Layout()
    assert micro_batch_sequences(trial, layout, vocab_size=320) == trial.sequences_per_step
    # one sequence of 16 tokens over a vocabulary of a million: 64 MB of logits
    assert micro_batch_sequences(trial, layout, vocab_size=2**20) == 4
    fixed = replace_fields(trial, {"train.micro_batch_tokens": 48})
    assert micro_batch_sequences(fixed, layout, vocab_size=320) == 3


def test_derived_seeds_do_not_collide_for_neighbours() -> None:
    seeds = {
        derive_seed("step", seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)
    }
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- stopped early -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "steps"), [(512, 4), (1024, 8)])
def test_a_training_is_stopped_after_an_evaluation(run: Run, at: int, steps: int) -> None:
    whole, whole_rows, _ = run()
    asked: list[dict[str, Any]] = []
    reported: list[dict[str, Any]] = []

    def must_stop(metrics: dict[str, Any]) -> bool:
        asked.append(metrics)
        return metrics["num_tokens"] >= at

    result, rows, _ = run(must_stop=must_stop, on_evaluation=reported.append)
    assert (result.final, result.train_loss) == (None, None)
    assert (result.num_steps, result.num_tokens) == (steps, at)
    assert result.tokens_per_s > 0
    assert rows.column("step") == list(range(1, steps + 1))
    # The schedule belongs to the full budget: up to here it is the same training.
    for name in ("loss", "learning_rate"):
        assert rows.column(name) == whole_rows.column(name)[:steps]
    assert rows.flushed[-1] == steps, "what was measured is written"
    assert [metrics["num_tokens"] for metrics in asked] == list(range(512, at + 1, 512))
    for metrics in asked:
        told = next(report for report in reported if report["step"] == metrics["step"])
        assert {**metrics, "elapsed_s": 0} == {**told, "elapsed_s": 0}
        assert {"val_loss", "val_perplexity", "layer_cosine_mean", "spearman", "kendall"} < set(metrics)
    assert whole.final is not None


def test_a_training_that_may_go_on_is_as_if_nobody_asked(run: Run) -> None:
    asked: list[int] = []

    def must_stop(metrics: dict[str, Any]) -> bool:
        asked.append(metrics["num_tokens"])
        return False

    whole, rows, _ = run()
    result, same, _ = run(must_stop=must_stop)
    assert asked == [512, 1024], "neither before the first step nor at the end"
    assert same.column("loss") == rows.column("loss")
    assert result.final.loss == whole.final.loss


def test_one_that_was_stopped_leaves_no_checkpoint_of_its_end(run: Run, tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), "x")
    run({"checkpoint.every_tokens": 256}, checkpoints=folder, must_stop=lambda metrics: True)
    saved = folder.find()
    assert saved is not None
    assert saved.step == 2, "of before the evaluation at which it was stopped"
