"""The notice of a spot node reaches Ray."""

from __future__ import annotations

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

from raydisp import preemption, spot_notice

DEADLINE = datetime.datetime(2031, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
ACTION = "/latest/meta-data/spot/instance-action"


class Metadata(http.server.BaseHTTPRequestHandler):
    """Of an instance that gets its notice with the third question; only those with a token are answered."""

    asked = 0

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if wanted else 400, "a token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            return self._answer(401, "")
        Metadata.asked += self.path == ACTION
        if Metadata.asked == 1:
            return self._answer(404, "")
        if Metadata.asked == 2:
            return self._answer(200, "not JSON")
        return self._answer(200, json.dumps({"action": "terminate", "time": "2031-05-06T07:08:09Z"}))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Metadata.asked = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield
    server.shutdown()


def test_the_notice_is_waited_for(metadata: None) -> None:
    waited: list[float] = []
    assert spot_notice.wait_for_notice(waited.append) == DEADLINE
    assert waited == [spot_notice.ASK_EVERY_S] * 2


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
