"""Where commands end: one sentence and a status, whatever happens inside, in real processes too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_analysis import sample_tables, trial_row
from test_report import write_study

from raydisp.boundary import run_command
from raydisp.errors import OutputError


def failing(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "told"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (failing(OutputError("x is a file")), 2, "raydisp.x: x is a file\n"),
        (failing(PermissionError(13, "Permission denied", "/x")), 2, "Permission denied: '/x'\n"),
        (failing(OSError("When reading:\n  AWS Error")), 2, "raydisp.x: When reading: AWS Error\n"),
        (failing(KeyboardInterrupt()), 130, "raydisp.x: interrupted; nothing was written by halves\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5), 130, "interrupted"),
    ],
)
def test_every_end_has_its_status(
    run: Callable[[], int | None], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("raydisp.x", run) == status
    said = capsys.readouterr()
    assert told in said.err
    assert len(said.err.strip().splitlines()) == (1 if told else 0)
    assert said.out == ""


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("raydisp.x", failing(ZeroDivisionError()))


SLOW = """
import sys, time
import importlib
module = importlib.import_module("raydisp.{module}")

def slow(*_, **__):
    print("it runs", flush=True)
    time.sleep(60)

module.{inner} = slow
sys.exit(module.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "inner", "arguments"),
    [
        ("report.command", "build_report", ["DIR"]),
        ("verdict.command", "_judge", ["DIR"]),
        ("results.command", "_show", ["show", "DIR"]),
        ("export", "export", ["DIR", "--to", "model"]),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_is_a_sentence(
    module: str, inner: str, arguments: list[str], number: int, tmp_path: Path
) -> None:
    folder = write_study(tmp_path / "study", sample_tables([trial_row(0), trial_row(1)]))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(module=module, inner=inner)]
        + [folder if word == "DIR" else word for word in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "it runs\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study"]
