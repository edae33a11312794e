"""The command line without Ray: plans, schemas, and an answer to every wrong input before anything starts."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from conftest import WriteStudy, run_command
from tiny_models import write_gguf

from raydisp import data, results, storage
from raydisp.__main__ import main as raydisp_main
from raydisp.cluster.packing import Plan
from raydisp.config import StudyConfig
from raydisp.config.model import GgufModel
from raydisp.errors import OutputError
from raydisp.launch import refuse_other_content
from raydisp.search import space
from raydisp.search.agenda import read_agenda
from raydisp.search.on_tune import Launch
from raydisp.study import main
from raydisp.studyfile import dump_study, load_study

STUDIES = sorted(Path(__file__).parent.parent.glob("studies/*.yaml"))


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model hub, and nothing of it on this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_file_has_a_plan_without_a_network(
    path: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    offline: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = load_study(path)
    command = [str(path), "--dry-run", "--output", str(tmp_path / "out"), "--address", "local"]
    if isinstance(study.model, GgufModel):  # a file that the user fetches
        stand_in = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", context_length=1024)
        command += ["--set", f"model.path={stand_in}"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"study      {path.stem} -> {tmp_path / 'out' / path.stem}" in told.out
    for part in ("model", "data"):
        unchecked = "from the hub" in next(row for row in told.out.splitlines() if row.startswith(part))
        assert unchecked == (getattr(study, part).source == "hub")
        assert unchecked == bool(re.search(rf"{part}\.(id|path) = .* the hub does not answer", told.out))
    assert told.err == ""
    assert list(tmp_path.iterdir()) == []
    assert not ray.is_initialized()


def test_a_study_that_is_run_needs_the_hub(
    tree: dict[str, Any], tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tree["model"] = {"source": "hub", "id": "some-one/absent"}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert main([str(file), "--address", "local"]) == 2
    assert "the hub does not answer" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_schema_is_a_schema(capsys: pytest.CaptureFixture[str], tree: dict[str, Any]) -> None:
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(tree, schema)
    tree["train"]["lerning_rate"] = 1.0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema)


def edit(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split("/")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key", {"train/lr": 0.1}, '"lr" is not a key in train'),
    ("wrong type", {"train/learning_rate": "fast"}, 'train.learning_rate = "fast" is not a number'),
    ("out of range", {"dispersion/weight": -1.0}, "dispersion.weight = -1.0 is not at least 0.0"),
    ("empty space", {"search/space": {}}, "there is nothing to search"),
    ("no such field", {"search/space": {"dispersion.wight": [1]}}, 'Did you mean "dispersion.weight"?'),
    ("a glob without files", {"data/paths": ["nowhere/*.txt"]}, "nowhere/*.txt"),
    ("a model that is not there", {"model": {"source": "path", "path": "nowhere"}}, "nowhere"),
    (
        "a hub that does not answer",
        {"model": {"source": "hub", "id": "raydisp-test/no-such-model"}},
        "raydisp-test/no-such-model",
    ),
    ("more GPUs than exist", {"resources/gpus_per_worker": 64}, "needs 1 CPU and 64 GPUs"),
    ("more CPUs than exist", {"resources/cpus_per_worker": 1000}, "needs 1000 CPUs"),
    ("an output that takes no file", {"output": "/proc/raydisp"}, "/proc/raydisp"),
    ("an output that is no place", {"output": "foo://bar"}, "foo://bar/tiny/study.yaml cannot be reached"),
    ("an output with a null", {"output": "a\0b"}, "it holds a null character"),
    (
        "a budget that varies",
        {"search/space": {"train.budget_tokens": [1280, 2560]}},
        "is the same in all trials",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_gets_one_sentence_and_nothing_starts(
    tree: dict[str, Any],
    write_study: WriteStudy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for dotted, value in changes.items():
        edit(tree, dotted, value)
    path = write_study(tree)
    started = time.monotonic()
    assert main([str(path)]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert "Traceback" not in told.err
    assert told.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["study.yaml"], "nothing was written"
    assert not ray.is_initialized()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        ({}, "matches no file"),
        ({"a.txt": ""}, "holds no text"),
        ({f"{n}.txt": f"word{n}" for n in range(300)}, "data.context_length = 1024"),
    ],
    ids=["nothing", "an empty file", "shorter than a block"],
)
def test_a_corpus_that_is_too_small(
    tree: dict[str, Any],
    write_study: WriteStudy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    corpus: dict[str, str],
    sentence: str,
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in corpus.items():
        (folder / name).write_text(text)
    tree["data"].update(paths=[str(folder / "*.txt")], context_length=1024)
    tree["train"]["global_batch_tokens"] = 1024
    tree["evaluate"] = {}
    assert main([str(write_study(tree))]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "results").exists()
    assert not ray.is_initialized()


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err == (
        "nowhere.yaml: there is no such file; give the path of a study file"
        + _rest_of(capsys, "nowhere.yaml")
        + "\n"
    )


def _rest_of(capsys: pytest.CaptureFixture[str], path: str) -> str:
    """The folder's own YAML files are offered, whichever the tests were started in."""
    files = sorted(file.name for file in Path().glob("*.y*ml"))
    return f" (in . there are {', '.join(files[:5])})" if files else ""


