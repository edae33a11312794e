"""The notice of a spot node reaches Ray."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from test_on_ray import wait_for

from raydisp.cluster import preemption, spot_notice

DEADLINE = datetime.datetime(2031, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


class Metadata(http.server.BaseHTTPRequestHandler):
    """Of an instance that gets its notice with the third question; only who asks as the cloud wants it is
    answered."""

    asked = 0

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if wanted and not self.is_google else 405, "a token")

    def do_GET(self) -> None:
        if self.is_google:
            if self.path != PREEMPTED or self.headers["Metadata-Flavor"] != "Google":
                return self._answer(403, "")
            type(self).asked += 1
            return self._answer(200, "TRUE" if self.asked == 3 else "FALSE")
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            return self._answer(401, "")
        type(self).asked += self.path == ACTION
        if self.path != ACTION or self.asked == 1:
            return self._answer(404, "")
        if self.asked == 2:
            return self._answer(200, "not JSON")
        return self._answer(200, json.dumps({"action": "terminate", "time": "2031-05-06T07:08:09Z"}))

    is_google = False

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


class GoogleMetadata(Metadata):
    is_google = True


@contextlib.contextmanager
def answering(kind: type[Metadata], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A node of a cloud: its metadata answers at the address that both clouds use."""
    kind.asked = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_the_notice_of_aws_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    with answering(Metadata, monkeypatch):
        assert spot_notice.wait_for_notice(waited.append) == DEADLINE
    assert waited == [spot_notice.ASK_EVERY_S] * 2
    assert caplog.text.count("Google Cloud") == 1, "a log that is not filled"


def test_the_notice_of_google_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    with answering(GoogleMetadata, monkeypatch):
        deadline = spot_notice.wait_for_notice(waited.append)
    assert waited == [spot_notice.ASK_EVERY_S] * 2
    left = deadline - datetime.datetime.now(tz=datetime.UTC)
    assert 0 < left.total_seconds() <= 30
    assert caplog.text.count("no metadata of AWS") == 1


def test_ray_is_told_until_it_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two Rays on the node one does not answer at first; each is told once."""
    tries: list[str] = []

    def drain(node_id: str, *_: object) -> None:
        tries.append(node_id)
        if tries.count("b") == 1 and node_id == "b":
            raise ConnectionError("the head is restarting")

    monkeypatch.setattr(spot_notice, "raylets", lambda: [("a", "x:1"), ("b", "x:2")])
    monkeypatch.setattr(spot_notice, "drain", drain)
    waited: list[float] = []
    spot_notice.pass_on(DEADLINE, waited.append)
    assert (tries, waited) == (["a", "b", "b"], [spot_notice.RETRY_S])
    tries.clear()
    monkeypatch.setattr(spot_notice, "raylets", lambda: [("b", "x:2")])
    over = datetime.datetime.now(tz=datetime.UTC) - datetime.timedelta(seconds=1)
    spot_notice.pass_on(over, waited.append)
    assert tries == ["b"], "the time is over"


def test_the_node_is_found_by_its_agents_process(tmp_path: Path) -> None:
    agent = tmp_path / "raylet"
    agent.symlink_to(sys.executable)
    wait = "print('up', flush=True); import time; time.sleep(60)"
    options = ["--node_id=abc123", "--gcs-address=10.0.0.1:6379", "--static_resource_list=node:1,1.0"]
    process = subprocess.Popen([str(agent), "-c", wait, *options], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert ("abc123", "10.0.0.1:6379") in spot_notice.raylets()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.ray
def test_a_trial_on_the_node_is_told() -> None:
    context = ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=40
    )

    @ray.remote(num_cpus=1)  # a node without work would go at once
    class Trial:
        def notice(self) -> str | None:
            return preemption.notice_to_this_node()

    try:
        trial = Trial.remote()
        assert ray.get(trial.notice.remote()) is None
        node_id, address = context.address_info["node_id"], context.address_info["gcs_address"]
        assert (node_id, address) in spot_notice.raylets()
        spot_notice.drain(node_id, address, DEADLINE)
        told = wait_for(lambda: ray.get(trial.notice.remote()), seconds=30)
    finally:
        ray.shutdown()
    assert told == "its node is taken away at 2031-05-06 07:08:09 UTC"


def test_an_argument_is_refused_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        spot_notice.main(["--no-such"])
    assert ended.value.code == 2
    assert "--no-such" in capsys.readouterr().err
