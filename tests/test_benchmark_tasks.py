"""Benchmarks of lm-evaluation-harness: checked before anything starts, equal to the harness alone, whatever
the layout, and without a trace in the training."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import WriteStudy, run_command
from task_files import (
    CHOICE,
    GROUP,
    NUM_ITEMS,
    OTHER_CHOICE,
    SPOKEN,
    TAG,
    TEXT,
    WORD,
    write_task,
    write_tasks,
)
from test_worker import assign

from raydisp import data, models, results
from raydisp.config import EvaluateConfig, StudyConfig, TrialConfig, replace_fields
from raydisp.errors import ConfigError
from raydisp.parallel import Layout, parallelise
from raydisp.results.compaction import compact
from raydisp.studyfile import parse_study
from raydisp.tasks import loading as tasks
from raydisp.tasks import scores as task_scores
from raydisp.tasks.runs import TaskRuns
from raydisp.train import train
from raydisp.trial.attempts import run_attempt

TOLERANCE = 1e-5
"""Of log-likelihoods in float32 whose batches are padded differently."""

ALL = [
    {"name": CHOICE, "num_fewshot": 1},
    {"name": TEXT, "limit": 5},
    WORD,
    SPOKEN,
]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def settings(task_dir: Path, *entries: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"tasks": list(entries), "task_paths": [str(task_dir)]})


def build(trial: TrialConfig, prepared: str) -> torch.nn.Module:
    return models.build_model(
        trial.model,
        context_length=trial.data.context_length,
        eos_token_id=data.read_meta(prepared)["eos_token_id"],
        seed=trial.seed,
    )


def task_runs(trial: TrialConfig, prepared: str, *steps: int) -> TaskRuns:
    return TaskRuns(tasks.load(trial.evaluate), data.load_prepared_tokenizer(prepared), set(steps))


def rows_of(model: torch.nn.Module, runs: TaskRuns, layout: Layout | None = None, **options: Any) -> Any:
    """The rows of `evals` and `items` of one evaluation."""
    found = runs.rows(
        model, 0, layout=layout or Layout(), **{"precision": "fp32", "batch_tokens": 64, **options}
    )
    return [[row for table, row in found if table == name] for name in ("evals", "items")]


# --- the study file ---------------------------------------------------------------------------------------


def test_a_name_and_its_settings_are_the_same_task(study: StudyConfig) -> None:
    plain = replace_fields(study.trial, {"evaluate.tasks": ["piqa"]})
    spelt = replace_fields(study.trial, {"evaluate.tasks": [{"name": "piqa", "num_fewshot": None}]})
    assert plain.sha256 == spelt.sha256
    assert plain.identity()["evaluate"]["tasks"] == [{"name": "piqa"}]
    assert plain.sha256 != study.trial.sha256
    assert "tasks" not in study.trial.identity()["evaluate"], "older studies keep their identity"
    assert TrialConfig.model_validate(plain.model_dump(mode="json")) == plain


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (["piqa", "piqa"], "evaluate.tasks names piqa twice; keep one of them"),
        ([3], "evaluate.tasks[0] = 3 is neither the name of a task nor {name: ..."),
        ([{"name": "piqa", "limits": 3}], '"limits" is not a key in evaluate.tasks[0]; allowed: name'),
        ([{"name": "piqa", "limit": 0}], "evaluate.tasks[0].limit = 0"),
        ([{"name": "piqa", "num_fewshot": -1}], "evaluate.tasks[0].num_fewshot = -1"),
        ([{"limit": 3}], "evaluate.tasks[0].name is missing; add it"),
    ],
)
def test_what_a_study_file_may_not_say_of_tasks(tree: dict[str, Any], tasks: Any, sentence: str) -> None:
    tree["evaluate"]["tasks"] = tasks
    with pytest.raises(ConfigError) as error:
        parse_study(json.dumps(tree), "study.yaml")
    assert sentence in str(error.value)


def test_editors_take_a_name_or_settings() -> None:
    """The schema of the file, by any validator: pydantic's dump of it is what `--schema` prints."""
    items = StudyConfig.model_json_schema()["$defs"]["EvaluateConfig"]["properties"]["tasks"]["items"]
    assert [kind["type"] for kind in items["anyOf"]] == ["string", "object"]


