"""Distillation: the divergence against plain loops, a teacher beside a training, one vocabulary for both."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import WriteStudy, run_command
from test_train import Rows
from test_worker import assign

from raydisp import data, distillation, models, results
from raydisp.arms import Arms
from raydisp.checkpoint import CheckpointFolder
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig, TrialConfig, read_config_json, replace_fields
from raydisp.config.model import ScratchModel
from raydisp.data import BatchLoader, TokenBlocks
from raydisp.distillation import Teacher, distillation_losses
from raydisp.errors import ConfigError, ModelError, OutputError
from raydisp.launch import refuse_other_content
from raydisp.memory import micro_batch_sequences
from raydisp.optimizer import learning_rate_factor, make_optimizer
from raydisp.parallel import Layout
from raydisp.plan import make_plan
from raydisp.precision import make_autocast
from raydisp.search.agenda import Agenda
from raydisp.search.dispatch import Launch
from raydisp.study import main
from raydisp.studyfile import parse_study
from raydisp.train import TrainResult, train
from raydisp.trial.attempts import run_attempt
from raydisp.vocabulary import check_shared_vocabulary, teachers_vocab_size

pytestmark = pytest.mark.usefixtures("one_thread")


CPU = torch.device("cpu")
STUDIES = Path(__file__).parent.parent / "studies"


# --- the divergence ------------------------------------------------------------------------------------


def plain_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) token by token, probability by probability, in float64."""
    rows = []
    for mine, theirs in zip(student.double(), teacher.double(), strict=True):
        row = []
        for q_logits, p_logits in zip(mine[:-1], theirs[:-1], strict=True):
            p = [math.exp(x / temperature) for x in p_logits.tolist()]
            q = [math.exp(x / temperature) for x in q_logits.tolist()]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            row.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def logits(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("chunk", [1, 30, 2**22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int
) -> None:
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", chunk)
    student, teacher = logits(3, 5, 11, seed=0), logits(3, 5, 11, seed=1)
    found = distillation_losses(student, teacher, temperature=temperature)
    assert found.shape == (3, 4)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), plain_divergence(student, teacher, temperature), rtol=1e-5)


