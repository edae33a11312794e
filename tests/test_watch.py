"""The report while a study runs, over real HTTP: rows that come in, what is refused, how it ends."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_analysis import sample_tables, trial_row
from test_report import Page, write_study

from raydisp import report, results, storage
from raydisp.errors import OutputError
from raydisp.report import command, watch
from raydisp.report.watch import ReportServer, Watched

Answer = tuple[int, dict[str, str], str]


def ask(port: int, path: str = "/", method: str = "GET", host: str | None = "127.0.0.1") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, headers, answer.read().decode()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Watched, int]]:
    """A results folder of two trials, and its server: the folder, what is served of it, the port."""
    folder = write_study(tmp_path / "study", sample_tables([trial_row(0), trial_row(1)]))
    watched = Watched(folder)
    with ReportServer(watched, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield folder, watched, server.server_address[1]
        server.shutdown()


def add_trials(folder: str, *numbers: int) -> None:
    for number in numbers:
        table = sample_tables([trial_row(number)]).trials
        results.write_table(storage.join(folder, "trials", f"more-{number}.parquet"), table)


def test_the_served_page_is_the_report_with_a_script(served: tuple[str, Watched, int]):
    folder, _, port = served
    status, headers, text = ask(port)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    alone = Path(report.build_report(folder)).read_text()
    assert "connect-src" not in alone.split("</head>")[0]
    assert "fetch(" not in alone.replace(
        re.search(r"<script>/\*.*?</script>", alone, re.S)[0], ""
    )  # plotly's
    policy = "default-src 'none'; connect-src 'self';"
    assert policy in text
    # What was added, and nothing else.
    script = text.rindex("<script>")
    assert text[:script].replace(policy, "default-src 'none';") + "</body>\n</html>\n" == alone
    assert Page(text).figures == Page(alone).figures
    version = json.loads(ask(port, "/version")[2])["version"]
    assert f'version = "{version}"' in text[script:]
    assert ask(port, "/report.html?x=1")[2] == text


def test_rows_that_come_in_make_a_new_version(served: tuple[str, Watched, int]):
    folder, watched, port = served
    first = ask(port, "/version")[2]
    assert not watched.refresh(), "nothing has changed"
    add_trials(folder, 2)
    assert watched.refresh()
    assert ask(port, "/version")[2] != first
    assert '<td class="number" data-value="2">2</td>' in ask(port)[2]


def test_a_file_that_says_nothing_new_is_no_new_version(served: tuple[str, Watched, int]):
    folder, watched, port = served
    first = ask(port, "/version")[2]
    text = storage.read_bytes(storage.join(folder, "study.yaml"))
    storage.write_bytes(storage.join(folder, "study.yaml"), text + b"\n# a remark\n")
    assert not watched.refresh()
    assert ask(port, "/version")[2] == first, "an open page is not loaded again"


def test_a_row_written_again_is_seen(served: tuple[str, Watched, int]):
    folder, watched, _ = served
    row = sample_tables([trial_row(5)]).trials
    place = storage.join(folder, "trials", "trial-00005-attempt-1.parquet")
    results.write_table(place, row)
    assert watched.refresh()
    status = row.column_names.index("status")
    results.write_table(place, row.set_column(status, "status", [["failed"]]))
    assert watched.refresh()


def test_a_broken_file_is_named_once_and_left_out(
    served: tuple[str, Watched, int], caplog: pytest.LogCaptureFixture
):
    folder, watched, port = served
    storage.write_bytes(storage.join(folder, "trials", "broken.parquet"), b"PAR1 not at all")
    storage.write_bytes(storage.join(folder, "study.yaml"), b"\xff\xfe no text")
    add_trials(folder, 2)
    watched.try_refresh()
    add_trials(folder, 3)
    watched.try_refresh()
    assert '<td class="number" data-value="3">3</td>' in ask(port)[2]
    assert sum("broken.parquet" in record.getMessage() for record in caplog.records) == 1


def test_what_goes_wrong_leaves_the_page_and_is_said_once(
    served: tuple[str, Watched, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    folder, watched, port = served
    before = ask(port)

    def fail(place: str) -> str:
        raise ArithmeticError("two and\ntwo")

    with monkeypatch.context() as patched:
        patched.setattr(watch, "make_report", fail)
        add_trials(folder, 2)
        for _ in range(3):
            watched.try_refresh()
    assert ask(port)[2] == before[2]
    assert [record.getMessage() for record in caplog.records] == [
        "the report is not renewed just now: ArithmeticError: two and two"
    ]
    watched.try_refresh()
    assert ask(port)[2] != before[2], "it is tried again although no row has changed since"


def test_a_study_without_a_trial_has_a_page_that_waits(tmp_path: Path):
    folder = str(tmp_path / "<b>study</b>")
    watched = Watched(folder)
    text = watched.page.content.decode()
    assert "Nothing to show yet" in text
    assert "&lt;b&gt;study&lt;/b&gt; yet." in text
    assert "connect-src 'self';" in text
    os.makedirs(f"{folder}/trials")
    assert not watched.refresh()
    write_study(Path(folder), sample_tables([trial_row(0)]))
    assert watched.refresh()
    assert "Nothing to show yet" not in watched.page.content.decode()


@pytest.mark.parametrize(
    "path",
    [
        "/trials",
        "/trials/all.parquet",
        "/study.yaml",
        "/../study.yaml",
        "/..%2fstudy.yaml",
        "/report.html/",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/version/",
        "http://127.0.0.1/study.yaml",
    ],
)
def test_nothing_else_is_served(served: tuple[str, Watched, int], path: str):
    status, _, text = ask(served[2], path)
    assert (status, text) == (404, "There are / and /version.\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "FROB"])
def test_only_get(served: tuple[str, Watched, int], method: str):
    status, headers, _ = ask(served[2], "/", method)
    assert (status, headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:{port}", "LOCALHOST:{port}", "[::1]:{port}", "127.0.0.2"]
)
def test_loopback_names_are_answered(served: tuple[str, Watched, int], host: str):
    assert ask(served[2], "/version", host=host.format(port=served[2]))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "127.0.0.1:{port}:1",
        "127.0.0.1/x",
    ],
)
def test_other_names_are_refused(served: tuple[str, Watched, int], host: str | None):
    told = None if host is None else host.format(port=served[2])
    for path in ("/", "/version"):
        status, _, text = ask(served[2], path, host=told)
        assert (status, text) == (403, "This server answers to loopback names only.\n")


def test_a_host_that_was_asked_for_is_answered_by_address(tmp_path: Path):
    with ReportServer(Watched(str(tmp_path)), "0.0.0.0", 0) as server:
        assert server.open_to_others
        assert server.knows("10.0.0.1:80")
        assert server.knows(socket.gethostname())
        assert not server.knows("evil.example")


def test_a_file_is_no_results_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; name the results folder"):
        Watched(str(tmp_path / "file"))


def test_the_version_of_an_object_store_changes_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By URI, as an object store is asked: through Arrow alone."""
    folder = write_study(tmp_path / "study", sample_tables([trial_row(0)]))
    watched = Watched(f"file://{folder}")
    assert not watched.refresh()
    add_trials(folder, 1)
    assert watched.refresh()