# --- checked before anything starts -----------------------------------------------------------------------


def test_what_is_loaded_says_how_it_is_evaluated(task_dir: Path) -> None:
    found = tasks.check(settings(task_dir, *ALL)).benchmarks
    assert [benchmark.describe() for benchmark in found] == [
        f"{CHOICE}: {NUM_ITEMS[CHOICE]} items, 1 shot, acc_norm",
        f"{TEXT}: 5 items, 0 shots, word_perplexity",
        f"{WORD}: {NUM_ITEMS[WORD]} items, 0 shots, acc",
        f"{SPOKEN}: {NUM_ITEMS[SPOKEN]} items, 0 shots, exact_match",
    ]
    assert [benchmark.higher_is_better for benchmark in found] == [True, False, True, True]
    (group,) = tasks.check(settings(task_dir, {"name": GROUP, "limit": 10})).benchmarks
    assert group.describe() == f"{GROUP}: 19 items of 2 tasks, 0 shots, acc_norm"
    tagged = tasks.check(settings(task_dir, {"name": TAG, "metric": "acc"})).benchmarks
    assert [(one.name, one.metric) for one in tagged] == [(CHOICE, "acc"), (OTHER_CHOICE, "acc")]
    assert tasks.check(EvaluateConfig()).benchmarks == ()


def test_trials_read_only_the_folders_of_the_harness_that_they_need() -> None:
    """Its whole index takes ten seconds and more; a tag, a group and what includes another folder's file."""
    everything = tasks._manager((), include_defaults=True)
    for name in ("arc_easy", "ai2_arc", "mmlu", "paloma_wikitext_103", "truthfulqa_mc2", "anli_r2"):
        known = tasks._folders_of(everything, name)
        assert 0 < len(known) < 10
        settings = EvaluateConfig.model_validate({"tasks": [name]})
        few = tasks._manager_for(settings, 0, settings.tasks[0], sorted(known))
        assert len(few.task_index) < len(everything.task_index) / 2
        assert tasks._knows_its_members(few, name)
        members = {name, *tasks._members(everything.task_index[name])}
        for one in members:
            assert few.task_index[one].yaml_path == everything.task_index[one].yaml_path
            assert few.task_index[one].tags == everything.task_index[one].tags


def odd_tasks(task_dir: Path, folder: Path) -> Path:
    """Tasks that cannot, or must not, be run."""
    import yaml

    folder.mkdir()
    config = yaml.safe_load((task_dir / f"{TEXT}.yaml").read_text())
    write_task(folder, {**config, "task": "unsafe", "unsafe_code": True})
    missing = {"data_files": {"test": str(folder / "gone.jsonl")}}
    write_task(folder, {**config, "task": "without_data", "dataset_kwargs": missing})
    write_task(folder, {**config, "task": "of_no_field", "doc_to_target": "{{nothing.at.all}}"})
    write_task(folder, {**config, "task": "no_shots", "num_fewshot": 0})
    return folder


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("small_choise", 'evaluate.tasks[0] = "small_choise" is not a task, tag or group of lm-evaluation'),
        ("small_choise", 'Did you mean "small_choice"?'),
        ("without_data", 'evaluate.tasks[0] = "without_data" cannot be loaded: FileNotFoundError: '),
        ("of_no_field", 'evaluate.tasks[0] = "of_no_field" cannot be loaded: UndefinedError: '),
        ({"name": CHOICE, "metric": "f1"}, 'metric = "f1" is not one: it has acc, acc_norm; name one of'),
        ({"name": GROUP, "metric": "acc"}, 'metric = "acc" is not one: it has acc_norm; name one of these'),
        ("unsafe", '"unsafe" runs code that the model writes, which raydisp does not do'),
        (
            {"name": "no_shots", "num_fewshot": 2},
            "num_fewshot = 2, but no_shots says itself that it",
        ),
    ],
)
def test_a_task_that_cannot_be_run_is_a_sentence(
    task_dir: Path, tmp_path: Path, entry: Any, sentence: str
) -> None:
    odd = odd_tasks(task_dir, tmp_path / "odd")
    both = EvaluateConfig.model_validate({"tasks": [entry], "task_paths": [str(odd), str(task_dir)]})
    with pytest.raises(ConfigError) as error:
        tasks.check(both)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_tasks_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'evaluate.task_paths: ".*gone" is no folder; relative'):
        tasks.check(settings(tmp_path / "gone", CHOICE))


