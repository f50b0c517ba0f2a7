"""cluster.yaml is valid for Ray's autoscaler, and what the shipped configs ask for fits into it."""

from pathlib import Path

import pytest
import yaml

from bt_ray import config_file
from bt_ray.resources import refusal

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(CLUSTER))


def maxima():
    """Resources of the cluster when every node type is at its maximum."""
    total = {}
    for name, node in CLUSTER["available_node_types"].items():
        count = 1 if name == CLUSTER["head_node_type"] else node["max_workers"]
        for resource, amount in node["resources"].items():
            total[resource] = total.get(resource, 0.0) + count * amount
    return total


@pytest.mark.parametrize("path", sorted((ROOT / "bt_ray/tasks").glob("*/config.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_config_fits(path):
    assert refusal(config_file.load(path), maxima()) is None


def test_token_and_loopback():
    head = " ".join(CLUSTER["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert all("RAY_AUTH_MODE=token" in line for line in CLUSTER["worker_start_ray_commands"] if " start " in line)


def test_the_kuberay_manifest_describes_the_same_cluster():
    cluster = yaml.safe_load((ROOT / "docs" / "kuberay.yaml").read_text())["spec"]["rayClusterSpec"]
    pinned = next(line for line in (ROOT / ".setup" / "cpu.txt").read_text().splitlines() if line.startswith("ray=="))
    assert pinned == f"ray=={cluster['rayVersion']}"
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * CLUSTER["idle_timeout_minutes"]
    types = CLUSTER["available_node_types"]
    assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == types.keys() - {CLUSTER["head_node_type"]}
    for group in cluster["workerGroupSpecs"]:
        node, pod = types[group["groupName"]], group["template"]["spec"]
        assert (group["minReplicas"], group["maxReplicas"]) == (node["min_workers"], node["max_workers"])
        limits = pod["containers"][0]["resources"]["limits"]
        assert (int(limits["cpu"]), int(limits["nvidia.com/gpu"])) == (node["resources"]["CPU"], node["resources"]["GPU"])
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/mnt/bt_ray"
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": str(types["head"]["resources"]["CPU"]), "num-gpus": "0"}
