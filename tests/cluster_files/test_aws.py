"""`ray up cluster/aws.yaml` against a simulated EC2, up to the point where SSH would begin."""

import copy

import boto3
import check
import pytest
from moto import mock_aws
from ray.autoscaler._private import commands, providers

REGION = "us-west-2"


@pytest.fixture
def account(tmp_path, monkeypatch):
    """Yield EC2 and IAM clients of an account that holds only the profiles of the README."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a private key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with mock_aws():
        iam = boto3.client("iam", region_name=REGION)
        for name in ("hts-ray-head", "hts-ray-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name=REGION), iam


def test_head_and_spot_workers_are_requested_and_terminated(account):
    """Would catch a node type that Ray or EC2 refuses, rights of Ray's making, and what stays."""
    ec2, iam = account
    (config,) = check.load((check.FOLDER / "aws.yaml").read_text())
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["ImageId"] = image
    resolved = commands._bootstrap_config(config, no_config_cache=True)
    assert iam.list_roles()["Roles"] == []
    types = resolved["available_node_types"]
    assert {name: types["gpu"]["resources"][name] for name in ("CPU", "GPU")} == {
        "CPU": 8,
        "GPU": 1,
    }
    provider = providers._get_node_provider(resolved["provider"], "hts", use_cache=False)
    for name in ("head", "gpu"):
        tags = {"ray-cluster-name": "hts", "ray-node-type": name, "ray-user-node-type": name}
        provider.create_node(copy.deepcopy(types[name]["node_config"]), tags, 1)
    head, worker = instances(ec2)
    assert (head["InstanceType"], head.get("InstanceLifecycle")) == ("m6i.xlarge", None)
    assert (worker["InstanceType"], worker["InstanceLifecycle"]) == ("g5.2xlarge", "spot")
    for node, profile in ((head, "hts-ray-head"), (worker, "hts-ray-worker")):
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert {node["State"]["Name"] for node in instances(ec2)} == {"terminated"}


def instances(ec2):
    """Return all instances, the head's first."""
    found = [
        node
        for reservation in ec2.describe_instances()["Reservations"]
        for node in reservation["Instances"]
    ]
    return sorted(found, key=lambda node: node["InstanceType"], reverse=True)
