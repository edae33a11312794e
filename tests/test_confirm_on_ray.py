"""A whole study of arms on a real Ray: search, frozen plan, paired runs, verdict, exported model."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import run_command, start_command
from test_on_ray import attempts_of, descendants, left_on_cluster, wait_for, write
from test_search_on_ray import kill

from raydisp import results, verdict
from raydisp.config import TrialConfig
from raydisp.verdict import VERDICT_SCHEMA

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SAME = ("initial_weights_sha256", "first_batch_sha256", "last_batch_sha256")
NUM_SEEDS = 3
SEARCHED = ("baseline", "dispersion")


def command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"raydisp.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def arms_study(tree: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["train"]["budget_tokens"] = 128 * 20
    tree["search"] = {
        "num_trials": 2,
        "space": {"train.learning_rate": {"low": 3e-3, "high": 3e-2, "log": True}},
        "sampler": "random",
    }
    tree["arms"] = {
        "baseline": {"dispersion.weight": 0},
        "dispersion": {"dispersion.weight": {"low": 0.1, "high": 1.0}},
        "noisy": {"dispersion.weight": 0, "noisy_embedding.alpha": 5.0, "train.learning_rate": 0.01},
        "forgetting": {
            "dispersion.weight": 0,
            "active_forgetting.every_steps": 5,
            "active_forgetting.learning_rate": 0.01,
            "train.learning_rate": 0.01,
        },
    }
    tree["confirm"] = {"num_seeds": NUM_SEEDS, "smallest_effect": 0.05}
    tree["resources"] = {}
    return tree


@dataclasses.dataclass(frozen=True)
class Confirmed:
    tree: dict[str, Any]
    path: Path
    folder: Path
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the confirm phase."""
        return [row for row in attempts_of(self.tree) if row["phase"] == "confirm"]


