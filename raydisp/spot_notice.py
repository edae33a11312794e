"""Pass on the notice that AWS gives a spot node two minutes before it takes it away: Ray does not ask for it.

    python -m raydisp.spot_notice     # beside Ray on every worker; `cluster.yaml` starts it

Ray drains the node then, and raydisp's trials on it save a checkpoint at once and go on elsewhere. On a node
that is not a spot node there never is a notice.
"""

from __future__ import annotations

import datetime
import fcntl
import glob
import json
import logging
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

ENDPOINT = "http://169.254.169.254"
"""Of the instance's own metadata; AWS_EC2_METADATA_SERVICE_ENDPOINT names another, as for AWS' clients."""
ASK_EVERY_S = 5.0
TIMEOUT_S = 2.0
TOKEN_LASTS_S = 300


def main() -> int:
    """Wait for the notice and pass it on; returns at once where another process of the node does so."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    place = os.path.join(tempfile.gettempdir(), "raydisp_spot_notice.lock")
    lock = open(place, "w")  # noqa: SIM115 - held to the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    deadline = wait_for_notice()
    logger.info("the node is taken away at %s", deadline)
    for node_id, gcs_address in raylets():
        drain(node_id, gcs_address, deadline)
    return 0


def wait_for_notice(sleep: Callable[[float], None] = time.sleep) -> datetime.datetime:
    """When the node is taken away, once that is said."""
    while True:
        try:
            told = json.loads(_ask("GET", "/latest/meta-data/spot/instance-action"))
            return datetime.datetime.fromisoformat(told["time"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            if not isinstance(error, urllib.error.HTTPError) or error.code != 404:  # 404: no notice
                logger.info("the node's metadata cannot be read: %s", error)
        sleep(ASK_EVERY_S)


def _ask(method: str, path: str) -> str:
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", ENDPOINT).rstrip("/")
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LASTS_S)}
    if method == "GET":
        headers = {"X-aws-ec2-metadata-token": _ask("PUT", "/latest/api/token")}
    request = urllib.request.Request(endpoint + path, method=method, headers=headers)  # noqa: S310 - http is meant
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return str(answer.read().decode())


def raylets() -> list[tuple[str, str]]:
    """Node number and address of the control store of each Ray whose node agent runs here."""
    found = []
    for place in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = Path(place).read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        options = dict(
            word.lstrip("-").split("=", 1) for word in words if word.startswith("--") and "=" in word
        )
        if words[0].endswith("/raylet") and {"node_id", "gcs-address"} <= set(options):
            found.append((options["node_id"], options["gcs-address"]))
    return found


def drain(node_id: str, gcs_address: str, deadline: datetime.datetime) -> None:
    """Tell Ray that a node goes."""
    import ray._raylet
    from ray.core.generated import autoscaler_pb2

    accepted, why_not = ray._raylet.GcsClient(address=gcs_address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "AWS takes the spot node back",
        int(deadline.timestamp() * 1000),
    )
    logger.info("Ray drains node %s: %s", node_id, why_not or accepted)


if __name__ == "__main__":
    sys.exit(main())
