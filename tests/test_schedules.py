"""The dispersion weight over the steps: against formulas, in the loop, over a resume, on two workers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_parallel import run_two
from test_train import Rows, build

from raydisp import data
from raydisp.attach import DispersionTerm
from raydisp.checkpoint import CheckpointFolder
from raydisp.config import StudyConfig, TrialConfig, read_config_json, replace_fields
from raydisp.errors import ConfigError
from raydisp.methods import make_term
from raydisp.parallel import Layout
from raydisp.precision import make_autocast
from raydisp.schedules import START_FRAC, WARMUP_FRAC, WeightSchedule
from raydisp.search.space import column_types
from raydisp.studyfile import parse_study
from raydisp.train import TrainResult, accumulate_gradients, train
from raydisp.trial_words import describe_dispersion

pytestmark = pytest.mark.usefixtures("one_thread")


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear_warmup": {"dispersion.schedule": "linear_warmup", "dispersion.warmup_frac": 0.5},
    "cosine_decay": {"dispersion.schedule": "cosine_decay"},
    "delayed": {"dispersion.schedule": "delayed", "dispersion.start_frac": 0.4},
}
SHARES = {
    "linear_warmup": [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "cosine_decay": [math.cos(math.pi * step / 20) ** 2 for step in range(10)],
    "delayed": [0.0] * 4 + [1.0] * 6,
}
"""Of ten steps."""


Run = Callable[..., tuple[TrainResult, Rows, torch.nn.Module]]


@pytest.fixture
def run(study: StudyConfig, cache_dir: str) -> Run:
    """Trains the tiny trial, of ten steps, with changes."""

    def train_with(changes: dict[str, Any], **options: Any) -> Any:
        trial = replace_fields(study.trial, changes)
        model, rows = build(trial, cache_dir), Rows()
        folder = data.prepare(trial, cache_dir)
        blocks = (data.TokenBlocks(folder, "train"), data.TokenBlocks(folder, "validation"))
        result = train(model, *blocks, trial, layout=Layout(), rows=rows, **options)
        return result, rows, model

    return train_with


# --- the schedules themselves ------------------------------------------------------------------------------


def plain_share(name: str, step: int, num_steps: int, frac: float) -> float:
    """From the descriptions, by counting steps."""
    if name == "linear_warmup":
        rising = [s for s in range(num_steps) if s < frac * num_steps - 1e-6]
        return min(1.0, (step + 1) / len(rising)) if rising else 1.0
    if name == "cosine_decay":
        return math.cos(math.pi / 2 * step / num_steps) ** 2
    if name == "delayed":
        seen = step / num_steps  # of all tokens, before this step
        return 1.0 if seen >= frac - 1e-9 or step == num_steps - 1 else 0.0
    return 1.0


@pytest.mark.parametrize("frac", [0.0, 0.1, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("name", ["constant", *SCHEDULES])
def test_shares_are_those_of_the_formulas(name: str, num_steps: int, frac: float) -> None:
    own = {"linear_warmup": "warmup_frac", "delayed": "start_frac"}
    schedule = WeightSchedule(num_steps, name, **({own[name]: frac} if name in own else {}))  # type: ignore[arg-type]
    found = [schedule(step) for step in range(num_steps)]
    assert found == pytest.approx([plain_share(name, step, num_steps, frac) for step in range(num_steps)])
    assert all(0.0 <= share <= 1.0 for share in found)
    assert schedule(num_steps + 5) == found[-1]
    assert max(found) > 0, "on at least once"


def test_what_is_not_said_has_a_default() -> None:
    assert WeightSchedule(10, "linear_warmup") != WeightSchedule(10, "linear_warmup", warmup_frac=WARMUP_FRAC)
    for name, setting, frac in (
        ("linear_warmup", "warmup_frac", WARMUP_FRAC),
        ("delayed", "start_frac", START_FRAC),
    ):
        said = WeightSchedule(10, name, **{setting: frac})  # type: ignore[arg-type]
        assert [WeightSchedule(10, name)(step) for step in range(10)] == [said(step) for step in range(10)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"name": "linear"},
            'schedule = "linear" is not one of constant, linear_warmup, cosine_decay, delayed',
        ),
        ({"num_steps": 0}, "num_steps = 0 is not at least 1"),
        ({"name": "linear_warmup", "warmup_frac": 1.5}, "warmup_frac = 1.5 is not in"),
        ({"name": "delayed", "start_frac": 1.0}, "start_frac = 1.0 is not in"),
        (
            {"name": "delayed", "warmup_frac": 0.5},
            "warmup_frac = 0.5 is of schedule = linear_warmup, and the ",
        ),
    ],
)
def test_a_schedule_that_is_none(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        WeightSchedule(**{"num_steps": 10, **settings})
    assert sentence in str(caught.value)


# --- in the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_tell_the_weight_of_each_step_and_the_loss_has_it(run: Run, name: str) -> None:
    result, rows, _ = run(SCHEDULES[name])
    assert rows.column("dispersion_weight") == pytest.approx([0.3 * share for share in SHARES[name]])
    for row in rows.tables["steps"]:
        off = row["dispersion_weight"] == 0.0
        assert (row["dispersion_loss"] is None) == off
        added = 0.0 if off else row["dispersion_weight"] * row["dispersion_loss"]
        assert row["loss"] == pytest.approx(row["lm_loss"] + added, rel=1e-12)
    assert result.used["dispersion.weight"] == 0.3, "the peak, as the file has it"
    for field, value in SCHEDULES[name].items():
        assert result.used[field] == value


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_is_one_of_a_constant_weight(study: StudyConfig, cache_dir: str, name: str) -> None:
    batch = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(0))

    def gradients(changes: dict[str, Any], step: int) -> torch.Tensor:
        trial = replace_fields(study.trial, changes)
        model = build(trial, cache_dir)
        term = make_term(model, trial)
        accumulate_gradients(
            model, batch, term, trial, step, Layout(), 8, make_autocast("fp32", torch.device("cpu"))
        )
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    for step in (0, 3, 4, 9):
        weight = 0.3 * SHARES[name][step]
        expected = gradients({"dispersion.weight": weight}, step)
        # the weight of a cosine differs in its last digit
        assert torch.allclose(gradients(SCHEDULES[name], step), expected, rtol=1e-6, atol=1e-9)


def test_until_it_begins_a_delayed_term_costs_and_changes_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [0], DispersionTerm.loss

    def counted(self: DispersionTerm, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        return loss(self, *args, **options)

    monkeypatch.setattr(DispersionTerm, "loss", counted)
    _, baseline, _ = run({"dispersion.weight": 0.0})
    assert calls == [0]
    _, delayed, _ = run(SCHEDULES["delayed"])
    assert calls == [6]
    assert delayed.column("loss")[:4] == baseline.column("loss")[:4]
    assert delayed.column("lm_loss")[4] == baseline.column("lm_loss")[4], (
        "the first step sees the same weights"
    )
    assert delayed.column("lm_loss")[5] != baseline.column("lm_loss")[5]
    assert baseline.column("dispersion_weight") == [0.0] * 10


def test_a_weight_of_0_is_the_baseline_whatever_the_schedule(run: Run) -> None:
    _, baseline, plain = run({"dispersion.weight": 0.0})
    for changes in SCHEDULES.values():
        result, rows, model = run({**changes, "dispersion.weight": 0.0})
        assert rows.column("loss") == baseline.column("loss")
        assert rows.column("dispersion_loss") == [None] * 10
        assert result.used["dispersion.weight"] == 0.0
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_killed_and_continued_equals_never_killed(run: Run, tmp_path: Path, name: str) -> None:
    changes = {**SCHEDULES[name], "checkpoint.every_tokens": 384}
    whole, rows, model = run(changes)
    folder = CheckpointFolder(str(tmp_path), "x")

    def kill(report: dict[str, Any]) -> None:
        if report["step"] == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(changes, checkpoints=folder, on_evaluation=kill)
    saved = folder.find()
    assert saved is not None
    assert saved.step == 3, "in the middle of a warm-up, and before a delayed term is on"
    continued, later, later_model = run(changes, checkpoints=folder, resume_from=saved)
    for column in ("loss", "dispersion_weight", "dispersion_loss"):
        assert later.column(column) == rows.column(column)[3:]
    assert continued.final.loss == whole.final.loss
    for mine, theirs in zip(later_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_equal_one(
    run: Run, study: StudyConfig, cache_dir: str, tmp_path: Path, strategy: str
) -> None:
    changes = {**SCHEDULES["delayed"], "train.learning_rate": 2e-3}
    _, alone, _ = run(changes)
    trial = replace_fields(
        study.trial, {**changes, "train.strategy": strategy, "train.micro_batch_tokens": 32}
    )
    main, _ = run_two(trial, cache_dir, tmp_path)
    # float32 sums in another order
    assert main["losses"] == pytest.approx(alone.column("loss"), rel=1e-5)


# --- the study file ----------------------------------------------------------------------------------------

HEAD = """\
name: x
model: {source: scratch, num_layers: 2, hidden_size: 16, num_heads: 2, vocab_size: 320}
data: {source: python_docs, context_length: 16}
train: {budget_tokens: 1280, global_batch_tokens: 128, learning_rate: 0.01}
"""
SEARCH = """\
search:
  num_trials: 4
  space:
