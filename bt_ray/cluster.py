"""The Ray cluster: start a local one or connect, and submit stage jobs.

A local cluster has token authentication, and its processes listen on loopback, but for two kinds of
socket that listen on all addresses and cannot be told not to:

- the gRPC port of a Serve replica, which answers only to the run's token;
- the rendezvous of torch (TCPStore) in trainers and engines, which knows no token. On a machine that
  others can reach, a firewall must close it.

On loopback itself the Prometheus ports and the dashboard's static pages are read without a token.

A local cluster ends with its driver, whose fate its processes share: a killed driver leaves none behind.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bt_ray.config import ClusterConfig
from bt_ray.config_base import SECRET_NAME
from bt_ray.environment import environment
from bt_ray.errors import ConfigError, StageFailedError
from bt_ray.job_server import LOOPBACK, job_client, job_server_refusal, open_to_all, own_addresses
from bt_ray.ray_switches import loopback_only, own_node, read_ray_switches
from bt_ray.resources import declare, local_cpus, node_shapes, reachable, usable_cores

OBJECT_STORE_BYTES = 1 << 30
QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_process_group_cleanup_enabled": "1",  # a killed replica must not leave its engine behind
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DS_ACCELERATOR_LOG_LEVEL": "ERROR",
}
# A local cluster lives for one run, on cores that the run needs: nobody reads its task list, its metrics or its workers'
# logs as they come, its one node is not taken away with a warning, and workers that wait for work which may never come
# cost their start. A variable that is set counts.
IDLE_LESS = {
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
AGENT_TIMEOUT_S = 120.0
SERVER_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0  # the dashboard's processes notice its end within a few seconds
DONE = ("SUCCEEDED", "FAILED", "STOPPED")

# What a stage job takes over from the job that the driver runs in, so that it finds the same code and packages.
# `config` has the time that their installation may take.
INHERITED = ("working_dir", "py_modules", "pip", "uv", "conda", "image_uri", "py_executable", "config")


def stage_runtime_env(own: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime environment of a stage job, from that of the driver's own job ({} where it is none). Pure."""
    inherited = {name: own[name] for name in INHERITED if own.get(name)}
    # Everyone who reaches the job server can read a job's environment: a secret is set where the nodes start.
    variables = {name: value for name, value in (own.get("env_vars") or {}).items() if not SECRET_NAME.search(name)}
    return {**inherited, "env_vars": {**variables, **QUIET}}


def _own_runtime_env() -> dict[str, Any]:
    import ray

    return dict(ray.get_runtime_context().runtime_env)


def start_job(jobs: Any, job: dict[str, Any]) -> str:
    """Submit a job through a job client; the arguments are those of its `submit_job`. Returns the submission id.

    Raises StageFailedError where the server refuses it, OSError where it breaks off.
    """
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(jobs.submit_job(**job))
        except RuntimeError as error:  # the job client's only own type
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise StageFailedError(
                    f"the job server refuses {job['submission_id']}: {error} See the cluster's dashboard log."
                ) from error
            time.sleep(0.5)  # a fresh cluster takes a while to bring its job agent up


