"""Trackers without Ray: what the study file may say, what they are told, and that they harm nobody."""

from __future__ import annotations

import copy
import importlib.util
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import WriteStudy

from raydisp import study as command
from raydisp import trackers
from raydisp.config import StudyConfig
from raydisp.config import trackers as trackers_config
from raydisp.config.trackers import check_trackers, name_of, settings_of
from raydisp.errors import ConfigError
from raydisp.studyfile import differences, dump_study, load_study, parse_study
from raydisp.trackers import Tracker, metrics_of, redact

Tree = dict[str, Any]

# --- the study file ------------------------------------------------------------------------------------


def parsed(tree: Tree, entries: Any) -> StudyConfig:
    return parse_study(yaml.safe_dump({**tree, "trackers": entries}), "x.yaml")


def test_words_and_settings(tree: Tree):
    study = parsed(tree, ["tensorboard", {"mlflow": {"experiment": "mine"}}, {"wandb": {"project": "p"}}])
    assert [name_of(entry) for entry in study.trackers] == ["tensorboard", "mlflow", "wandb"]
    found = [settings_of(entry).model_dump() for entry in study.trackers]
    assert found == [
        {"dir": None},
        {"tracking_uri": None, "experiment": "mine"},
        {"project": "p", "mode": "offline", "dir": None},
    ]
    again = parse_study(dump_study(study), "study.yaml")
    assert again == study
    assert parsed(tree, []).trackers == []


def test_by_override(tree: Tree, write_study: WriteStudy):
    study = load_study(write_study(tree), ["trackers=[tensorboard, {wandb: {mode: online}}]"])
    assert [name_of(entry) for entry in study.trackers] == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["tensorbord"], 'trackers[0] = "tensorbord" is not one of tensorboard, mlflow, wandb, alone or'),
        (["tensorbord"], 'Did you mean "tensorboard"?'),
        ([{"mlflow": {}, "wandb": {}}], "is not one of tensorboard, mlflow, wandb"),
        ([3], "trackers[0] = 3 is not one of"),
        ("tensorboard", 'trackers = "tensorboard" is not a list'),
        ([{"mlflow": None}], "trackers[0].mlflow = null is not a mapping of keys to values"),
        (
            [{"wandb": {"api_key": "geheim"}}],
            '"api_key" is not a key in trackers[0].wandb; allowed: project, mode, dir.',
        ),
        ([{"wandb": {"mode": "on"}}], 'trackers[0].wandb.mode = "on" is not one of offline, online'),
        (["mlflow", {"mlflow": {}}], "trackers names mlflow twice; keep one of them"),
        ([{"tensorboard": {"dir": ""}}], "is not text of at least one character"),
    ],
)
def test_mistakes_are_sentences(tree: Tree, entries: Any, told: str):
    with pytest.raises(ConfigError) as caught:
        parsed(tree, entries)
    assert told in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:geheim@host/x",
        "https://geheim@host",
        "postgresql://me:geheim@host/db",
        "https://host/?token=geheim",
        "https://host/?a=b&api_key=geheim",
    ],
)
def test_secrets_do_not_belong_in_the_file(tree: Tree, uri: str):
    with pytest.raises(ConfigError) as caught:
        parsed(tree, [{"mlflow": {"tracking_uri": uri}}])
    assert "trackers[0].mlflow.tracking_uri = ... holds a user name or a secret" in str(caught.value)
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "sqlite:///x.db", "mlruns", "databricks", "https://h/a?b=c"]
)
def test_other_places_are_fine(tree: Tree, uri: str):
    assert settings_of(parsed(tree, [{"mlflow": {"tracking_uri": uri}}]).trackers[0]).tracking_uri == uri


def test_trackers_are_no_part_of_a_study_or_a_trial(tree: Tree):
    without, with_them = parsed(tree, []), parsed(tree, ["tensorboard"])
    assert differences(without, with_them) == []
    assert without.trial.sha256 == with_them.trial.sha256


def test_the_schema_knows_them():
    schema = StudyConfig.model_json_schema()
    members = schema["properties"]["trackers"]["items"]
    assert ["tensorboard", "mlflow", "wandb"] in [one.get("enum") for one in members["oneOf"]]
    assert set(schema["$defs"]["Wandb"]["properties"]) == {"project", "mode", "dir"}


def test_a_missing_package_is_a_sentence_before_anything_starts(
    tree: Tree, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        trackers_config.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    path = write_study({**tree, "trackers": ["tensorboard", "wandb"]})
    assert command.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "trackers[1] = wandb needs the package wandb, which is not installed; pip install 'raydisp[wandb]', "
        "or take it out of the list\n"
    )
    assert not Path(tree["output"]).exists()