"""
WARMED = "    dispersion.warmup_frac: {low: 0.05, high: 0.5%s}\n"
NAMES = "    dispersion.schedule: [constant, linear_warmup]\n"


def test_a_fraction_is_searched_with_its_schedule_alone() -> None:
    when = ", when: {dispersion.schedule: [linear_warmup]}"
    study = parse_study(HEAD + SEARCH + NAMES + WARMED % when, "f.yaml")
    assert {name: str(kind) for name, kind in column_types(study).items()} == {
        "dispersion.schedule": "string",
        "dispersion.warmup_frac": "double",
    }


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        (
            "dispersion: {warmup_frac: 0.1}\n" + SEARCH + "    dispersion.weight: {low: 0.1, high: 1}\n",
            5,
            "dispersion.warmup_frac = 0.1 is of dispersion.schedule = linear_warmup, and the schedule is "
            "constant; leave it out (null), or use schedule: linear_warmup",
        ),
        (
            "dispersion: {schedule: delayed, start_frac: 1.0}\n" + SEARCH + NAMES,
            5,
            "dispersion.start_frac = 1.0 is not below 1.0",
        ),
        (
            "dispersion: {schedule: delay}\n" + SEARCH + NAMES,
            5,
            'Did you mean "delayed"?',
        ),
        (
            SEARCH + WARMED % "",
            8,
            'search.space["dispersion.warmup_frac"].low = 0.05 is not allowed: dispersion.warmup_frac = 0.05 '
            "is of dispersion.schedule = linear_warmup, and the schedule is constant",
        ),
        (
            "dispersion: {schedule: linear_warmup}\n" + SEARCH + NAMES + WARMED % "",
            10,
            'search.space["dispersion.warmup_frac"] is of schedule linear_warmup alone, and '
            "dispersion.schedule may be constant too; add when: {dispersion.schedule: [linear_warmup]}",
        ),
        (
            SEARCH + NAMES + WARMED % ", when: {dispersion.schedule: [linear_warmup, constant]}",
            9,
            "is not allowed: dispersion.warmup_frac = 0.05 is of dispersion.schedule = linear_warmup",
        ),
        (
            "dispersion: {schedule: linear_warmup, warmup_frac: 0.3}\n" + SEARCH + NAMES,
            9,
            'search.space["dispersion.schedule"][0] = "constant" is not allowed: dispersion.warmup_frac',
        ),
    ],
)
def test_mistakes(text: str, line: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(HEAD + text, "f.yaml")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"f.yaml:{line}: ")


def test_an_arm_sets_a_schedule_and_its_fraction(tree: dict[str, Any]) -> None:
    tree["arms"] = {
        "baseline": {"dispersion.weight": 0},
        "constant": {"dispersion.weight": {"low": 0.01, "high": 1.0}},
        "delayed": {"dispersion.schedule": "delayed", "dispersion.start_frac": 0.25},
    }
    tree["search"]["space"] = {}
    study = parse_study(yaml.safe_dump(tree), "f.yaml")
    assert study.arms is not None


FILE = {
    "seed": 3,
    "model": {"source": "scratch", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 320},
    "data": {"source": "files", "paths": ["corpus/*.txt"], "context_length": 16},
    "train": {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01},
    "evaluate": {"every_tokens": 512, "max_tokens": 256},
}


def test_trials_of_before_keep_their_identity() -> None:
    """As computed before there were schedules, log-spaced evaluations or teachers."""
    trial = TrialConfig.model_validate(FILE)
    assert trial.sha256 == "6a8df7013b2bedaff0b67cdebde6af73559db4e9c87aed8ed7a0133a00ad42bf"
    said = copy.deepcopy(FILE)
    said["dispersion"] = {"schedule": "constant", "warmup_frac": None, "start_frac": None}
    said["evaluate"]["num_log_spaced"] = None  # type: ignore[index]
    said["distillation"] = {"teacher": None, "weight": 0.5, "temperature": 2.0}
    assert TrialConfig.model_validate(said).sha256 == trial.sha256
    others = {replace_fields(trial, changes).sha256 for changes in SCHEDULES.values()}
    assert len({trial.sha256, *others}) == 4


def test_a_row_of_before_has_the_constant_schedule(study: StudyConfig) -> None:
    tree = study.trial.model_dump(mode="json")
    for name in ("schedule", "warmup_frac", "start_frac"):
        del tree["dispersion"][name]
    assert read_config_json(json.dumps(tree)) == study.trial.model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linear_warmup", "its weight rises over the first 5 of 10 steps"),
        ("cosine_decay", "its weight falls to 0 over the 10 steps, as a cosine"),
        ("delayed", "it is off in the first 4 of 10 steps"),
    ],
)
def test_the_plan_tells_the_schedule(study: StudyConfig, name: str, text: str) -> None:
    trial = replace_fields(study.trial, SCHEDULES[name])
    study = study.model_copy(update={"dispersion": trial.dispersion})
    assert describe_dispersion(study, None).endswith(f"clamp 0.1; {text}")
