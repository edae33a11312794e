"""Pass on the notice that a cloud gives a spot node before it takes it away: Ray does not ask for it.

    python -m raydisp.cluster.spot_notice     # beside Ray on every worker; `cluster.yaml` starts it

AWS gives two minutes, Google Cloud up to 30 s. Ray drains the node then, and raydisp's trials on it save a
checkpoint at once and go on elsewhere. On a node that is not a spot node there never is a notice.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

AWS = "http://169.254.169.254"
"""Of the instance's own metadata; AWS_EC2_METADATA_SERVICE_ENDPOINT names another, as for AWS' clients."""
GOOGLE = "169.254.169.254"
"""Of the same on Google Cloud; GCE_METADATA_HOST names another, as for Google's clients."""
GOOGLE_NOTICE = datetime.timedelta(seconds=30)
ASK_EVERY_S = 2.0
"""AWS advises 5 s; of Google's 30 s that would be too large a part."""
TIMEOUT_S = 2.0
TOKEN_LASTS_S = 300
RETRY_S = 1.0
"""Until Ray is told once more, where it does not answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Wait for the notice and pass it on; returns at once where another process of the node does so."""
    argparse.ArgumentParser(
        prog="python -m raydisp.cluster.spot_notice",
        description="Pass on the notice that a cloud gives this node before taking it away; runs until then.",
    ).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    place = os.path.join(tempfile.gettempdir(), "raydisp_spot_notice.lock")
    lock = open(place, "w")  # noqa: SIM115 - held to the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    deadline = wait_for_notice()
    logger.info("the node is taken away at %s", deadline)
    pass_on(deadline)
    return 0


def wait_for_notice(sleep: Callable[[float], None] = time.sleep) -> datetime.datetime:
    """When the node is taken away, once that is said."""
    problems: dict[str, str] = {}
    while True:
        for cloud, ask in (("AWS", notice_of_aws), ("Google Cloud", notice_of_google)):
            try:
                deadline = ask()
            except (OSError, ValueError, TypeError, KeyError) as error:
                # Once each, or the log would fill: one of the two clouds is never there.
                if problems.get(cloud) != str(error):
                    logger.info("no metadata of %s just now: %s", cloud, error)
                problems[cloud] = str(error)
                continue
            if deadline is not None:
                return deadline
        sleep(ASK_EVERY_S)


def notice_of_aws() -> datetime.datetime | None:
    """When AWS takes this node away; None: it does not.

    Raises:
        OSError, ValueError, TypeError, KeyError: this is no node of AWS, or it does not answer as one.
    """
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", AWS).rstrip("/")
    lasts = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LASTS_S)}
    token = _ask("PUT", f"{endpoint}/latest/api/token", lasts)
    try:
        told = _ask(
            "GET", f"{endpoint}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.datetime.fromisoformat(json.loads(told)["time"])


def notice_of_google() -> datetime.datetime | None:
    """When Google Cloud takes this node away, at the latest; None: it does not.

    Raises:
        OSError: this is no node of Google Cloud, or it does not answer.
    """
    host = os.environ.get("GCE_METADATA_HOST", GOOGLE)
    told = _ask("GET", f"http://{host}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return datetime.datetime.now(tz=datetime.UTC) + GOOGLE_NOTICE if told.strip() == "TRUE" else None


def _ask(method: str, address: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(address, method=method, headers=headers)  # noqa: S310 - http is meant
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy can answer for this node
    with direct.open(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def pass_on(deadline: datetime.datetime, sleep: Callable[[float], None] = time.sleep) -> None:
    """Tell each Ray of this node, again and again until it has heard or the node is gone."""
    told: set[str] = set()
    while True:
        missing = False
        for node_id, gcs_address in raylets():
            if node_id in told:
                continue
            try:
                drain(node_id, gcs_address, deadline)
                told.add(node_id)
            except Exception as error:  # whatever Ray raises where its head does not answer
                logger.warning("Ray's %s is not told yet: %s", node_id, error)
                missing = True
        if not missing or datetime.datetime.now(tz=datetime.UTC) > deadline:
            return
        sleep(RETRY_S)


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
    """Tell Ray that a node goes; raises what Ray does where its control store does not answer."""
    import ray._raylet
    from ray.core.generated import autoscaler_pb2

    accepted, why_not = ray._raylet.GcsClient(address=gcs_address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the cloud takes the spot node back",
        int(deadline.timestamp() * 1000),
    )
    logger.info("Ray drains node %s: %s", node_id, why_not or accepted)


if __name__ == "__main__":
    sys.exit(main())