@pytest.fixture(scope="module")
def confirmed(address: str, tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Confirmed:
    folder = tmp_path_factory.mktemp("confirmed")
    tree = arms_study(
        {
            "name": "armed",
            "seed": 3,
            "model": {
                "source": "scratch",
                "num_layers": 2,
                "hidden_size": 16,
                "num_heads": 2,
                "vocab_size": 320,
            },
            "data": {"source": "files", "paths": [str(corpus_dir / "*.txt")], "context_length": 16},
            "train": {"budget_tokens": 2560, "global_batch_tokens": 128, "learning_rate": 0.01},
            "evaluate": {"every_tokens": 1280, "max_tokens": 256},
        }
    )
    path = write(tree, folder / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    return Confirmed(tree, path, folder / "out" / "armed", done.stdout, done.stderr)


def test_every_arm_runs_on_every_seed_after_a_frozen_plan(confirmed: Confirmed) -> None:
    frozen = yaml.safe_load((confirmed.folder / "confirm.yaml").read_text())
    rows = confirmed.rows
    assert list(frozen["arms"]) == list(confirmed.tree["arms"])
    pairs = [(row["arm"], row["seed"]) for row in rows]
    assert sorted(pairs) == sorted((arm, seed) for arm in frozen["arms"] for seed in frozen["seeds"])
    assert frozen["seeds"] == [4, 5, 6]
    assert {row["status"] for row in rows} == {"completed"}
    assert {row["num_tokens"] for row in rows} == {2560}, "no scheduler, the full budget"
    first = min(row["started_at"] for row in rows)
    assert yaml.safe_load(f"x: {frozen['frozen_at']}")["x"] <= first, "the plan came before the runs"
    for row in rows:
        assert row["test_loss"] > 0
        assert row["test_loss"] != row["val_loss"]
        assert json.loads(row["confirm_json"]) == frozen
        config = TrialConfig.model_validate(json.loads(row["config_json"]))
        for name, value in frozen["arms"][row["arm"]]["values"].items():
            part, field = name.split(".")
            assert getattr(getattr(config, part), field) == value
        assert config.seed == row["seed"]
    searched = [row for row in attempts_of(confirmed.tree) if row["phase"] == "search"]
    assert len(searched) == 2 * len(SEARCHED) + 2
    assert {row["test_loss"] for row in searched} == {None}, "the search does not see the test text"
    assert left_on_cluster() == {"actors": [], "placement_groups": []}


def test_pairs_have_the_same_weights_and_batches(confirmed: Confirmed) -> None:
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for row in confirmed.rows:
        by_seed.setdefault(row["seed"], []).append(row)
    assert {len(rows) for rows in by_seed.values()} == {4}
    for column in SAME:
        found = [{row[column] for row in rows} for rows in by_seed.values()]
        assert [len(values) for values in found] == [1] * NUM_SEEDS, "the same in all arms of a seed"
        assert len(set.union(*found)) == NUM_SEEDS, "another with each seed"
        assert None not in set.union(*found)


def test_the_best_of_each_searched_arm_was_taken(confirmed: Confirmed) -> None:
    frozen = yaml.safe_load((confirmed.folder / "confirm.yaml").read_text())
    rows = [row for row in attempts_of(confirmed.tree) if row["phase"] == "search"]
    for arm in SEARCHED:
        best = min((row for row in rows if row["arm"] == arm), key=lambda row: row["val_loss"])
        assert frozen["arms"][arm]["from_trial"] == best["trial"]
    assert frozen["arms"]["noisy"]["from_trial"] is None


def test_the_verdict_is_told_written_and_made_anew_from_rows_alone(
    confirmed: Confirmed, tmp_path: Path
) -> None:
    trials = results.read_tables(str(confirmed.folder)).trials
    for sentence in verdict.sentences(trials):
        assert sentence in confirmed.stdout
    written = pq.read_table(confirmed.folder / "verdicts" / "verdicts.parquet")
    assert written.schema.names == VERDICT_SCHEMA.names
    assert written["arm"].to_pylist() == ["dispersion", "noisy", "forgetting"]
    assert written["num_pairs"].to_pylist() == [NUM_SEEDS] * 3
    page = (confirmed.folder / "report.html").read_text()
    assert "Paired differences" in page
    assert "The search that came before" in page
    # From the Parquet files alone: no study.yaml, no confirm.yaml, no database.
    alone = tmp_path / "alone"
    (alone / "trials").mkdir(parents=True)
    for file in (confirmed.folder / "trials").glob("*.parquet"):
        (alone / "trials" / file.name).write_bytes(file.read_bytes())
    told = command("verdict", alone)
    assert told.returncode == 0, told.stderr
    for sentence in verdict.sentences(trials):
        assert sentence in told.stdout
    again = pq.read_table(alone / "verdicts" / "verdicts.parquet")
    assert again.drop_columns(["sentence"]).equals(written.drop_columns(["sentence"]))


def test_the_same_command_has_nothing_left_to_do(confirmed: Confirmed, address: str) -> None:
    before = attempts_of(confirmed.tree)
    again = run_command(confirmed.path, "--address", address)
    assert again.returncode == 0, again.stderr
    assert "All 18 trials are done already." in again.stdout
    assert attempts_of(confirmed.tree) == before
    more = run_command(confirmed.path, "--address", address, "--set", "search.num_trials=5")
    assert more.returncode == 2
    assert "search.num_trials (2 -> 5)" in more.stderr
    assert "Traceback" not in more.stderr


def test_an_exported_model_is_the_one_that_was_measured(confirmed: Confirmed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    frozen = yaml.safe_load((confirmed.folder / "confirm.yaml").read_text())
    kept = sorted(path.name for path in (confirmed.folder / "models").iterdir())
    assert len(kept) == 4, "of the first seed, every arm's"
    done = command("export", confirmed.folder, "--arm", "dispersion", "--to", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    (row,) = [
        row for row in confirmed.rows if (row["arm"], row["seed"]) == ("dispersion", frozen["seeds"][0])
    ]
    assert loss_over_the_test_split(model, confirmed.tree, row) == pytest.approx(row["test_loss"], rel=1e-5)
    assert tokenizer("the cat sat").input_ids
    card = (tmp_path / "exported" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert f"{row['test_loss']:.4f}" in card
    assert row["data_sha256"] in card
    assert "dispersion" in card.split("## Verdict")[1]
    again = command("export", confirmed.folder, "--to", tmp_path / "exported")
    assert again.returncode == 2
    assert "is there already" in again.stderr


def loss_over_the_test_split(model: Any, tree: dict[str, Any], row: dict[str, Any]) -> float:
    """The loss over the test split by a plain loop."""
    from raydisp import data

    trial = TrialConfig.model_validate(json.loads(row["config_json"]))
    prepared = data.find_prepared(trial, data.cache_folder(tree["output"]))
    assert prepared is not None
    blocks = data.TokenBlocks(prepared, "test")
    ids = blocks[list(range(len(blocks)))]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arm", "nosy"], "--arm nosy is not an arm of"),
        (["--arm", "noisy", "--seed", "99"], "--seed 99 is not a seed of the plan; there are 4, 5, 6"),
        (["--arm", "noisy", "--seed", "5"], "kept are those of seeds 4"),
    ],
    ids=["no such arm", "no such seed", "not kept"],
)
def test_what_cannot_be_exported(
    confirmed: Confirmed, tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = command("export", confirmed.folder, *arguments, "--to", tmp_path / "x")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_not_exported(confirmed: Confirmed, tmp_path: Path) -> None:
    place = min((confirmed.folder / "models").iterdir())
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = command("export", confirmed.folder, "--arm", "baseline", "--to", tmp_path / "x")
    finally:
        weights.write_bytes(whole)
    assert done.returncode == 2
    assert "model.safetensors is damaged" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_driver_is_killed_in_the_confirm_phase(tree: dict[str, Any], tmp_path: Path) -> None:
    """And its Ray, past a checkpoint of a run: the plan stays, finished runs too, the others go on."""
    tree["train"]["budget_tokens"] = 128 * 400
    tree["evaluate"]["every_tokens"] = 128 * 25
    tree["checkpoint"] = {"every_tokens": 128 * 50}
    tree["search"] = {
        "num_trials": 1,
        "space": {"dispersion.weight": {"low": 0.1, "high": 1.0}},
        "sampler": "random",
    }
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    tree["resources"] = {"max_concurrent_trials": 2}
    path = write(tree, tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    process = start_command(path, "--address", "local")
    try:
        wait_for(lambda: list(folder.glob("checkpoints/trial-00004/*/COMPLETE")))
        wait_for(lambda: len(list(folder.glob("steps/trial-00004/*.parquet"))) >= 4)
        family = [process, *descendants(process.pid)]
    finally:
        for one in family:
            kill(one.pid)
    process.communicate(timeout=60)
    psutil.wait_procs(family[1:], timeout=20)
    plan = (folder / "confirm.yaml").read_bytes()
    before = {row["trial"]: row for row in attempts_of(tree)}
    assert before[4]["status"] == "interrupted"
    finished = {number: row for number, row in before.items() if row["status"] == "completed"}
    assert {0, 1} <= set(finished)

    done = run_command(path, "--address", "local")
    assert done.returncode == 0, done.stderr
    assert (folder / "confirm.yaml").read_bytes() == plan
    latest = {row["trial"]: row for row in results.read_tables(str(folder)).trials.to_pylist()}
    assert sorted(latest) == [0, 1, 2, 3, 4, 5]
    assert {row["status"] for row in latest.values()} == {"completed"}
    for number, row in finished.items():
        assert latest[number] == row
    assert latest[4]["attempt"] == 2
    assert latest[4]["resumed_step"] >= 50
    assert [(latest[n]["arm"], latest[n]["seed"]) for n in (2, 3, 4, 5)] == [
        ("baseline", 4),
        ("dispersion", 4),
        ("baseline", 5),
        ("dispersion", 5),
    ]
    steps = results.read_table(str(folder), "steps").to_pylist()
    for number in latest:
        assert [row["step"] for row in steps if row["trial"] == number] == list(range(1, 401))
    for seed in ((2, 3), (4, 5)):
        for column in SAME:
            assert latest[seed[0]][column] == latest[seed[1]][column] is not None
    assert "n = 2 pairs" in done.stdout


def test_two_workers_with_shards_confirm_and_keep_alike(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    from transformers import AutoModelForCausalLM

    tree["train"] |= {"strategy": "fsdp", "learning_rate": 0.002}
    tree["search"] = {"num_trials": 1, "space": {"dispersion.weight": [0.3]}, "sampler": "random"}
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    tree["resources"] = {"num_workers": 2}
    path = write(tree, tmp_path / "out")
    done = run_command(path, "--address", address)
    assert done.returncode == 0, done.stderr
    rows = [row for row in attempts_of(tree) if row["phase"] == "confirm"]
    assert [(row["status"], row["world_size"], row["strategy"]) for row in rows] == [
        ("completed", 2, "fsdp")
    ] * 4
    for first, second in ((rows[0], rows[1]), (rows[2], rows[3])):
        for column in SAME:
            assert first[column] == second[column] is not None
    folder = tmp_path / "out" / "tiny"
    told = command("export", folder, "--arm", "dispersion", "--to", tmp_path / "exported")
    assert told.returncode == 0, told.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    loss = loss_over_the_test_split(model, tree, rows[1])
    assert loss == pytest.approx(rows[1]["test_loss"], rel=1e-5)


def test_data_that_changed_between_search_and_confirm_are_refused(
    tree: dict[str, Any], tmp_path: Path, address: str
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in Path(tree["data"]["paths"][0]).parent.glob("*.txt"):
        (texts / file.name).write_bytes(file.read_bytes())
    tree["data"]["paths"] = [str(texts / "*.txt")]
    tree["search"] = {"num_trials": 1, "space": {"dispersion.weight": [0.3]}, "sampler": "random"}
    path = write(tree, tmp_path / "out")
    assert run_command(path, "--address", address).returncode == 0
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    write(tree, tmp_path / "out")
    (texts / "00.txt").write_text("another text " * 100)
    done = run_command(path, "--address", address)
    assert done.returncode == 2
    assert "data_sha256" in done.stderr
    assert "the data changed, and new trials would not compare with the old" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["phase"] for row in attempts_of(tree)] == ["search"] * 2


def test_a_search_that_failed_is_not_confirmed(tree: dict[str, Any], tmp_path: Path, address: str) -> None:
    tree["train"]["grad_clip"] = None
    tree["search"] = {
        "num_trials": 2,
        "space": {"train.learning_rate": [1e30], "dispersion.weight": [0.3, 0.5]},
        "sampler": "random",
    }
    tree["confirm"] = {"num_seeds": 2, "smallest_effect": 0.05}
    path = write(tree, tmp_path / "out")
    for _ in range(2):  # the second time before Ray is asked
        done = run_command(path, "--address", address)
        assert done.returncode == 1, done.stderr
        assert "The confirm phase did not run: no trial of the search completed" in done.stdout
        assert "2 diverged" in done.stdout
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "tiny" / "confirm.yaml").exists()