def test_as_a_process_with_a_mistake(tmp_path: Path) -> None:
    done = run_command(tmp_path / "nowhere.yaml", timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{tmp_path}/nowhere.yaml: there is no such file")
    assert "Traceback" not in done.stderr


def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "give a study file" in capsys.readouterr().err


def finished(study: StudyConfig, study_dir: str, trial: int) -> dict[str, Any]:
    """A row as a finished trial leaves it."""
    config = study.trial.model_dump(mode="json")
    row = {
        "study": study.name,
        "phase": "search",
        "trial": trial,
        "attempt": 1,
        "arm": "baseline" if trial == 0 else "search",
        "status": "completed",
        "seed": study.seed,
        "config_json": json.dumps(config),
        "num_tokens": 1280,
        "val_loss": 5.0 - trial / 10,
        "layer_cosine_mean": 0.5,
    }
    for name, column in space.column_types(study).items():
        row[name] = space.column_value({"dispersion.weight": 0.3, "dispersion.layers": "all"}[name], column)
    results.write_trial(study_dir, row, space.column_types(study))
    return row


@pytest.fixture
def done(study: StudyConfig) -> Path:
    """A results folder in which every trial is finished."""
    study_dir = storage.join(study.output, study.name)
    storage.write_bytes(storage.join(study_dir, "study.yaml"), dump_study(study).encode())
    for trial in range(4):
        finished(study, study_dir, trial)
    return Path(study_dir)


def test_a_finished_study_says_so_and_rebuilds_its_report(
    tree: dict[str, Any], write_study: WriteStudy, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_study(tree))]) == 0
    told = capsys.readouterr().out
    assert "All 4 trials are done already." in told
    assert "Best of 3: trial 3 with val_loss 4.700" in told
    assert f"4 completed; see {done}" in told
    assert (done / "report.html").stat().st_size > 10_000
    assert not ray.is_initialized()


def test_a_study_that_changed_is_refused(
    tree: dict[str, Any], write_study: WriteStudy, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    tree["train"]["learning_rate"] = 0.02
    assert main([str(write_study(tree))]) == 2
    assert "differs from this one in train.learning_rate (0.01 -> 0.02)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name: [", b"a: &a [*a]"])
def test_a_study_yaml_that_is_none(
    tree: dict[str, Any],
    write_study: WriteStudy,
    done: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    (done / "study.yaml").write_bytes(content)
    assert main([str(write_study(tree))]) == 2
    assert "study.yaml" in capsys.readouterr().err
    assert (done / "study.yaml").read_bytes() == content


def test_changed_data_are_refused(study: StudyConfig, done: Path, tmp_path: Path) -> None:
    prepared = data.prepare(study.trial, str(tmp_path / "cache"))
    found = data.read_meta(prepared)["data_sha256"]
    launch = Launch(
        study, str(done), "", "", prepared, "abc", "0", {}, Plan(1, 1.0, 0.0, 1), data_sha256=found
    )
    agenda = read_agenda(study, str(done))
    refuse_other_content(launch, agenda)  # rows that do not know their data are left alone
    agenda.finished[1]["data_sha256"] = data.read_meta(prepared)["data_sha256"]
    agenda.finished[1]["model_revision"] = "abc"
    refuse_other_content(launch, agenda)
    agenda.finished[2]["model_revision"] = "abd"
    with pytest.raises(
        OutputError, match="trial 2 has model_revision abd, and now it is abc: the model changed"
    ):
        refuse_other_content(launch, agenda)
    agenda.finished[1]["data_sha256"] = "other"
    with pytest.raises(
        OutputError, match=r"trial 1 has data_sha256 other, and now it is \w+: the data changed"
    ):
        refuse_other_content(launch, agenda)


def test_a_failed_trial_makes_the_exit_status_1(
    study: StudyConfig,
    tree: dict[str, Any],
    write_study: WriteStudy,
    done: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = finished(study, str(done), 2)
    row.update(status="failed", val_loss=None, error_type="RuntimeError", error_message="out of memory")
    results.write_trial(str(done), row, space.column_types(study))
    assert main([str(write_study(tree))]) == 1
    assert "3 completed, 1 failed (trial 2: out of memory)" in capsys.readouterr().out


def test_the_console_script_gives_the_same_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert raydisp_main(["study", "nowhere.yaml"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert raydisp_main(["report", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert raydisp_main(["sudy"]) == 2
    assert 'Did you mean "study"?' in capsys.readouterr().err
    assert raydisp_main(["--help"]) == 0
    assert "study" in capsys.readouterr().out
    assert raydisp_main(["--version"]) == 0


def test_a_resolved_study_file_can_be_run_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yaml.safe_load((done / "study.yaml").read_text())["train"]["beta2"] == 0.95
    assert main([str(done / "study.yaml")]) == 0