# --- the command ---------------------------------------------------------------------------------------


def start(*arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raydisp.report", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(tmp_path: Path, number: int):
    folder = str(tmp_path / "study")
    process = start(folder, "--watch")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(rf"{re.escape(folder)} at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)
        assert match is not None, line
        port = int(match[1])
        assert "Nothing to show yet" in ask(port)[2]
        first = ask(port, "/version")[2]
        write_study(tmp_path / "study", sample_tables([trial_row(0)]))
        wait_for(lambda: ask(port, "/version")[2] != first)
        assert "Nothing to show yet" not in ask(port)[2]
        if number == signal.SIGINT:
            other = start(folder, "--watch", "--port", port)
            out, err = other.communicate(timeout=60)
            assert (other.returncode, out) == (2, "")
            assert err == (
                f"raydisp.report: 127.0.0.1:{port} cannot be listened on: Address already in use; give "
                "another --port, or none for a free one\n"
            )
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert err == ""
    assert not Path(folder, "report.html").exists(), "it only reads"


def test_mistakes_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for arguments, told in (
        ([str(tmp_path / "file"), "--watch"], "is a file; name the results folder of a study"),
        ([str(tmp_path), "--watch", "--port", "70000"], "--port 70000 is not between 0 and 65535"),
        ([str(tmp_path), "--watch", "--host", "no.such.host.invalid"], "cannot be listened on: "),
    ):
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert told in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), "--port", "1"])
    assert stopped.value.code == 2


def test_another_host_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any):
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    with caplog.at_level(logging.WARNING):
        write_study(tmp_path, sample_tables([trial_row(0)]))
        watch.watch(str(tmp_path), "0.0.0.0", 0)
    assert [
        "whoever reaches this machine can read the report" in one.getMessage() for one in caplog.records
    ] == [True]
