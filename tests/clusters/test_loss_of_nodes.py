"""A run on a cluster of several nodes, which loses one while it generates, while it searches, and while it trains; and a folder
that not all nodes see."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bt_ray.errors import ConfigError
from bt_ray.node_check import refuse_local_storage
from tests.support.driver_runs import bt_ray
from tests.support.injecting import RunAtWork, assert_as_undisturbed, wait_for_training, write_undisturbed_run
from tests.support.leftovers import assert_nothing_is_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NODE = {"num_cpus": 4, "object_store_memory": 256 * 1024**2, "dashboard_agent_listen_port": 0}


class Nodes:
    """A head that runs no engine, trial or trainer, and worker nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": True})

    def lose(self, process: str, run: RunAtWork) -> None:
        """Kill, all at once, the processes of the worker node that one with `process` in its command line runs on. Another
        node is there before that, as an autoscaler would bring one up after it."""
        found: list[Any] = []

        def look() -> bool:
            found[:] = [node for node in self.cluster.worker_nodes if any(process in line for line in command_lines(node))]
            return bool(found)

        run.wait_for(look)
        self.cluster.add_node(**NODE)
        self.cluster.remove_node(found[0], allow_graceful=False)

    @contextmanager
    def joined(self) -> Iterator[Any]:
        """This process in the cluster, for the block: `ray`."""
        import ray

        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")
        try:
            yield ray
        finally:
            ray.shutdown()


def command_lines(node: Any) -> Iterator[str]:
    """Of what a node's raylet started."""
    for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        try:
            yield " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # jobs start `python`
        made = Nodes()
        try:
            for _ in range(2):
                made.cluster.add_node(**NODE)
            yield made
        finally:
            made.cluster.shutdown()


def test_a_node_is_lost_in_rollouts_search_and_training(nodes: Nodes, tmp_path: Path, undisturbed: Path) -> None:
    config = write_undisturbed_run(tmp_path)
    with RunAtWork(config, tmp_path / "run", more=["--address", nodes.cluster.address]) as run:
        run.wait_for_rows("rollout", 3)
        nodes.lose("ray::ProgramWorker", run)
        run.wait_for_rows("search", 3)
        nodes.lose("ray::CandidateTrial", run)
        wait_for_training(run)
        nodes.lose("ray::RayTrainWorker", run)
        code, output = run.end(800)
    assert code == 0, output[-3000:]
    assert_as_undisturbed(run.run_dir, undisturbed)
    status = bt_ray("status", run.run_dir).stdout
    assert "done" in status
    with nodes.joined():
        assert_nothing_is_left()


def test_a_run_directory_that_the_nodes_do_not_see_is_refused_with_their_names(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    for folder in (seen, unseen):
        folder.mkdir()
    with nodes.joined() as ray:
        refuse_local_storage(seen)
        monkeypatch.setattr(Path, "touch", lambda path: None)  # the file is nowhere, as on a disk of another machine
        with pytest.raises(ConfigError, match="is not the same folder on every node") as refused:
            refuse_local_storage(unseen)
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(alive) == 3 and all(node[:8] in str(refused.value) for node in alive)
