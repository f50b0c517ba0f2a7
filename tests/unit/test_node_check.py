"""Which nodes are asked whether they see the run directory, and who asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bt_ray import driver, node_check
from bt_ray.errors import ConfigError
from bt_ray.stages import context

NODES = [{"NodeID": name * 12, "NodeManagerAddress": f"10.0.0.{number}", "Alive": True} for number, name in enumerate("abc")]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """`nodes` that are there, `blind` ones, and which were `asked`, with the file that was to be seen."""
    found: dict[str, Any] = {"nodes": NODES[:2], "blind": set(), "asked": []}

    def ask(nodes: dict[str, str], mark: Path) -> dict[str, bool]:
        assert mark.is_file()
        found["asked"].append(sorted(nodes))
        return {node: node not in found["blind"] for node in nodes}

    monkeypatch.setattr("ray.nodes", lambda: found["nodes"])
    monkeypatch.setattr(node_check, "_ask", ask)
    monkeypatch.setattr(node_check, "_seen", {})
    yield found


def test_each_node_is_asked_once_and_nothing_is_left(cluster: dict[str, Any], tmp_path: Path) -> None:
    a, b, c = (str(node["NodeID"]) for node in NODES)
    node_check.refuse_local_storage(tmp_path)
    node_check.refuse_local_storage(tmp_path)
    cluster["nodes"] = NODES
    node_check.refuse_local_storage(tmp_path)
    assert cluster["asked"] == [[a, b], [c]] and list(tmp_path.iterdir()) == []


def test_a_node_that_does_not_see_it_is_named_and_nothing_is_left(cluster: dict[str, Any], tmp_path: Path) -> None:
    cluster["blind"] = {str(NODES[1]["NodeID"])}
    with pytest.raises(ConfigError, match=r"is not the same folder on every node: bbbbbbbb \(10\.0\.0\.1\) cannot see"):
        node_check.refuse_local_storage(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_of_one_node_is_not_asked(cluster: dict[str, Any], tmp_path: Path) -> None:
    cluster["nodes"] = [NODES[0], {**NODES[1], "Alive": False}]
    node_check.refuse_local_storage(tmp_path)
    assert cluster["asked"] == []


def test_the_driver_asks_before_its_engines_start_and_each_stage_once_its_workers_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(root: Path) -> None:
        said.append("asked")
        raise ConfigError(json.dumps(str(root)))

    for module in (driver, context):
        monkeypatch.setattr(module, "refuse_local_storage", refuse)
    monkeypatch.setattr("bt_ray.rollout.worker.await_workers", lambda *_: said.append("workers are up"))
    stage = context.StageContext.__new__(context.StageContext)
    stage._started, stage.run = ["worker"], type("Run", (), {"root": Path("/run")})()  # type: ignore[assignment]
    stage.__dict__.update(spec=None, pool=None)
    with pytest.raises(ConfigError, match="/run"):
        stage.workers  # noqa: B018
    assert said == ["workers are up", "asked"]