def test_its_gradient_is_that_of_automatic_differentiation() -> None:
    student, teacher = (logits(2, 4, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    student.requires_grad_()
    weights = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(
        (weights * distillation_losses(student, teacher, temperature=1.7)).sum(), student
    )
    mine, theirs = ((one[:, :-1] / 1.7).log_softmax(-1) for one in (student, teacher))
    plain = 1.7**2 * (theirs.exp() * (theirs - mine)).sum(-1)
    (expected,) = torch.autograd.grad((weights * plain).sum(), student)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[:, -1], torch.zeros(2, 7, dtype=torch.float64)), "the last predicts nothing"


def test_equal_predictions_do_not_diverge_and_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = logits(2, 4, 7, seed=0), logits(2, 4, 7, seed=0)
    teacher.requires_grad_()
    student.requires_grad_()
    value = distillation_losses(student, teacher + 5.0, temperature=2.0)  # softmax does not see the shift
    assert value.abs().max() < 1e-5
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-5


def test_entries_that_one_of_them_lacks_do_not_count() -> None:
    student, teacher = logits(2, 4, 9, seed=0), logits(2, 4, 7, seed=1)
    student.requires_grad_()
    found = distillation_losses(student, teacher, temperature=2.0)
    assert torch.equal(found, distillation_losses(student[..., :7], teacher, temperature=2.0))
    found.sum().backward()
    assert torch.equal(student.grad[..., 7:], torch.zeros(2, 4, 2))
    assert student.grad[:, :3, :7].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher = logits(2, 4, 7, seed=0, dtype=dtype), logits(2, 4, 7, seed=1, dtype=dtype)
    student.requires_grad_()
    found = distillation_losses(student, teacher, temperature=2.0)
    expected = distillation_losses(student.float(), teacher.float(), temperature=2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()
    assert student.grad.dtype == dtype


def test_the_backward_pass_is_run_once() -> None:
    student = logits(1, 3, 5, seed=0).requires_grad_()
    value = distillation_losses(student, logits(1, 3, 5, seed=1), temperature=1.0).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be had once"):
        value.backward()


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "sentence"),
    [
        ((2, 4, 7), (2, 3, 7), 1.0, r"of the same tokens, not \[2, 4, 7\] and \[2, 3, 7\]"),
        ((4, 7), (4, 7), 1.0, r"are \[B, L, V\] and \[B, L, W\] logits"),
        ((2, 4, 7), (2, 4, 7), 0.0, "temperature = 0.0 is not above 0"),
        ((2, 4, 7), (2, 4, 7), math.nan, "temperature = nan is not above 0"),
    ],
)
def test_bad_input(student: Any, teacher: Any, temperature: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        distillation_losses(torch.zeros(student), torch.zeros(teacher), temperature=temperature)


# --- a teacher in a folder ---------------------------------------------------------------------------------


def save_model(folder: Path, tokenizer: Any, **sizes: Any) -> Path:
    """A model from scratch and a tokenizer, as save_pretrained leaves them."""
    config = ScratchModel(source="scratch", num_layers=3, hidden_size=32, num_heads=2, **sizes)
    model = models.build_model(config, context_length=32, eos_token_id=0, seed=11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # predictions that are far from uniform
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(corpus_dir: Path, cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 328 embeddings, more than its tokenizer has tokens, and with dropout in its configuration."""
    tree = {
        "model": {"source": "scratch", "vocab_size": 320},
        "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
        "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
    }
    prepared = data.prepare(TrialConfig.model_validate(tree), cache_dir)
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    return save_model(folder, data.load_prepared_tokenizer(prepared), vocab_size=328, dropout=0.3)


@pytest.fixture
def taught(tree: dict[str, Any], teacher_dir: Path) -> dict[str, Any]:
    """The tiny study, its model from scratch with a teacher."""
    del tree["model"]["vocab_size"]
    tree["distillation"] = {
        "teacher": {"source": "path", "path": str(teacher_dir)},
        "weight": 0.7,
        "temperature": 3.0,
    }
    return tree


def trial_of(tree: dict[str, Any], changes: dict[str, Any] | None = None) -> TrialConfig:
    return replace_fields(StudyConfig.model_validate(tree).trial, changes or {})


def build(trial: TrialConfig) -> torch.nn.Module:
    return models.build_model(
        trial.model, context_length=16, eos_token_id=0, vocab_size=teachers_vocab_size(trial), seed=trial.seed
    )


def build_teacher(trial: TrialConfig) -> torch.nn.Module:
    assert trial.distillation.teacher is not None
    return models.build_model(trial.distillation.teacher, context_length=16, eos_token_id=0, seed=0)


Run = Callable[..., tuple[TrainResult, Rows, torch.nn.Module]]


@pytest.fixture
def run(taught: dict[str, Any], cache_dir: str) -> Run:
    """Trains the tiny trial, of ten steps, with changes; the teacher is there whether or not it is on."""

    def train_with(changes: dict[str, Any] | None = None, **options: Any) -> Any:
        trial = trial_of(taught, changes)
        model, rows = build(trial), Rows()
        folder = data.prepare(trial, cache_dir)
        blocks = (TokenBlocks(folder, "train"), TokenBlocks(folder, "validation"))
        options.setdefault("teacher", build_teacher(trial))
        result = train(model, *blocks, trial, layout=Layout(), rows=rows, **options)
        return result, rows, model

    return train_with


def plain_training(trial: TrialConfig, blocks: TokenBlocks) -> list[dict[str, float]]:
    """The losses of all steps, with the loss written out and no hooks."""
    model, teacher = build(trial), build_teacher(trial).eval()
    optimizer = make_optimizer(model, trial.train)
    alpha, t = trial.distillation.weight, trial.distillation.temperature
    found = []
    with BatchLoader(
        blocks, seed=trial.seed, sequences_per_step=trial.sequences_per_step, num_steps=trial.num_steps
    ) as batches:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, trial.num_steps, trial.train)
            with torch.no_grad():
                theirs = (teacher(input_ids=batch).logits[:, :-1] / t).softmax(-1)
            outputs = model(input_ids=batch).logits[:, :-1]
            hard = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch[:, 1:].flatten())
            soft = torch.nn.functional.kl_div(
                (outputs / t).log_softmax(-1).flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean"
            )
            loss = (1 - alpha) * hard + alpha * t**2 * soft
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trial.train.grad_clip)
            optimizer.step()
            found.append(
                {"loss": loss.item(), "lm_loss": hard.item(), "distillation_loss": t**2 * soft.item()}
            )
    return found


def test_a_training_is_that_of_a_plain_loop(run: Run, taught: dict[str, Any], cache_dir: str) -> None:
    changes = {"dispersion.weight": 0.0, "train.learning_rate": 2e-3}
    trial = trial_of(taught, changes)
    expected = plain_training(trial, TokenBlocks(data.prepare(trial, cache_dir), "train"))
    result, rows, _ = run(changes)
    for column in ("loss", "lm_loss", "distillation_loss"):
        # float32 sums in another order, over ten steps
        assert rows.column(column) == pytest.approx([row[column] for row in expected], rel=1e-5)
    assert result.used["distillation.weight"] == 0.7
    assert result.used["distillation.temperature"] == 3.0


def test_the_total_is_the_sum_of_its_weighted_parts(run: Run) -> None:
    result, rows, model = run()
    for row in rows.tables["steps"]:
        hard = 0.3 * row["lm_loss"]
        soft = 0.7 * row["distillation_loss"]
        assert row["loss"] == pytest.approx(hard + soft + 0.3 * row["dispersion_loss"], rel=1e-12)
    # What is evaluated is the text alone.
    assert result.final.loss > 1.0
    evals = [row["value"] for row in rows.tables["evals"] if row["name"] == "loss"]
    assert evals[-1] == result.final.loss
    assert result.train_loss == pytest.approx(rows.column("lm_loss")[-1])
    assert model.config.vocab_size == 328


def test_a_student_comes_nearer_to_its_teacher(run: Run) -> None:
    changes = {"train.budget_tokens": 10_240, "dispersion.weight": 0.0}
    _, taught, _ = run({**changes, "distillation.weight": 1.0})
    _, little, _ = run({**changes, "distillation.weight": 1e-6})
    assert taught.column("distillation_loss")[-1] < 0.7 * little.column("distillation_loss")[-1]
    assert taught.column("lm_loss")[-1] > little.column("lm_loss")[-1], "of the text it learns nothing"


def test_switched_off_it_is_the_training_without(run: Run, taught: dict[str, Any], cache_dir: str) -> None:
    result, rows, model = run({"distillation.weight": 0.0}, teacher=None)
    without = trial_of(taught, {"distillation.weight": 0.0})
    plain_model, plain = build(without), Rows()
    # The same model and data, and a trial that has never heard of teachers.
    tree = without.model_dump(mode="json")
    del tree["distillation"]
    folder = data.prepare(without, cache_dir)
    train(
        plain_model,
        TokenBlocks(folder, "train"),
        TokenBlocks(folder, "validation"),
        TrialConfig.model_validate(tree),
        layout=Layout(),
        rows=plain,
    )
    assert rows.column("loss") == plain.column("loss")
    assert rows.column("distillation_loss") == [None] * 10
    assert result.used["distillation.weight"] == 0.0
    for mine, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_trial_that_distils_needs_its_teacher(run: Run) -> None:
    with pytest.raises(ValueError, match="was given no teacher"):
        run(teacher=None)


def test_the_teacher_stays_as_it_is(run: Run, taught: dict[str, Any]) -> None:
    teacher = build_teacher(trial_of(taught))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run({"model.dropout": 0.2}, teacher=teacher)
    assert not teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_teacher_changes_no_noise_of_the_student(taught: dict[str, Any]) -> None:
    """Its forward pass draws nothing: the student's dropout is what it would be alone."""
    teacher = Teacher(
        build_teacher(trial_of(taught)), weight=0.5, temperature=2.0, device=CPU, precision="fp32"
    )
    state = torch.get_rng_state()
    found = teacher.logits(torch.arange(32).view(2, 16), make_autocast("fp32", CPU))
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad
    assert found.shape == (2, 16, 328)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_weights_are_what_autocast_makes_of_them(family: Any, tied: bool) -> None:
    config = ScratchModel(
        source="scratch",
        family=family,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        vocab_size=320,
        tie_embeddings=tied,
    )
    plain, kept = (models.build_model(config, context_length=16, eos_token_id=0, seed=0) for _ in range(2))
    teacher = Teacher(kept, weight=0.5, temperature=2.0, device=CPU, precision="bf16")
    tokens = torch.arange(32).view(2, 16)
    autocast = make_autocast("bf16", CPU)
    with torch.no_grad(), autocast:
        expected = plain.eval()(input_ids=tokens).logits
    assert torch.equal(teacher.logits(tokens, autocast), expected)
    matrices = {
        parameter.dtype
        for name, parameter in kept.named_parameters()
        if ".mlp." in name and parameter.dim() == 2
    }
    assert matrices == {torch.bfloat16}
    assert kept.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("micro_batch_tokens", [16, 48])
def test_micro_batches_do_not_change_the_result(run: Run, micro_batch_tokens: int) -> None:
    changes = {"train.learning_rate": 2e-3}
    _, whole, _ = run(changes)
    _, split, _ = run({**changes, "train.micro_batch_tokens": micro_batch_tokens})
    assert split.column("loss") == pytest.approx(whole.column("loss"), rel=1e-5)


def test_bf16_learns_too(run: Run) -> None:
    _, whole, _ = run()
    _, half, _ = run({"train.precision": "bf16"})
    # seven bits of mantissa
    assert half.column("distillation_loss") == pytest.approx(whole.column("distillation_loss"), rel=5e-2)


def test_killed_and_continued_equals_never_killed(run: Run, tmp_path: Path) -> None:
    changes = {"checkpoint.every_tokens": 384}
    whole, rows, model = run(changes)
    folder = CheckpointFolder(str(tmp_path), "x")

    def kill(report: dict[str, Any]) -> None:
        if report["step"] == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(changes, checkpoints=folder, on_evaluation=kill)
    saved = folder.find()
    assert saved is not None
    assert saved.step == 6
    # As large as the student and its moments: of the teacher nothing.
    assert {name.split(".")[0] for name in saved.names} == {"model", "optimizer"}
    assert len([name for name in saved.names if name.startswith("model.")]) <= len(model.state_dict())
    continued, later, later_model = run(changes, checkpoints=folder, resume_from=saved)
    for column in ("loss", "distillation_loss"):
        assert later.column(column) == rows.column(column)[6:]
    assert continued.final.loss == whole.final.loss
    for mine, theirs in zip(later_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# --- two workers -------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"train.micro_batch_tokens": 32},
    "fsdp": {"train.strategy": "fsdp"},
}


def _worker(rank: int, port: int, tree: dict[str, Any], cache_dir: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for name, changes in LAYOUTS.items():
            trial = replace_fields(TrialConfig.model_validate(tree), changes)
            folder = data.prepare(trial, cache_dir)
            rows = Rows()
            result = train(
                build(trial),
                TokenBlocks(folder, "train"),
                TokenBlocks(folder, "validation"),
                trial,
                layout=Layout(rank, 2),
                rows=rows if rank == 0 else None,
                teacher=build_teacher(trial),
            )
            found = {"losses": rows.column("loss"), "val_loss": result.final.loss}
            (Path(out) / f"{name}-{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_workers_equal_one(run: Run, taught: dict[str, Any], cache_dir: str, tmp_path: Path) -> None:
    changes = {"train.budget_tokens": 2560, "train.learning_rate": 2e-3}
    result, rows, _ = run(changes)
    tree = trial_of(taught, changes).model_dump(mode="json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, tree, cache_dir, str(tmp_path)), nprocs=2)
    for name in LAYOUTS:
        main, other = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2))
        # float32 sums in another order, over 20 steps
        assert main["losses"] == pytest.approx(rows.column("loss"), rel=1e-5)
        assert main["val_loss"] == other["val_loss"] == pytest.approx(result.final.loss, rel=1e-5)


# --- one vocabulary ----------------------------------------------------------------------------------------


def test_a_student_from_scratch_has_its_teachers_tokens(
    taught: dict[str, Any], teacher_dir: Path, cache_dir: str
) -> None:
    trial = trial_of(taught)
    meta = data.read_meta(data.prepare(trial, cache_dir))
    tokenizer = models.load_tokenizer(trial.distillation.teacher)
    assert meta["vocab_size"] == len(tokenizer) <= 320
    assert str(teacher_dir) in meta["tokenizer"]
    assert teachers_vocab_size(trial) == 328, "its embeddings, some of which no token has"
    assert data.prepared_folder(replace_fields(trial, {"distillation.weight": 0.0}), cache_dir) == (
        data.prepared_folder(trial, cache_dir)
    ), "all arms have the same tokens"


def test_a_vocabulary_that_is_said_must_be_the_teachers(taught: dict[str, Any], teacher_dir: Path) -> None:
    check_shared_vocabulary(trial_of(taught))
    check_shared_vocabulary(trial_of(taught, {"model.vocab_size": 328}))
    with pytest.raises(ConfigError) as caught:
        check_shared_vocabulary(trial_of(taught, {"model.vocab_size": 1000}))
    assert str(caught.value) == (
        f'model.vocab_size = 1000 is not the 328 of distillation.teacher.path = "{teacher_dir}"; a student '
        "from scratch has its teacher's vocabulary and tokenizer: leave model.vocab_size out"
    )


def test_a_pretrained_student_shares_its_teachers_vocabulary(
    taught: dict[str, Any], teacher_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher_dir, tmp_path / "student")
    taught["model"] = {"source": "path", "path": str(tmp_path / "student")}
    check_shared_vocabulary(trial_of(taught))
    assert teachers_vocab_size(trial_of(taught)) is None
    tokenizer = data.train_tokenizer(iter(["Quite another language"] * 9), 270)
    stranger = save_model(tmp_path / "stranger", tokenizer, vocab_size=300)
    taught["model"]["path"] = str(stranger)
    with pytest.raises(ConfigError) as caught:
        check_shared_vocabulary(trial_of(taught))
    text = str(caught.value)
    assert (
        f'model.path = "{stranger}" and distillation.teacher.path = "{teacher_dir}" have different ' in text
    )
    assert f": {len(tokenizer)} and " in text
    assert "Name a teacher of the model's own family" in text


def test_mistakes_of_a_teacher_are_told_where_it_stands(taught: dict[str, Any], tmp_path: Path) -> None:
    taught["distillation"]["teacher"] = {"source": "path", "path": str(tmp_path / "nowhere")}
    with pytest.raises(ModelError, match=r'distillation\.teacher\.path = ".*nowhere" does not exist'):
        make_plan(StudyConfig.model_validate(taught), str(tmp_path), "local")
    (tmp_path / "no.gguf").write_text("text")
    taught["distillation"]["teacher"] = {"source": "gguf", "path": str(tmp_path / "no.gguf")}
    with pytest.raises(ModelError, match=r"use distillation\.teacher\.source = path"):
        make_plan(StudyConfig.model_validate(taught), str(tmp_path), "local")


def test_a_teacher_with_too_few_positions(taught: dict[str, Any], tmp_path: Path) -> None:
    taught["data"]["context_length"] = 64
    taught["train"]["global_batch_tokens"] = 128
    with pytest.raises(ModelError, match=r"distillation\.teacher\.path = .* has 32 positions, fewer than"):
        make_plan(StudyConfig.model_validate(taught), str(tmp_path), "local")


# --- through the worker ------------------------------------------------------------------------------------


def test_a_trial_with_a_teacher_becomes_its_row(
    taught: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    taught["checkpoint"] = {"every_tokens": 512}
    teacher = StudyConfig.model_validate(taught).distillation.teacher
    assert teacher is not None
    revision = models.resolve_revision(teacher)
    for trial, weight in enumerate((0.7, 0.0)):
        values = {"distillation.weight": weight}
        run = assign(taught, tmp_path, cache_dir, trial=trial, values=values, teacher_revision=revision)
        row = run_attempt(run, lambda report: None)
        assert row["status"] == "completed", row["error_message"]
        assert row["teacher_revision"] == revision
        assert json.loads(row["config_json"])["distillation"]["weight"] == weight
        steps = results.read_table(str(tmp_path / "results"), "steps", trial=trial).to_pylist()
        assert [step["distillation_loss"] is not None for step in steps] == [weight > 0] * 10


def test_another_teacher_is_refused(taught: dict[str, Any], tmp_path: Path) -> None:
    study = StudyConfig.model_validate(taught)
    launch = Launch(
        study, str(tmp_path), "", "", "", None, "0", {}, Plan(1, 1.0, 0.0, 1), teacher_revision="abc"
    )
    row = {"trial": 3, "data_sha256": None, "model_revision": None, "teacher_revision": None}
    refuse_other_content(launch, Agenda([row], [], [], []))
    row["teacher_revision"] = "abd"
    with pytest.raises(OutputError, match="trial 3 has teacher_revision abd, and now it is abc: the teacher"):
        refuse_other_content(launch, Agenda([row], [], [], []))
    assert launch.assign(1, 1, "search", {}).teacher_revision == "abc"


@pytest.mark.ray
def test_a_study_with_and_without_its_teacher(
    taught: dict[str, Any], teacher_dir: Path, write_study: WriteStudy, address: str
) -> None:
    """The command pins the teacher once, and its rows, report and verdicts are as of any arm."""
    taught["arms"] = {
        "baseline": {"dispersion.weight": 0, "distillation.weight": 0},
        "both": {"dispersion.weight": 0.3, "distillation.weight": 0.5, "dispersion.schedule": "delayed"},
    }
    taught["search"]["space"] = {}
    taught["evaluate"]["num_log_spaced"] = 3
    done = run_command(write_study(taught), "--address", address)
    assert done.returncode == 0, done.stderr
    rows = results.read_tables(f"{taught['output']}/tiny").trials.to_pylist()
    assert [(row["arm"], row["status"]) for row in rows] == [("baseline", "completed"), ("both", "completed")]
    sha256 = models.resolve_revision(models.PathModel(source="path", path=str(teacher_dir)))
    assert {row["teacher_revision"] for row in rows} == {sha256}
    assert len({row["data_sha256"] for row in rows}) == 1
    report = (Path(taught["output"]) / "tiny" / "report.html").read_text()
    assert "divergence from the teacher" in report
    assert "Leftmost, at 0: the initial weights." in report


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_micro_batch_knows_of_the_teachers_logits(taught: dict[str, Any], weight: float) -> None:
    trial = trial_of(taught, {"distillation.weight": weight})
    # a sequence of 16 tokens over 2^18 entries is 16 MiB of logits; three or five such tensors in 768 MiB
    assert micro_batch_sequences(trial, Layout(), vocab_size=2**18) == 8
    assert micro_batch_sequences(trial, Layout(), vocab_size=2**20) == (2 if weight else 4)


# --- the study file ----------------------------------------------------------------------------------------


def complain(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_study(yaml.safe_dump(tree, sort_keys=False), "f.yaml")
    return str(caught.value)


def test_what_a_file_may_not_say(taught: dict[str, Any]) -> None:
    def with_(**changes: Any) -> str:
        return complain({**taught, **changes})

    teacher = taught["distillation"]["teacher"]
    assert "distillation.weight = 1.5 is not at most 1" in with_(
        distillation={"teacher": teacher, "weight": 1.5}
    )
    assert "distillation.temperature = 0 is not above 0" in with_(
        distillation={"teacher": teacher, "temperature": 0}
    )
    assert "distillation.weight = 0.7 is given without a distillation.teacher" in with_(
        distillation={"weight": 0.7}
    )
    assert "distillation.teacher.dropout = 0.1: a teacher is not trained" in with_(
        distillation={"teacher": {**teacher, "dropout": 0.1}}
    )
    assert 'distillation.teacher.source = "scratch" is not one of hub, path, gguf' in with_(
        distillation={"teacher": {"source": "scratch"}}
    )
    assert '"pth" is not a key in distillation.teacher; allowed: ' in with_(
        distillation={"teacher": {"source": "path", "pth": "x"}}
    )
    space = {"distillation.weight": {"low": 0.1, "high": 1.0}}
    search = {**taught["search"], "space": space}
    parse_study(yaml.safe_dump({**taught, "search": search}), "f.yaml")
    assert "there is no distillation.teacher" in with_(
        distillation={}, search={**search, "space": {"distillation.weight": [0.5, 0.9]}}
    )
    assert (
        'search.space["distillation.teacher"] cannot be searched: distillation.teacher is the same'
        in with_(search={**search, "space": {"distillation.teacher": ["a", "b"]}})
    )
    assert "model.vocab_size varies between trials, and a student has the vocabulary of its teacher" in with_(
        search={**search, "space": {"model.vocab_size": [320, 400]}}
    )


def test_arms_switch_it_off_and_with_it_what_is_searched_of_it(taught: dict[str, Any]) -> None:
    taught["arms"] = {
        "baseline": {"dispersion.weight": 0, "distillation.weight": 0},
        "distillation": {"dispersion.weight": 0},
        "both": {"distillation.weight": {"low": 0.1, "high": 0.9}, "dispersion.weight": 0.1},
    }
    taught["search"]["space"] = {"distillation.temperature": [1.0, 2.0]}
    arms = Arms(parse_study(yaml.safe_dump(taught, sort_keys=False), "f.yaml"))
    assert [list(arm.study.search.space) for arm in arms.all] == [
        [],
        ["distillation.temperature"],
        ["distillation.temperature", "distillation.weight"],
    ]


def test_identities(taught: dict[str, Any]) -> None:
    trial = trial_of(taught)
    untaught = trial.model_copy(update={"distillation": type(trial.distillation)()})
    others = [
        replace_fields(trial, changes).sha256
        for changes in ({}, {"distillation.weight": 0.0}, {"distillation.temperature": 1.0})
    ]
    assert len({*others, untaught.sha256}) == 4
    assert TrialConfig.model_validate(trial.model_dump(mode="json")).sha256 == trial.sha256
    tree = untaught.model_dump(mode="json")
    del tree["distillation"]
    assert read_config_json(json.dumps(tree)) == untaught.model_dump(mode="json"), "a row of before"


# --- the plan ----------------------------------------------------------------------------------------------


def test_the_plan_names_the_teacher(taught: dict[str, Any], teacher_dir: Path, tmp_path: Path) -> None:
    text = make_plan(StudyConfig.model_validate(taught), str(tmp_path), "local").describe()
    teacher = build_teacher(trial_of(taught))
    number = sum(parameter.numel() for parameter in teacher.parameters())
    assert f"teacher    {teacher_dir}: {number:,} parameters, 3 layers, 32 features, vocabulary 328" in text
    assert "distillation: weight 0.7, temperature 3; a whole copy on every worker, " in text
    assert "gpt2 from scratch: " in text
    assert "2 layers, 16 features, vocabulary 328" in text
    assert "unchecked" not in text
    del taught["distillation"]
    assert (
        "\nteacher " not in make_plan(StudyConfig.model_validate(taught), str(tmp_path), "local").describe()
    )


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub on a port that nobody listens on: the same with and without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("changes", "unchecked"),
    [
        ({"distillation": {"teacher": {"source": "hub", "id": "no-one/t"}}}, ["distillation.teacher.id"]),
        ({"model": {"source": "hub", "id": "no-one/m"}}, ["model.id"]),
        ({"data": {"source": "hub", "path": "no-one/d", "context_length": 16}}, ["data.path"]),
        (
            {
                "model": {"source": "hub", "id": "no-one/m"},
                "distillation": {"teacher": {"source": "hub", "id": "no-one/t"}},
                "active_forgetting": {"every_steps": 5},
            },
            ["distillation.teacher.id", "model.id"],
        ),
    ],
)
def test_a_dry_run_without_the_hub_says_what_it_did_not_look_at(
    tree: dict[str, Any],
    write_study: WriteStudy,
    capsys: pytest.CaptureFixture[str],
    no_network: None,
    changes: dict[str, Any],
    unchecked: list[str],
) -> None:
    if "distillation" in changes and "model" not in changes:
        del tree["model"]["vocab_size"]
    path = write_study({**tree, **changes})
    assert main([str(path), "--dry-run", "--address", "local"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("unchecked"))
    for line, name in zip(lines[first:], unchecked, strict=False):
        assert line[11:].startswith(f'{name} = "no-one/')
        assert "is not in the local cache and the hub does not answer" in line
    assert told.err == ""
    # To run it is another matter.
    assert main([str(path), "--address", "local"]) == 2
    assert "the hub does not answer" in capsys.readouterr().err


def test_the_study_of_the_paper(tmp_path: Path, no_network: None) -> None:
    study = parse_study((STUDIES / "distillation.yaml").read_text(), "distillation.yaml")
    arms = {arm.name: (arm.study.distillation.is_on, arm.may_disperse) for arm in Arms(study).all}
    assert arms == {
        "baseline": (False, False),
        "dispersion": (False, True),
        "distillation": (True, False),
        "both": (True, True),
    }
    plan = make_plan(study, str(tmp_path), "local", dry_run=True)
    assert plan.unchecked
    text = plan.describe()
    assert "teacher    openai-community/gpt2-large from the hub, its size not known yet" in text
    assert "gpt2 from scratch, its size not known yet" in text
    assert "24 search trials, 28 confirm runs in all" in text
