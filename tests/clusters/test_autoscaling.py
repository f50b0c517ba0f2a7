"""A run on a cluster that grows and shrinks: Ray's autoscaler with its provider of nodes that are processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bt_ray.cluster import free_port
from tests.support.driver_runs import our_processes, wait_until
from tests.support.injecting import RunAtWork, write_undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PORT = 6379  # the provider's nodes look for their head there
IDLE_S = 6.0
STORE_BYTES = 128 * 1024**2


def node_type(most: int, **resources: float) -> dict[str, Any]:
    """Up to `most` nodes that have these resources."""
    return {
        "resources": {"object_store_memory": STORE_BYTES, **resources},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
    }


CLUSTER = {
    "cluster_name": "fake",
    "max_workers": 4,
    "upscaling_speed": 100.0,
    "idle_timeout_minutes": IDLE_S / 60.0,
    # the nodes share their machine's address, and nothing is to be set up on them
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{
        f"{name}_commands": []
        for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    },
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
        "engine": node_type(3, CPU=1, engines=1),
        "train": node_type(1, CPU=1, trainers=1),
    },
}


class Timeline:
    """Worker nodes by type, each time that they change: [(seconds, {type: nodes})]."""

    def __init__(self, address: str) -> None:
        self._address, self._started = address, time.monotonic()
        self.seen: list[tuple[float, dict[str, int]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            now = self.nodes()
            if not self.seen or self.seen[-1][1] != now:
                self.seen.append((round(time.monotonic() - self._started, 1), now))

    def nodes(self) -> dict[str, int]:
        """As the autoscaler has it."""
        from ray._raylet import GcsClient

        status = GcsClient(address=self._address).internal_kv_get(b"__autoscaling_status", None)
        report = json.loads(status)["autoscaler_report"] if status else {}
        found = Counter(report.get("active_nodes") or {}) + Counter(report.get("idle_nodes") or {})
        return {name: found[name] for name in ("engine", "train") if found[name]}

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def most(self, name: str) -> int:
        return max(nodes.get(name, 0) for _, nodes in self.seen)


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a head with an autoscaler; all that it started is gone afterwards."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # `ray start` has it on, and this process has loaded ray without it
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(CLUSTER))
    bin_dir = Path(sys.executable).parent
    mark = f"BT_RAY_FAKE_{os.getpid()}"
    env = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", mark: "1"}
    env["PATH"] = f"{bin_dir}{os.pathsep}{env['PATH']}"  # jobs start `python`
    words = [bin_dir / "ray", "start", "--head", "--block", f"--autoscaling-config={config}", f"--port={PORT}"]
    words += [
        "--num-cpus=4",
        f"--object-store-memory={STORE_BYTES}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={free_port()}",
    ]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
    from ray._private.services import get_node_ip_address

    try:
        wait_until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 120.0)
        yield f"{get_node_ip_address()}:{PORT}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        for process in psutil.process_iter():  # nodes of the provider are nobody's children once the monitor is gone
            try:
                if mark in process.environ():
                    process.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def test_engine_nodes_come_for_rollouts_go_for_the_fine_tune_and_all_are_gone_at_the_end(address: str, tmp_path: Path) -> None:
    config = write_undisturbed_run(tmp_path)
    text = config.read_text().replace("engine: {", "engine: {replicas: {min: 0, max: 3}, resources: {engines: 1}, ")
    text = text.replace("w: {method: sft,", "w: {method: sft, resources: {trainers: 1},").replace(
        'strategy: "p -> w"', "strategy: w"
    )
    config.write_text(text)
    timeline = Timeline(address)
    with RunAtWork(config, tmp_path / "run", more=["--address", address]) as run:
        code, output = run.end(1200)
    assert code == 0, output[-3000:]
    wait_until(lambda: not timeline.nodes(), 20 * IDLE_S)
    time.sleep(1.0)
    timeline.end()
    print(timeline.seen)
    assert timeline.most("engine") == 3 and timeline.most("train") == 1
    phases = [nodes for _, nodes in timeline.seen]
    first_train = next(index for index, nodes in enumerate(phases) if nodes.get("train"))
    assert any(nodes.get("engine") == 3 for nodes in phases[:first_train]), "engines for the rollouts, before any trainer"
    training = [nodes for nodes in phases[first_train:] if nodes.get("train")]
    assert any(not nodes.get("engine") for nodes in training), "no engine while it trains"
    assert any(nodes.get("engine") for nodes in phases[phases.index(training[-1]) :]), "engines again for the evaluation"
    assert phases[-1] == {}
    wait_until(lambda: not our_processes(), 60.0)
