"""Whether the nodes of a cluster see the run directory: rows, checkpoints and weights are written where they are made."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from bt_ray.errors import ConfigError

TIMEOUT_S = 60.0  # a node that says nothing for so long is not judged
_seen: dict[str, set[str]] = {}  # nodes that this process has asked before, by run directory


def refuse_local_storage(root: Path) -> None:
    """Ask each node of the connected cluster that was not asked before for a file of the run directory `root`.

    Raises ConfigError where one has another folder, or none, in its place. A cluster of one node is not asked, nor is
    a node that dies meanwhile judged.
    """
    import ray

    nodes = {str(node["NodeID"]): str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    asked = _seen.setdefault(str(root), set())
    if len(nodes) < 2 or not nodes.keys() - asked:
        return
    mark = root / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        answers = _ask({node: address for node, address in nodes.items() if node not in asked}, mark)
    finally:
        mark.unlink(missing_ok=True)
    if reason := refusal(root, {f"{node[:8]} ({nodes[node]})": sees for node, sees in answers.items()}):
        raise ConfigError(reason)
    asked.update(answers)


def _ask(nodes: Mapping[str, str], mark: Path) -> dict[str, bool]:
    """By node: whether it sees the file. Nodes that do not answer are left out."""
    import ray
    from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(os.path.exists)
    there = {
        look.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(mark)): node
        for node in nodes
    }
    done, _ = ray.wait(list(there), num_returns=len(there), timeout=TIMEOUT_S)
    answers = {}
    for reference in done:
        try:
            answers[there[reference]] = bool(ray.get(reference))
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError):  # it went away: what ran there runs elsewhere
            continue
    return answers


def refusal(root: Path, sees: Mapping[str, bool]) -> str | None:
    """Why a run cannot be at `root`, from what each node says; None where it can. Pure."""
    blind = sorted(node for node, seen in sees.items() if not seen)
    if not blind:
        return None
    return (
        f"{root} is not the same folder on every node: {', '.join(blind)} cannot see what this machine writes there. "
        "Put the run directory on storage that all nodes mount at the same path, and name it with --run-dir."
    )
