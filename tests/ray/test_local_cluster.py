"""A local cluster of a run: where its processes listen, whom its job server answers, and what is left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
pytestmark = pytest.mark.slow


def run_module(name: str, **variables: str) -> str:
    """The last line that it prints, in a process of its own: in this one a cluster of other tests may run, which
    would be joined."""
    unwanted = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-m", name], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What holds for other clusters of the user, no authentication, does not hold for this one."""
    return dict(json.loads(run_module("tests.support.listening", RAY_AUTH_MODE="disabled")))


def test_the_processes_of_the_cluster_listen_on_loopback(found: dict[str, Any]) -> None:
    commands = " | ".join(name for name, _, _ in found["sockets"])
    for part in ("gcs_server", "raylet", "dashboard.py", "DashboardAgent", "RuntimeEnvAgent", "ServeReplica", "ServeController"):
        assert part in commands, f"{part} is not among what listens: {commands}"
    beyond = [one for one in found["sockets"] if one[1] not in LOOPBACK]
    assert len(beyond) <= 1 and all("ServeReplica" in name for name, _, _ in beyond), beyond  # see bt_ray/cluster.py


def test_a_replica_answers_nobody_without_the_token(found: dict[str, Any]) -> None:
    assert found["replicas"] == ["UNAUTHENTICATED"]


def test_serve_and_jobs_work_there(found: dict[str, Any]) -> None:
    assert found["answer"] == "a: hello"
    assert "the sum is 42" in found["job"]


def test_the_job_server_answers_nobody_without_the_token(found: dict[str, Any]) -> None:
    assert set(found["statuses"].values()) <= {401, 403} and set(found["statuses"]) == {"GET", "POST"}


def test_nothing_is_left_once_the_cluster_is_left(found: dict[str, Any]) -> None:
    assert found["family"] > 10 and found["left"] == []


def test_a_cluster_started_afterwards_in_the_same_process_has_its_own_token_and_its_own_engines(tmp_path: Path) -> None:
    assert run_module("tests.support.cluster_after", HOME=str(tmp_path)) == "42 ['a: hello', 'a: hello']"
