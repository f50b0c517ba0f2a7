"""cluster.yaml is valid for Ray's autoscaler, and what the shipped configs ask for fits into it."""

import json
from pathlib import Path

import pytest
import yaml

from bt_ray import config_file
from bt_ray.lm.node_cache import SETTING
from bt_ray.resources import most_resources, refusal, shapes_to_come

ROOT = Path(__file__).parents[2]
HOME = "/mnt/bt_ray/home"
SHARED = {"BT_RAY_HOME": HOME, "HF_HOME": "/mnt/bt_ray/hub"}
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


def environment(container):
    return {variable["name"]: variable["value"] for variable in container["env"]}


SHIPPED = sorted((ROOT / "bt_ray/tasks").glob("*/config.yaml"))


@pytest.mark.parametrize("apart", [False, True], ids=["anywhere", "each on nodes of its own"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_shipped_config_fits(path, apart):
    config = config_file.load(path, ("engine.resources={engines: 1}", "steps.w.resources={trainers: 1}") if apart else ())
    reach = most_resources(CLUSTER)
    assert reach == maxima() and {"engines", "trainers", "GPU"} <= reach.keys()
    assert refusal(config, reach, shapes_to_come(CLUSTER)) is None


def test_each_kind_of_work_has_a_type_of_node():
    """What a config may ask for by the names in cluster.yaml is on one type of node each, with a GPU for each unit."""
    types = CLUSTER["available_node_types"]
    for name, resource in (("engine", "engines"), ("train", "trainers")):
        assert [one for one, node in types.items() if resource in node["resources"]] == [name]
        assert types[name]["resources"][resource] == types[name]["resources"]["GPU"]
        assert types[name]["labels"] == {"bt-ray": name}
    assert "GPU" not in types[CLUSTER["head_node_type"]]["resources"]
    assert CLUSTER["max_workers"] == sum(node["max_workers"] for node in types.values())


def test_without_work_the_head_alone_is_left():
    workers = {name: node for name, node in CLUSTER["available_node_types"].items() if name != CLUSTER["head_node_type"]}
    assert workers and all(node["min_workers"] == 0 for node in workers.values())
    assert 0 < CLUSTER["idle_timeout_minutes"] <= 10


def test_nodes_reach_the_run_directory_and_copy_models_to_disks_of_their_own():
    mounts = [line for line in CLUSTER["setup_commands"] if "mount -t" in line]
    assert len(mounts) == 1 and mounts[0].endswith(":/ /mnt/bt_ray")
    assert CLUSTER["setup_commands"].index(mounts[0]) < CLUSTER["setup_commands"].index(
        f"cd ~/bt_ray && BT_RAY_HOME={HOME} make setup"
    )
    (head,), (start,) = (
        [line for line in CLUSTER[f"{kind}_start_ray_commands"] if " ray start" in line] for kind in ("head", "worker")
    )
    for name, value in SHARED.items():  # the same path on every node, since it stands in the weights
        assert f" {name}={value} " in head and f" {name}={value} " in start
    assert f"{SETTING}=/" in start and f"{SETTING}=/mnt/bt_ray" not in start
    for node in CLUSTER["available_node_types"].values():
        assert node["node_config"]["ImageId"].startswith("ami-")


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
        named = json.loads(json.loads(group["rayStartParams"]["resources"]))  # KubeRay hands it to a shell
        assert named == {name: amount for name, amount in node["resources"].items() if name not in ("CPU", "GPU")}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"runs": "/mnt/bt_ray", "cache": "/cache"}
        assert environment(pod["containers"][0]) == {**SHARED, SETTING: "/cache"}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    head = cluster["headGroupSpec"]
    assert environment(head["template"]["spec"]["containers"][0]) == SHARED
    assert head["rayStartParams"] == {"num-cpus": str(types["head"]["resources"]["CPU"]), "num-gpus": "0"}
