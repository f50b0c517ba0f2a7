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