class Cluster:
    """A connected cluster with its job client. Use as a context manager."""

    def __init__(self, config: ClusterConfig):
        self._config = config
        self._jobs: Any = None
        self._gcs_address = ""
        self._owned = self._connected = False
        self._exits = ExitStack()

    def __enter__(self) -> Cluster:
        declare(self._config)
        address = self._config.address or os.environ.get("RAY_ADDRESS")
        joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()  # a notebook's own cluster is used as it is
        self._owned = not address and not joined
        self._connected = not joined
        self._set_environment()
        try:
            if self._owned:
                self._start()
            else:
                self._join(address)
        except BaseException:  # also Ctrl-C: nothing may stay behind
            self.__exit__()
            raise
        return self

    def _join(self, address: str | None) -> None:
        import ray

        if self._connected:
            ray.init(address=address, log_to_driver=False, logging_level="error", namespace="bt_ray")
        self._connect_jobs()

    def __exit__(self, *_: object) -> None:
        import ray

        family = _started_processes() if self._owned else []
        if self._connected:  # ends a cluster that was started here, and only leaves any other
            ray.shutdown()
        _await_end(family)
        self._exits.close()

    def resources(self) -> dict[str, float]:
        return reachable()

    def node_shapes(self) -> list[dict[str, float]]:
        return node_shapes()

    def submit(self, arguments: list[str], submission_id: str, metadata: dict[str, str]) -> None:
        """Start `python -m bt_ray.stages ARGUMENTS` as a Ray job."""
        import shlex

        # The address goes along: where a machine runs several clusters, a job guesses, and may guess wrong.
        python = sys.executable if Path(sys.executable).exists() and self._is_local() else "python"
        entrypoint = shlex.join([python, "-m", "bt_ray.stages", "--address", self._gcs_address, *arguments])
        job = {"entrypoint": entrypoint, "submission_id": submission_id, "metadata": metadata, "entrypoint_num_cpus": 0}
        start_job(self._jobs, {**job, "runtime_env": stage_runtime_env(_own_runtime_env())})

    def status(self, submission_id: str) -> str | None:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None for a job that the server does not know."""
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        while True:
            try:
                return str(self._jobs.get_job_status(submission_id).value)
            except RuntimeError as error:  # the job client's only own type
                if "404" in str(error) or "does not exist" in str(error):
                    return None
                self._wait_for_server(error, deadline)
            except OSError as error:  # what requests raises: refused, reset, timed out
                self._wait_for_server(error, deadline)

    def _wait_for_server(self, error: Exception, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise StageFailedError(
                f"the job server has not answered for {SERVER_TIMEOUT_S:g} s: {error}. Start the cluster again."
            ) from error
        time.sleep(1.0)

    def logs(self, submission_id: str) -> str:
        return str(self._jobs.get_job_logs(submission_id))

    def stop(self, submission_id: str, timeout_s: float = 20.0) -> None:
        """Stop a job and wait for its end."""
        if self.status(submission_id) in (None, *DONE):
            return
        self._jobs.stop_job(submission_id)
        deadline = time.monotonic() + timeout_s
        while self.status(submission_id) not in (None, *DONE) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _is_local(self) -> bool:
        return self._owned or self._gcs_address.rpartition(":")[0] in (*LOOPBACK, *own_addresses())

    def _set_environment(self) -> None:
        """Before ray is imported: it reads these at import or hands them to its processes."""
        defaults = dict(QUIET)
        if self._owned:
            defaults |= IDLE_LESS
            self._exits.callback(read_ray_switches)  # called last, when the environment is as it was
            token = Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix="bt_ray-"))) / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            defaults["RAY_AUTH_TOKEN_PATH"] = str(token)
            # Many small processes on few cores are meant here; without this the raylet warns of them on the terminal.
            defaults["RAY_worker_maximum_startup_concurrency"] = "16"
        wanted = {name: value for name, value in defaults.items() if name not in os.environ}
        if self._owned:
            wanted["RAY_AUTH_MODE"] = "token"  # also where it is switched off for other clusters
            # `python` in a job is this one, also where nobody has activated its environment.
            wanted["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        self._exits.enter_context(environment(wanted))

    def _start(self) -> None:
        import ray

        read_ray_switches()
        with own_node(), loopback_only():
            context = ray.init(
                address="local",  # its own, also beside a cluster that `ray start` left on this machine
                num_cpus=local_cpus(self._config, usable_cores()),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port(),
                log_to_driver=False,
                logging_level="error",
                namespace="bt_ray",
            )
        self._gcs_address = context.address_info["gcs_address"]
        self._job_client(f"http://{context.dashboard_url}")

    def _connect_jobs(self) -> None:
        import ray

        self._gcs_address = ray.get_runtime_context().gcs_address
        url = ray._private.worker.get_dashboard_url()
        if not url:
            raise ConfigError(
                f"the cluster at {self._gcs_address} runs no dashboard, so it has no job server. Start it with the dashboard on."
            )
        self._job_client(url if url.startswith("http") else f"http://{url}")

    def _job_client(self, url: str) -> None:
        server = urlsplit(url)
        if reason := job_server_refusal(server.hostname or "", open_to_all(server), os.environ.get("RAY_AUTH_MODE") == "token"):
            raise ConfigError(reason)
        try:
            self._jobs = job_client(url)
        except (ConnectionError, RuntimeError) as error:
            raise StageFailedError(
                f"the job server at {url} does not answer: {error}. Is the dashboard of the cluster running?"
            ) from None


def _started_processes() -> list[psutil.Process]:
    """The processes of the cluster that this process started, with their descendants."""
    from ray._private import worker

    found: dict[int, psutil.Process] = {}
    for _, process in worker._global_node.live_processes() if worker._global_node else ():
        try:
            root = psutil.Process(process.pid)
            found |= {one.pid: one for one in (root, *root.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _await_end(family: list[psutil.Process]) -> None:
    """Return once none of them runs; what does not end by itself is killed."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (alive := [process for process in family if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        # The dead that nobody collects stay in the table: in a container the first process often does not.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