def test_a_task_in_two_entries_is_refused(task_dir: Path) -> None:
    with pytest.raises(ConfigError, match=f"{CHOICE} belongs to {CHOICE} and to {GROUP}; keep one of them"):
        tasks.check(settings(task_dir, CHOICE, GROUP))


def test_without_the_harness_it_is_one_sentence(tree: dict[str, Any], write_study: WriteStudy) -> None:
    tree["evaluate"]["tasks"] = ["piqa"]
    path = write_study(tree)
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"  # what Python does for a module that is not there
        "from raydisp.study import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "evaluate.tasks needs lm-evaluation-harness, and lm_eval is not installed; "
        "pip install 'raydisp[eval]', or leave the tasks out"
    )
    tree["evaluate"]["tasks"] = []
    write_study(tree)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_without_a_network_a_dry_run_says_what_is_not_checked(
    tree: dict[str, Any], write_study: WriteStudy, tmp_path: Path, task_dir: Path, monkeypatch: Any
) -> None:
    """An empty cache and a hub that does not answer: a note before, a refusal to start."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tree["evaluate"] |= {"tasks": [CHOICE, "piqa"], "task_paths": [str(task_dir)]}
    path = write_study(tree)
    dry = run_command(path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"tasks      {CHOICE}: {NUM_ITEMS[CHOICE]} items, 0 shots, acc_norm\n" in dry.stdout
    assert (
        "piqa is not checked: the hub does not answer, and the local cache does not have its data"
        in dry.stdout
    )
    assert "before and after training" in dry.stdout
    run = run_command(path, "--address", "local")
    assert run.returncode == 2
    assert run.stderr.startswith('evaluate.tasks[1] = "piqa" cannot be loaded: ')
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results" / "tiny" / "trials").exists(), "nothing was started"


# --- the same numbers as the harness alone -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def harness_alone(folder: Path, task_dir: Path, entry: dict[str, Any]) -> Any:
    """What the harness's own function says of a saved model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tasks.quiet():
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder)},
            device="cpu",
            batch_size=3,
            tasks=[entry["name"]],
            num_fewshot=entry.get("num_fewshot"),
            limit=entry.get("limit"),
            task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
            bootstrap_iters=1000,
        )


def save(model: Any, prepared: str, folder: Path) -> Path:
    model.save_pretrained(folder)
    data.load_prepared_tokenizer(prepared).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_tokens", [16, 64, 4096])
