"""What can be said of a cluster without one: job servers that are refused, cores, and engines on a node."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

from bt_ray import cluster, job_server, node_check, resources
from bt_ray.cluster import IDLE_LESS, Cluster
from bt_ray.config import ClusterConfig, WeightStep
from bt_ray.errors import ConfigError
from bt_ray.job_server import job_server_refusal, open_to_all
from bt_ray.lm.types import Weights
from bt_ray.ray_switches import loopback_only, own_node
from bt_ray.training import run as training_run
from bt_ray.training.job import TrainJob

ROOT = Path(__file__).parents[2]
ME = "127.0.0.2"  # Linux answers at all of 127.0.0.0/8: it stands for an address of this machine beyond loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_job_server_on_loopback_needs_no_token(host: str) -> None:
    assert job_server_refusal(host, open_at=None, has_token=False) is None


def test_a_job_server_beyond_loopback_needs_a_token_on_both_sides() -> None:
    assert job_server_refusal("10.0.0.7", open_at=None, has_token=True) is None
    assert "no token is set here" in (job_server_refusal("10.0.0.7", open_at=None, has_token=False) or "")
    # A token that is set here does not help where the server asks for none.
    assert "answers anyone at 10.0.0.7" in (job_server_refusal("10.0.0.7", open_at="10.0.0.7", has_token=True) or "")
    # A head started with --dashboard-host=0.0.0.0 may still say 127.0.0.1.
    assert "--dashboard-host=127.0.0.1" in (job_server_refusal("127.0.0.1", open_at="10.0.0.7", has_token=False) or "")


@contextmanager
def answering(host: str, status: int) -> Iterator[int]:
    """A server at `host` that answers every GET with `status`; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("bound", "status", "named", "expected"),
    [
        ("127.0.0.1", 200, "127.0.0.1", None),
        ("0.0.0.0", 200, "127.0.0.1", ME),
        ("0.0.0.0", 200, ME, ME),
        ("0.0.0.0", 401, "127.0.0.1", None),
        ("0.0.0.0", 401, ME, None),
    ],
)
def test_where_a_job_server_answers_without_a_token_is_asked_of_the_server(
    monkeypatch: pytest.MonkeyPatch, bound: str, status: int, named: str, expected: str | None
) -> None:
    monkeypatch.setattr(job_server, "own_addresses", lambda: [ME])
    with answering(bound, status) as port:
        assert open_to_all(urlsplit(f"http://{named}:{port}")) == expected


def test_a_cluster_whose_job_server_is_open_to_all_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with answering("0.0.0.0", 200) as port, pytest.raises(ConfigError, match=f"answers anyone at {ME}"):
        Cluster(ClusterConfig())._job_client(f"http://{ME}:{port}")


def test_a_job_server_that_takes_a_request_and_falls_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    monkeypatch.setattr(job_server, "GET_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(requests.Timeout):
        job_server.job_client(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert issubclass(requests.Timeout, OSError), "what the driver and `submit` take as a server that does not answer"


def test_own_addresses_are_beyond_loopback() -> None:
    assert not [one for one in job_server.own_addresses() if one.startswith("127.") or one == "::1"]


def test_a_local_cluster_starts_on_loopback_and_leaves_ray_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    with loopback_only():
        assert services.get_node_ip_address() == services.resolve_ip_for_localhost("localhost") == "127.0.0.1"
        assert os.environ[name] == "0"
    assert ray_constants.ENABLE_RAY_CLUSTER and name not in os.environ


def test_a_node_of_ones_own_has_no_log_monitor_and_ray_is_left_as_it_was() -> None:
    from ray._private import parameter

    original = parameter.RayParams
    with own_node():
        made = parameter.RayParams()
        assert made.include_log_monitor is False and made.dashboard_agent_listen_port == 0
    assert parameter.RayParams is original


@pytest.mark.parametrize("owned", [True, False])
def test_only_a_cluster_of_ones_own_goes_without_what_nobody_reads(owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = IDLE_LESS
    monkeypatch.setenv(first, "7")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    mine = Cluster(ClusterConfig())
    mine._owned = owned
    mine._set_environment()
    try:
        assert os.environ[first] == "7", "what the user sets counts"
        assert {name: os.environ.get(name) for name in others} == {name: IDLE_LESS[name] if owned else None for name in others}
    finally:
        mine._exits.close()
    assert not set(others) & set(os.environ)


def test_a_cluster_of_ones_own_has_a_token_whatever_holds_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    mine = Cluster(ClusterConfig())
    mine._owned = True
    mine._set_environment()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(token.read_text()) == 64 and token.stat().st_mode & 0o077 == 0
    mine._exits.close()
    assert os.environ["RAY_AUTH_MODE"] == "disabled" and "RAY_AUTH_TOKEN_PATH" not in os.environ and not token.exists()


def test_what_does_not_end_by_itself_is_killed_and_the_dead_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(["true"])  # a zombie until somebody collects it
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    monkeypatch.setattr(cluster, "END_TIMEOUT_S", 1000.0)
    cluster._await_end([psutil.Process(dead.pid)])
    monkeypatch.setattr(cluster, "END_TIMEOUT_S", 0.1)
    stubborn = subprocess.Popen(["sleep", "1000"])
    cluster._await_end([psutil.Process(stubborn.pid), psutil.Process(dead.pid)])
    assert stubborn.wait(10) == -signal.SIGKILL and dead.wait() == 0


# -- cores ---------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "200000 100000\n", "cpu.cfs_quota_us": "-1"}, 2.0),
        # systemd's slices: the smallest quota on the way to the root holds
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "150000 100000"}, 1.5),
        # a container that names its cgroup as its host does
        ("0::/docker/123\n", {"cpu.max": "400000 100000"}, 4.0),
        # v1
        ("3:cpu,cpuacct:/d\n", {"cpu,cpuacct/d/cpu.cfs_quota_us": "250000", "cpu,cpuacct/d/cpu.cfs_period_us": "50000"}, 5.0),
        ("3:cpu,cpuacct:/d\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("2:cpuset:/\n1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_a_quota_is_found_in_both_versions_of_cgroups(
    tmp_path: Path, membership: str, files: dict[str, str], cores: float | None
) -> None:
    root = write(tmp_path / "cgroup", {**files, "placeholder": ""})
    write(tmp_path, {"self": membership})
    assert resources.quota_cores(root, tmp_path / "self") == cores
    assert resources.quota_cores(root, tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 64), (2.0, 2), (2.9, 2), (0.5, 1), (128.0, 64)])