def test_results_in_an_object_store_need_a_local_folder(tree: Tree):
    check_trackers(parsed(tree, ["tensorboard"]).trackers, "/results/x")
    check_trackers(parsed(tree, [{"tensorboard": {"dir": "logs"}}]).trackers, "s3://bucket/x")
    with pytest.raises(ConfigError, match=r"trackers\[0\].tensorboard.dir is missing: .*s3://bucket/x"):
        check_trackers(parsed(tree, ["tensorboard"]).trackers, "s3://bucket/x")
    with pytest.raises(ConfigError, match="is no local folder"):
        check_trackers(parsed(tree, [{"tensorboard": {"dir": "s3://b/x"}}]).trackers, "/results/x")


# --- what they are told ----------------------------------------------------------------------------------


class Inner:
    """In the place of one of Ray's callbacks: writes down what it is told, or fails, or hangs."""

    def __init__(self, fail_in: str = "", hang: threading.Event | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.fail_in = fail_in
        self.hang = hang

    def _tell(self, method: str, *arguments: Any) -> None:
        if self.hang is not None and method == "log_trial_result":
            self.hang.wait(30)
        if self.fail_in in (method, "everywhere"):
            raise RuntimeError(f"{method} is\nbroken")
        self.told.append((method, *arguments))

    def setup(self) -> None:
        self._tell("setup")

    def log_trial_start(self, trial: Any) -> None:
        self._tell("log_trial_start", str(trial), trial.config, trial.local_path)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self._tell("log_trial_result", str(trial), result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._tell("log_trial_end", str(trial), failed)

    def on_experiment_end(self, trials: list[Any]) -> None:
        self._tell("on_experiment_end")


def tunes_trial(number: int, attempt: int = 1, **values: Any) -> Any:
    """What Tune has of a trial, as far as it matters."""
    config = {
        "trial": number,
        "attempt": attempt,
        "phase": "search",
        "arm": "dispersion",
        "study": {"name": "s", "seed": 7},
        "values": values,
    }
    return SimpleNamespace(trial_id=f"t{number}-{attempt}", config=config)


def reported(tokens: int, **metrics: Any) -> dict[str, Any]:
    bookkeeping = {
        "trial_id": "x",
        "pid": 3,
        "time_this_iter_s": 1.0,
        "hostname": "h",
        "training_iteration": 9,
    }
    return {"step": tokens // 128, "num_tokens": tokens, "elapsed_s": 1.5, **metrics, **bookkeeping}


def run_through(tracker: Tracker) -> None:
    """A study of three trials: one completes, one fails and one is cut off."""
    tracker.setup(stop=None, num_samples=1)
    done, failed, cut = (
        tunes_trial(0),
        tunes_trial(1, 2, **{"dispersion.layers": [1]}),
        tunes_trial(2, seed=9),
    )
    for trial in (done, failed, cut):
        tracker.on_trial_start(1, [], trial)
        tracker.on_trial_result(1, [], trial, reported(0, val_loss=6.0, spearman=float("nan"), kendall=None))
    tracker.on_trial_result(1, [], done, reported(256, val_loss=5.0))
    tracker.on_trial_result(
        1, [], done, trackers.told_at_end({"status": "completed", "num_tokens": 256, "train_loss": 4.0})
    )
    tracker.on_trial_complete(1, [], done)
    tracker.on_trial_result(1, [], failed, {"status": "failed", "num_tokens": None})
    tracker.on_trial_error(1, [], failed)
    tracker.setup()  # the confirm phase
    tracker.on_experiment_end([])
    tracker.close(20)


def test_what_a_tracker_is_told():
    inner = Inner()
    tracker = Tracker("x", lambda: inner, "/logs")
    run_through(tracker)
    assert not tracker.broken
    first = {"step": 0, "elapsed_s": 1.5, "val_loss": 6.0, "training_iteration": 0}
    base = {"phase": "search", "arm": "dispersion"}
    assert inner.told == [
        ("setup",),
        (
            "log_trial_start",
            "dispersion-00000",
            {"trial": 0, "attempt": 1, **base, "seed": 7},
            "/logs/dispersion-00000",
        ),
        ("log_trial_result", "dispersion-00000", first),
        (
            "log_trial_start",
            "dispersion-00001-attempt-2",
            {"trial": 1, "attempt": 2, **base, "seed": 7, "dispersion.layers": "[1]"},
            "/logs/dispersion-00001-attempt-2",
        ),
        ("log_trial_result", "dispersion-00001-attempt-2", first),
        (
            "log_trial_start",
            "dispersion-00002",
            {"trial": 2, "attempt": 1, **base, "seed": 9},
            "/logs/dispersion-00002",
        ),
        ("log_trial_result", "dispersion-00002", first),
        (
            "log_trial_result",
            "dispersion-00000",
            {"step": 2, "elapsed_s": 1.5, "val_loss": 5.0, "training_iteration": 256},
        ),
        ("log_trial_result", "dispersion-00000", {"train_loss": 4.0, "training_iteration": 256}),
        ("log_trial_end", "dispersion-00000", False),
        ("log_trial_end", "dispersion-00001-attempt-2", True),
        ("log_trial_end", "dispersion-00002", True),
        ("on_experiment_end",),
    ]


def test_only_finite_numbers_of_ours_are_metrics():
    assert metrics_of(reported(256, val_loss=5, spearman=float("inf"), status="completed")) == {
        "step": 2,
        "elapsed_s": 1.5,
        "val_loss": 5,
    }


METHODS = ["setup", "log_trial_start", "log_trial_result", "log_trial_end", "on_experiment_end", "everywhere"]


@pytest.mark.parametrize("method", METHODS)
def test_one_that_fails_is_one_warning_and_then_silence(method: str, caplog: pytest.LogCaptureFixture):
    run_through(Tracker("x", lambda: Inner(method)))
    first = "setup" if method == "everywhere" else method
    assert [record.getMessage() for record in caplog.records] == [
        f"x gets no more of this study: RuntimeError: {first} is broken. The study goes on, and its rows are "
        "complete"
    ]


def test_one_that_cannot_be_made_is_one_warning(caplog: pytest.LogCaptureFixture):
    def make() -> Any:
        raise SystemExit("no")

    run_through(Tracker("x", make))
    assert len(caplog.records) == 1


def test_one_that_hangs_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture):
    release = threading.Event()
    tracker = Tracker("x", lambda: Inner(hang=release))
    started = time.monotonic()
    tracker.setup()
    tracker.on_trial_start(1, [], tunes_trial(0))
    for tokens in range(1000):
        tracker.on_trial_result(1, [], tunes_trial(0), reported(tokens))
    assert time.monotonic() - started < 2
    tracker.close(0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "x gets no more of this study: it has not taken everything within 0.2 s. The study goes on, and its "
        "rows are complete"
    ]
    release.set()


def test_one_that_does_not_keep_up_is_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trackers, "MAX_WAITING", 5)
    release = threading.Event()
    tracker = Tracker("x", lambda: Inner(hang=release))
    tracker.setup()
    tracker.on_trial_start(1, [], tunes_trial(0))
    for tokens in range(50):
        tracker.on_trial_result(1, [], tunes_trial(0), reported(tokens))
    release.set()
    tracker.close(5)
    assert len(caplog.records) == 1
    assert "it does not keep up" in caplog.text


def test_warnings_hold_no_secrets(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("WANDB_API_KEY", "geheim-0123456789")
    assert redact("POST http://me:pass@host/x failed: geheim-0123456789 is wrong") == (
        "POST http://***@host/x failed: *** is wrong"
    )

    def make() -> Any:
        raise ConnectionError("http://me:pass@host with geheim-0123456789")

    run_through(Tracker("x", make))
    assert "http://***@host with ***" in caplog.text


def test_what_libraries_log_on_a_trackers_thread_is_not_shown(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shown: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    class Loud(Inner):
        def setup(self) -> None:
            logging.getLogger("urllib3").warning("retrying")
            raise RuntimeError("away")

    root, handler = logging.getLogger(), Handler()
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.setattr(trackers, "make_tracker", lambda name, *rest: Tracker(name, Loud))
    with trackers.running(study.model_copy(update={"trackers": ["mlflow"]}), str(tmp_path)) as found:
        run_through(found[0])  # type: ignore[arg-type]
        logging.getLogger("urllib3").warning("another's")
    assert [text.split(":")[0] for text in shown] == ["mlflow gets no more of this study", "another's"]


def test_folders(study: StudyConfig, tmp_path: Path):
    made = {}
    for name in ("tensorboard", "mlflow", "wandb"):
        settings = settings_of(name)
        made[name] = trackers.make_tracker(name, settings, study, str(tmp_path))._folder
    assert made == {"tensorboard": str(tmp_path / "tensorboard"), "mlflow": "", "wandb": str(tmp_path)}
    own = copy.deepcopy(trackers_config.Tensorboard(dir="~/logs"))
    assert trackers.make_tracker("tensorboard", own, study, "s3://b/x")._folder == str(Path.home() / "logs")