@pytest.mark.parametrize("entry", [*ALL, {"name": GROUP, "limit": 10}], ids=lambda entry: str(entry))
def test_a_model_in_training_scores_as_the_harness_scores_it_saved(
    study: StudyConfig, task_dir: Path, cache_dir: str, saved: Path, entry: Any, batch_tokens: int
) -> None:
    entry = {"name": entry} if isinstance(entry, str) else entry
    changes = {"evaluate.tasks": [entry], "evaluate.task_paths": [str(task_dir)]}
    trial = replace_fields(study.trial, changes)
    prepared = data.prepare(trial, cache_dir)
    model = build(trial, prepared).train()
    evals, items = rows_of(model, task_runs(trial, prepared, 0), batch_tokens=batch_tokens)
    assert model.training
    alone = harness_alone(save(model, prepared, saved), task_dir, entry)
    expected = {
        f"{name}/{key.removesuffix(',none')}": value
        for name, told in alone["results"].items()
        for key, value in told.items()
        if "," in key and "_stderr" not in key
    }
    assert {row["name"]: row["value"] for row in evals} == pytest.approx(expected, rel=TOLERANCE)
    assert {row["split"] for row in evals} == {"tasks"}
    counts = {row["name"].split("/")[0]: row["num_items"] for row in evals}
    assert counts == {name: told["sample_len"] for name, told in alone["results"].items()}
    for row in evals:
        name, metric = row["name"].split("/")
        if metric in ("acc", "acc_norm", "exact_match"):  # elsewhere it draws samples, or gives none
            told = alone["results"][name][f"{metric}_stderr,none"]
            assert row["stderr"] == pytest.approx(told, rel=1e-9)
        else:
            assert row["stderr"] > 0
    samples = {(name, sample["doc_id"]): sample for name, told in alone["samples"].items() for sample in told}
    assert {(row["task"], row["item"]) for row in items} == set(samples)
    for row in items:
        raw = samples[row["task"], row["item"]][row["metric"]]
        score = raw if not isinstance(raw, tuple) else -raw[0] / raw[1]
        assert row["value"] == pytest.approx(score, rel=TOLERANCE)
        assert row["weight"] == (raw[1] if isinstance(raw, tuple) else 1.0)
        assert row["benchmark"] == entry["name"]


def test_the_standard_error_of_a_perplexity_is_that_of_its_samples(
    study: StudyConfig, task_dir: Path, cache_dir: str
) -> None:
    """The delta method against the harness's bootstrap: both are approximations, of 11 items."""
    from lm_eval.api.metrics import perplexity

    trial = replace_fields(study.trial, {"evaluate.tasks": [WORD], "evaluate.task_paths": [str(task_dir)]})
    prepared = data.prepare(trial, cache_dir)
    runs = task_runs(trial, prepared, 0)
    evals, _ = rows_of(build(trial, prepared), runs)
    (row,) = [row for row in evals if row["name"] == f"{WORD}/perplexity"]
    draw = np.random.default_rng(0)
    lower = -np.log(row["value"]) + draw.normal(0, 0.3, 400)
    drawn = [perplexity(draw.choice(lower, 400).tolist()) for _ in range(4000)]
    influence = task_scores.influences(-lower, np.ones(400), perplexity(lower.tolist()))
    assert task_scores.standard_error(influence) == pytest.approx(np.std(drawn, ddof=1), rel=0.05)


@pytest.mark.parametrize(
    "changes", [{"model.family": "llama"}, {"model.family": "qwen3"}, {"train.compile": True}]
)
def test_other_models_score_alike(
    study: StudyConfig, task_dir: Path, cache_dir: str, saved: Path, changes: dict[str, Any]
) -> None:
    entry = {"name": CHOICE, "num_fewshot": 0}
    changes |= {"evaluate.tasks": [entry], "evaluate.task_paths": [str(task_dir)]}
    trial = replace_fields(study.trial, changes)
    prepared = data.prepare(trial, cache_dir)
    model = parallelise(build(trial, prepared), Layout(), trial.train, "fp32")
    evals, _ = rows_of(model, task_runs(trial, prepared, 0))
    place = saved / "other"
    plain = build(trial, prepared)
    save(plain, prepared, place)
    told = harness_alone(place, task_dir, entry)["results"][CHOICE]
    assert {row["name"]: row["value"] for row in evals} == {
        f"{CHOICE}/{metric}": told[f"{metric},none"] for metric in ("acc", "acc_norm")
    }


