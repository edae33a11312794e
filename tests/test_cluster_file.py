"""cluster.yaml and the variants in the docs, held to what `ray up` does with them before it logs in."""

from __future__ import annotations

import copy
import platform
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
import yaml
from aws_server import in_environment, running_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from raydisp.cluster import autoscaler
from raydisp.cluster.capacity import Growth, Node, NodeGroup

ROOT = Path(__file__).parent.parent
Config = dict[str, Any]


def cluster_yaml() -> Config:
    config: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def documented(name: str) -> Config:
    """A YAML block of docs/clusters.md by the word that its first comment begins with."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}:")]
    config: Config = yaml.safe_load(found)
    return config


def variant(name: str) -> Config:
    """cluster.yaml with the keys of a documented variant in their places."""
    config = {**cluster_yaml(), **documented(name)}
    del config["metadata"]
    if name == "local":
        del config["available_node_types"], config["head_node_type"]
    return config


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


@pytest.mark.parametrize("name", ["aws", "gcp", "local"])
def test_ray_prepares_and_accepts_it(name: str) -> None:
    config = cluster_yaml() if name == "aws" else variant(name)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_what_the_search_may_count_on(name: str) -> None:
    config = prepare_config(cluster_yaml() if name == "aws" else variant(name))
    node = Node(8, 1, accelerator_type="L4" if name == "gcp" else None)  # on AWS Ray finds out
    assert autoscaler.growth_of_file(config) == Growth(
        (NodeGroup("gpu_spot", node, 16), NodeGroup("gpu_on_demand", node, 16)), 16
    )


def test_it_runs_what_was_tested() -> None:
    tested = f"rayproject/ray:{pinned('ray')}-py311"
    docker = cluster_yaml()["docker"]
    assert (docker["head_image"], docker["worker_image"]) == (f"{tested}-cpu", f"{tested}-gpu")
    assert ray.__version__ == pinned("ray")
    assert platform.python_version().startswith("3.11.")
    for config in (cluster_yaml(), variant("local")):
        commands_ = " ".join(config["setup_commands"])
        assert f"-c constraints.txt torch=={pinned('torch')}" in commands_
        assert "-c constraints.txt -e ." in commands_
    docs = (ROOT / "docs" / "clusters.md").read_text()
    assert set(re.findall(r"rayproject/ray:\S+", docs)) == {f"{tested}-gpu"}
    assert set(re.findall(r"torch==(\S+)", docs)) == {pinned("torch")}
    assert documented("rayjob")["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")


def test_it_is_closed_and_holds_no_secret() -> None:
    for name in ("aws", "gcp", "local"):
        config = cluster_yaml() if name == "aws" else variant(name)
        assert "~/.ray/auth_token" in config["file_mounts"]
        started = " ".join([*config["head_start_ray_commands"], *config["worker_start_ray_commands"]])
        options = " ".join(config["docker"].get("run_options", []))
        assert started.count("RAY_AUTH_MODE=token") + 2 * options.count("RAY_AUTH_MODE=token") == 2
        assert "--dashboard-host=127.0.0.1" in started
        if config["docker"]:
            assert "--shm-size=8g" in options
    for kind in cluster_yaml()["available_node_types"].values():
        node = kind["node_config"]
        assert node["SecurityGroupIds"]
        assert node["IamInstanceProfile"]
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
    for path in (ROOT / "cluster.yaml", ROOT / "docs" / "clusters.md"):
        assert not re.search(r"AKIA|aws_secret|SECRET_ACCESS|BEGIN .*PRIVATE", path.read_text())


def test_kubernetes_starts_what_it_says() -> None:
    spec = documented("rayjob")["spec"]["rayClusterSpec"]
    cluster = {"metadata": {"name": "x", "namespace": "y"}, "spec": spec}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    growth = autoscaler.growth_of_file(config)
    assert growth is not None
    assert [(group.name, group.node, group.max_nodes) for group in growth.groups] == [("gpu", Node(7, 1), 16)]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/dev/shm"


def test_ray_up_gets_as_far_as_its_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `ray up` and the head's autoscaler ask of AWS, against a server that answers like it."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key pair that it makes there
    with running_aws() as environment, in_environment(environment):
        ec2 = boto3.client("ec2", region_name="us-west-2")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="raydisp", Description="raydisp", VpcId=vpc)["GroupId"]
        for role in ("raydisp-head", "raydisp-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=role)
        text = (ROOT / "cluster.yaml").read_text()
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = text.replace("ami-00000000000000000", image).replace("sg-00000000000000000", group)
        config = commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
        provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
        for name, kind in config["available_node_types"].items():
            provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
        started = {
            next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type"): instance
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        }
        (made,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert {name: instance.get("InstanceLifecycle") for name, instance in started.items()} == {
        "head": None,
        "gpu_spot": "spot",
        "gpu_on_demand": None,
    }
    for name, instance in started.items():
        role = "raydisp-head" if name == "head" else "raydisp-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{role}")
        assert instance["SecurityGroups"] == [{"GroupId": group, "GroupName": "raydisp"}]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["ImageId"] == image
    assert made["IpPermissions"] == [], "Ray has opened nothing"
    resources = config["available_node_types"]["gpu_spot"]["resources"]
    assert (resources["CPU"], resources["GPU"], resources["accelerator_type:L4"]) == (8, 1, 1)
