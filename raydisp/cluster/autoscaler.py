"""What the autoscaler of a joined cluster may still start, from wherever Ray 2.60 keeps it.

There is no one place. A managed platform reports node groups to Ray's control store, where Ray Train looks
too (`ray._private.state`). A cluster made by `ray up` keeps its file on the head node, where the autoscaler's
process has it on its command line; that is the same for both versions of the autoscaler. With KubeRay the
limits are in the RayCluster object, which the head's pod may read where the autoscaler is on.

What cannot be read counts as no autoscaler, with a line in the log, and never ends anything.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydisp.cluster.capacity import Growth, Node, NodeGroup

logger = logging.getLogger(__name__)

HEAD_RESOURCE = "node:__internal_head__"
ACCELERATOR = "accelerator_type:"
"""Before the name of a node's GPUs, among its resources."""
UNLIMITED = 1_000_000
PATIENCE_S = 60.0
"""How long the head node is waited for; a process has to start there."""
KUBERNETES_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def read_growth() -> Growth | None:
    """What the autoscaler of the cluster that Ray is connected to may start; None: it has none that tells."""
    for read in (_from_control_store, _from_head_node):
        try:
            growth = read()
        except Exception as error:  # Ray's own inside, a file of the user's, an HTTP server: anything
            logger.info("limits of the autoscaler cannot be read: %s", error)
            continue
        if growth is not None:
            return growth
    return None


def _from_control_store() -> Growth | None:
    from ray._private.state import state  # where Ray Train looks; there is no public way

    config = state.get_cluster_config()
    return None if config is None else growth_of_report(config)


def growth_of_report(config: Any) -> Growth | None:
    """Of a `ClusterConfig` message: node groups that a platform has reported, the head's among them."""
    groups = []
    for group in config.node_group_configs:
        number = UNLIMITED if group.max_count == -1 else group.max_count
        resources = dict(group.resources)
        if number > 0:
            groups.append(NodeGroup(group.name, _node(resources), number))
    if not groups:
        return None
    return Growth(tuple(groups), sum(group.max_nodes for group in groups), with_head=True)


def growth_of_file(config: Mapping[str, Any]) -> Growth | None:
    """Of an autoscaler's configuration, as `ray up` has it and as KubeRay's is translated to by Ray."""
    most = config.get("max_workers")
    groups = []
    for name, kind in (config.get("available_node_types") or {}).items():
        default = 0 if name == config.get("head_node_type") else (most or 0)
        number = kind.get("max_workers", default)
        if number > 0:
            groups.append(NodeGroup(name, _node(kind.get("resources") or {}), number))
    total = sum(group.max_nodes for group in groups)
    return Growth(tuple(groups), total if most is None else min(most, total))


def _node(resources: Mapping[str, float]) -> Node | None:
    return node_of(resources) if resources else None


def node_of(resources: Mapping[str, float]) -> Node:
    """A node by what Ray counts on it."""
    kinds = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    return Node(
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        is_head=HEAD_RESOURCE in resources,
        accelerator_type=kinds[0] if kinds else None,
    )


def _from_head_node() -> Growth | None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"]]
    if not heads:
        return None
    context = ray.get_runtime_context()
    if context.get_node_id() == heads[0]:
        config = config_on_this_node(context.gcs_address)
    else:
        there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(config_on_this_node)
        config = ray.get(
            task.options(scheduling_strategy=there).remote(context.gcs_address), timeout=PATIENCE_S
        )
    return None if config is None else growth_of_file(config)


def config_on_this_node(gcs_address: str) -> dict[str, Any] | None:
    """On the head node: kinds of nodes and their limits, as the autoscaler was told; None: there is none.

    Nothing else of the configuration is passed on: there are keys and addresses in it.
    """
    config = _file_of_the_monitor(gcs_address)
    if config is None and os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("RAY_CLUSTER_NAME"):
        config = _kuberay_config(os.environ["RAY_CLUSTER_NAME"])
    if config is None:
        return None
    kinds = config.get("available_node_types") or {}
    return {
        "max_workers": config.get("max_workers"),
        "head_node_type": config.get("head_node_type"),
        "available_node_types": {
            name: {key: kind[key] for key in ("resources", "max_workers") if key in kind}
            for name, kind in kinds.items()
        },
    }


def _file_of_the_monitor(gcs_address: str) -> dict[str, Any] | None:
    """The file on the command line of the autoscaler's process, which Ray calls its monitor."""
    import yaml

    # The port is enough: the host may go by several names.
    ours = ":" + gcs_address.rsplit(":", 1)[-1]
    for place in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = Path(place).read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if not any(word.endswith("monitor.py") for word in words) or "--autoscaling-config" not in options:
            continue
        if options.get("--gcs-address", "").endswith(ours):
            text = Path(options["--autoscaling-config"]).expanduser().read_text()
            found = yaml.safe_load(text)
            return found if isinstance(found, dict) else None
    return None


def _kuberay_config(name: str) -> dict[str, Any] | None:
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or Path(KUBERNETES_NAMESPACE).read_text().strip()
    # Ray's own reader tries for 25 s where reading is not allowed; once is enough here.
    cluster = node_provider.KubernetesHttpApiClient(namespace=namespace).get(f"rayclusters/{name}")
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return None
    config: dict[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return config