def test_prompts_that_do_not_fit_are_told(study: StudyConfig, task_dir: Path, cache_dir: str) -> None:
    entry = {"name": CHOICE, "num_fewshot": 5}
    trial = replace_fields(study.trial, {"evaluate.tasks": [entry], "evaluate.task_paths": [str(task_dir)]})
    prepared = data.prepare(trial, cache_dir)
    runs = task_runs(trial, prepared, 0)
    rows_of(build(trial, prepared), runs)
    rows_of(build(trial, prepared), runs)
    assert runs.notes == [f"prompts of {CHOICE} lost their beginning: the model reads 16 tokens"]


def test_the_same_items_at_every_evaluation(study: StudyConfig, task_dir: Path, cache_dir: str) -> None:
    """Examples are drawn anew in the same way, so that prompts do not change from step to step."""
    entry = {"name": CHOICE, "num_fewshot": 1}
    trial = replace_fields(study.trial, {"evaluate.tasks": [entry], "evaluate.task_paths": [str(task_dir)]})
    prepared = data.prepare(trial, cache_dir)
    model, runs = build(trial, prepared), task_runs(trial, prepared, 0)
    first, second = rows_of(model, runs), rows_of(model, runs)
    assert first == second
    other = replace_fields(trial, {"evaluate.tasks": [{"name": CHOICE, "num_fewshot": 0}]})
    plain = rows_of(model, task_runs(other, prepared, 0))
    contents = [{row["item"]: row["content"] for row in items} for _, items in (first, plain)]
    assert contents[0].keys() == contents[1].keys()
    assert not {*contents[0].values()} & {*contents[1].values()}, "another prompt is another item"


# --- whatever the layout ---------------------------------------------------------------------------------