def test_usable_cores_are_no_more_than_mask_and_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(resources, "quota_cores", lambda *_: quota)
    assert resources.usable_cores() == cores


def test_the_smallest_memory_limit_holds(tmp_path: Path) -> None:
    root = write(tmp_path / "v2", {"a/memory.max": "1000\n", "a/b/memory.max": "max\n"})
    write(tmp_path, {"self": "0::/a/b\n", "old": "4:memory:/c\n"})
    assert resources.memory_limit(root, tmp_path / "self") == 1000
    old = write(tmp_path / "v1", {"memory/c/memory.limit_in_bytes": "2000\n", "memory/memory.limit_in_bytes": "3000\n"})
    assert resources.memory_limit(old, tmp_path / "old") == 2000
    assert resources.memory_limit(old, tmp_path / "self") is None


def test_a_local_cluster_and_its_trainers_count_usable_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(resources, "quota_cores", lambda *_: 6.0)
    found = resources.expected_resources(ClusterConfig())
    assert found is not None and found["CPU"] == 12.0
    started = mock.MagicMock()
    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr(Cluster, "_job_client", lambda self, url: None)
    Cluster(ClusterConfig())._start()
    assert started.call_args.kwargs["num_cpus"] == 12
    assert started.call_args.kwargs["address"] == "local"  # or ray joins one that `ray start` left on the machine
    step = WeightStep.model_validate({"method": "sft", "num_workers": 2})
    job = TrainJob("rows", Weights("1", "base", "/b", "/b"), {}, str(tmp_path), str(tmp_path), "n", 0, 100)
    config = training_run._trainer(job, step, False).run_config
    assert config.worker_runtime_env["env_vars"]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("engines", "num_cpus", "own", "others", "expected"),
    [
        (1, 1.0, 8.0, [], 1),
        (4, 1.0, 8.0, [], 4),
        (4, 1.0, 8.0, [8.0], 2),
        (3, 1.0, 8.0, [8.0], 2),
        (4, 1.0, 8.0, [0.0], 4),  # a head without CPUs holds no engine
        (4, 4.0, 8.0, [], 2),  # no more have room
        (4, 16.0, 8.0, [], 1),
    ],
)
def test_engines_that_share_a_node(engines: int, num_cpus: float, own: float, others: list[float], expected: int) -> None:
    assert resources.engines_per_node(engines, num_cpus, own, others) == expected


def test_what_an_autoscaling_cluster_has_at_its_largest_follows_from_its_config() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert resources.most_resources(config) == {"CPU": 8.0 + 4 * 8 + 2 * 48, "GPU": 4.0 + 2 * 4, "engines": 4.0, "trainers": 8.0}
    types = {"head": {"resources": {"CPU": 2}, "max_workers": 0}, "more": {"resources": {"engines": 1, "CPU": 4}}}
    cluster_of = {"head_node_type": "head", "available_node_types": types}
    found = resources.most_resources({"max_workers": 3, **cluster_of})
    assert found == {"CPU": 14.0, "engines": 3.0}
    types |= {"large": {"resources": {"CPU": 16}, "max_workers": 8}, "bare": {"resources": None}}
    assert resources.most_resources({"max_workers": 2, **cluster_of}) == {"CPU": 34.0, "engines": 2.0}
    assert resources.grown({"CPU": 2.0}, {}, found, {"GPU": 8.0}) == {"CPU": 14.0, "engines": 3.0, "GPU": 8.0}


def test_the_autoscaler_of_this_cluster_is_found_by_its_address(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("{max_workers: 3}")
    (tmp_path / "monitor.py").write_text("input()")
    words = [
        sys.executable,
        str(tmp_path / "monitor.py"),
        "--gcs-address=10.1.2.3:1",
        f"--autoscaling-config={tmp_path}/cluster.yaml",
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        try:
            assert resources.autoscaler_config("10.1.2.3:1") == {"max_workers": 3}
            assert resources.autoscaler_config("10.1.2.3:2") is None
        finally:
            process.kill()


def test_a_run_directory_that_some_node_does_not_see_is_refused_by_name() -> None:
    assert node_check.refusal(Path("/runs/a"), {"one": True, "two": True}) is None
    reason = node_check.refusal(Path("/runs/a"), {"one": True, "two": False, "three": False})
    assert reason is not None and "/runs/a is not the same folder on every node: three, two cannot see" in reason