def _worker(rank: int, port: int, trees: dict[str, Any], prepared: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layout = Layout(rank, 2)
    try:
        for name, tree in trees.items():
            trial = TrialConfig.model_validate(tree)
            model = parallelise(build(trial, prepared), layout, trial.train, "fp32")
            found = rows_of(model, task_runs(trial, prepared, 0), layout)
            (Path(out) / f"{name}-{rank}.json").write_text(json.dumps(found))
            result = _train(trial, model=None, layout=layout, prepared=prepared)
            (Path(out) / f"{name}-losses-{rank}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


class Rows:
    """Keeps rows in memory."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.tables.setdefault(table, []).append(row)

    def flush(self, step: int) -> None:
        pass


def _train(
    trial: TrialConfig, model: Any, layout: Layout, prepared: str, *, with_tasks: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """Train, and what rows there were."""
    rows = Rows()
    train(
        build(trial, prepared) if model is None else model,
        data.TokenBlocks(prepared, "train"),
        data.TokenBlocks(prepared, "validation"),
        trial,
        layout=layout,
        rows=rows,
        benchmarks=task_runs(trial, prepared, 0, 8, trial.num_steps) if with_tasks else None,
    )
    times = ("elapsed_s",)
    return {
        table: [{name: value for name, value in row.items() if name not in times} for row in found]
        for table, found in rows.tables.items()
    }


@pytest.mark.processes
def test_two_workers_give_the_rows_of_one(
    study: StudyConfig, task_dir: Path, cache_dir: str, tmp_path: Path
) -> None:
    """DDP and FSDP2, all kinds of requests: workers with different numbers of forward passes keep step."""
    changes = {"evaluate.tasks": ALL, "evaluate.task_paths": [str(task_dir)]}
    trial = replace_fields(study.trial, changes)
    prepared = data.prepare(trial, cache_dir)
    trees = {
        strategy: replace_fields(trial, {"train.strategy": strategy}).model_dump(mode="json")
        for strategy in ("ddp", "fsdp")
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, trees, prepared, str(tmp_path)), nprocs=2)
    evals, items = rows_of(build(trial, prepared), task_runs(trial, prepared, 0))
    alone = _train(trial, None, Layout(), prepared)
    for strategy in trees:
        for rank in range(2):
            found = json.loads((tmp_path / f"{strategy}-{rank}.json").read_text())
            for ours, theirs in zip(found, (evals, items), strict=True):
                assert len(ours) == len(theirs)
                for row, expected in zip(ours, theirs, strict=True):
                    for name, value in expected.items():
                        number = isinstance(value, float)
                        assert row[name] == (pytest.approx(value, rel=TOLERANCE) if number else value)
            trained = json.loads((tmp_path / f"{strategy}-losses-{rank}.json").read_text())
            losses = [[row["lm_loss"] for row in told["steps"]] for told in (trained, alone)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- in a training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.dropout": 0.2, "noisy_embedding.alpha": 5.0, "train.compile": False},
        {"train.activation_checkpointing": True},
    ],
)
def test_the_training_is_the_same_with_and_without_tasks(
    study: StudyConfig, task_dir: Path, cache_dir: str, changes: dict[str, Any]
) -> None:
    """To the bit, dropout included; and the generators are where they were."""
    changes = {**changes, "evaluate.tasks": ALL, "evaluate.task_paths": [str(task_dir)]}
    trial = replace_fields(study.trial, changes)
    prepared = data.prepare(trial, cache_dir)
    found = []
    for with_tasks in (False, True):
        torch.manual_seed(5)
        np.random.seed(5)
        trained = _train(trial, None, Layout(), prepared, with_tasks=with_tasks)
        found.append((trained, torch.rand(3).tolist(), np.random.rand(3).tolist()))
    without, with_them = found
    assert without[1:] == with_them[1:]
    for table in ("steps", "layers"):
        assert without[0][table] == with_them[0][table]
    rows = with_them[0]
    assert [row for row in rows["evals"] if row["split"] != "tasks"] == without[0]["evals"]
    told = {row["step"] for row in rows["evals"] if row["split"] == "tasks"}
    assert told == {row["step"] for row in rows["items"]} == {0, 8, 10}
    assert all(row["num_tokens"] == row["step"] * 128 for row in rows["items"])


def test_a_trial_is_evaluated_at_the_start_at_rungs_and_at_the_end(
    tree: dict[str, Any], task_dir: Path, tmp_path: Path, cache_dir: str
) -> None:
    tree["evaluate"] |= {"every_tokens": 256, "tasks": [CHOICE, TEXT], "task_paths": [str(task_dir)]}
    tree["search"]["scheduler"] = {"asha": {"grace_tokens": 256, "reduction_factor": 3}}
    tree["checkpoint"] = {"every_tokens": 256}
    row = run_attempt(assign(tree, tmp_path, cache_dir), lambda metrics: None)
    assert row["status"] == "completed", row["error_message"]
    folder = str(tmp_path / "results")
    evals, items = results.read_table(folder, "evals"), results.read_table(folder, "items")
    assert items.schema == results.ITEM_SCHEMA
    steps = {row["step"] for row in evals.to_pylist() if row["split"] == "tasks"}
    assert steps == {*items["step"].to_pylist()} == {0, 2, 6, 10}
    assert items.num_rows == 4 * (NUM_ITEMS[CHOICE] + NUM_ITEMS[TEXT])
    assert {*items["benchmark"].to_pylist()} == {CHOICE, TEXT}
    # One that goes on from step 4 drops what came after it, and measures it anew, the same.
    again = run_attempt(assign(tree, tmp_path, cache_dir, attempt=2), lambda metrics: None)
    assert again["status"] == "completed"
    assert again["resumed_step"] == 0, "a trial that has ended keeps no checkpoint: this one began anew"
    anew = results.read_table(folder, "items")
    assert {*anew["attempt"].to_pylist()} == {2}
    assert anew.drop_columns(["attempt"]).equals(items.drop_columns(["attempt"]))
    # A compaction keeps every row.
    compact(folder)
    assert results.read_table(folder, "items").equals(anew)
    # Confirm runs are not stopped: no rungs.
    run = assign(
        tree, tmp_path, cache_dir, trial=7, phase="confirm", arm="x", confirm_json="{}", keep_model=True
    )
    row = run_attempt(run, lambda metrics: None)
    assert row["status"] == "completed", row["error_message"]
    confirmed = results.read_table(folder, "items", trial=7)
    assert {*confirmed["step"].to_pylist()} == {0, 10}
    final = results.read_tables(folder).items
    assert {*final["trial"].to_pylist()} == {7}
    assert {*final["step"].to_pylist()} == {10}
    kept = tmp_path / "results" / "models" / "trial-00007"
    alone = harness_alone(kept, task_dir, {"name": TEXT})["results"][TEXT]
    (value,) = [
        one["value"]
        for one in results.read_table(folder, "evals", trial=7).to_pylist()
        if one["step"] == 10 and one["name"] == f"{TEXT}/word_perplexity"
    ]
    assert value == pytest.approx(alone["word_perplexity,none"], rel=TOLERANCE)


def test_a_task_that_breaks_in_a_trial_fails_it(
    tree: dict[str, Any], task_dir: Path, tmp_path: Path, cache_dir: str
) -> None:
    """A continuation longer than the model's context: only a model shows it."""
    import yaml

    odd = tmp_path / "odd"
    odd.mkdir()
    config = yaml.safe_load((task_dir / f"{WORD}.yaml").read_text())
    write_task(odd, {**config, "task": "too_long", "doc_to_target": "{{text + ' ' + text + ' ' + text}}"})
    tree["evaluate"] |= {"tasks": ["too_long"], "task_paths": [str(odd)]}
    row = run_attempt(assign(tree, tmp_path, cache_dir), lambda metrics: None)
    assert row["status"] == "failed"
    assert row["error_type"] == "TaskError"
    assert row["error_message"].startswith("too_long cannot be evaluated: ")
    assert results.read_trial(str(tmp_path / "results"), 1, 1)["val_loss"] is None


def test_the_harness_is_quiet(
    study: StudyConfig, task_dir: Path, cache_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trial = replace_fields(study.trial, {"evaluate.tasks": ALL, "evaluate.task_paths": [str(task_dir)]})
    prepared = data.prepare(trial, cache_dir)
    tasks._load.cache_clear()
    capfd.readouterr()
    rows_of(build(trial, prepared), task_runs(trial, prepared, 0))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_value_that_is_no_mean_has_no_influences() -> None:
    assert task_scores.influences([0.0, 1.0], [1.0, 1.0], 0.7) is None
    assert task_scores.influences([], [], 0.7) is None
    assert task_scores.influences([0.0, math.nan], [1.0, 1.0], 0.5) is None
    assert task_scores.standard_error([0.1]) is None


def test_standard_errors_of_means_and_ratios() -> None:
    draw = np.random.default_rng(1)
    scores, weights = draw.normal(2.0, 0.5, 60), draw.integers(3, 40, 60).astype(float)
    plain = task_scores.influences(scores, np.ones(60), float(scores.mean()))
    assert task_scores.standard_error(plain) == pytest.approx(scores.std(ddof=1) / math.sqrt(60))
    value = float((scores * weights).sum() / weights.sum())
    ratio = task_scores.influences(scores, weights, value)
    assert sum(ratio) == pytest.approx(0.0, abs=1e-12)
    # The jackknife of the same ratio: another first-order approximation.
    left_out = [
        (np.delete(scores * weights, i).sum()) / np.delete(weights, i).sum() for i in range(len(scores))
    ]
    jackknife = math.sqrt(59 / 60 * ((left_out - np.mean(left_out)) ** 2).sum())
    assert task_scores.standard_error(ratio) == pytest.approx(jackknife, rel=0.05)
    perplexity = task_scores.influences(scores, weights, math.exp(value))
    assert task_scores.standard_error(perplexity) == pytest.approx(
        math.exp(value) * task_scores.standard_error(ratio)
    )
