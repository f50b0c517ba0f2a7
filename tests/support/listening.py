"""Starts a local cluster in this process, uses it, and prints as JSON who of its family listens where."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import psutil

from bt_ray.cluster import DONE, Cluster, _runs
from bt_ray.config import ClusterConfig, EngineConfig
from bt_ray.lm.pool import deploy
from bt_ray.lm.types import LMCall, Sampling, Weights

STUB = "tests.support.stub_engine:StubEngine"
JOB = "import ray, sys; ray.init(address=sys.argv[1]); print('the sum is', ray.get(ray.remote(lambda: 20 + 22).remote()))"


def main() -> None:
    with Cluster(ClusterConfig()) as cluster:
        found = {"answer": _answer(), "job": _job(cluster._gcs_address)}
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        sockets = _sockets(family)
        replicas = [port for name, address, port in sockets if "ServeReplica" in name and address == "::"]
        found |= {"sockets": sockets, "statuses": _statuses(), "replicas": [_call_without_token(port) for port in replicas]}
    left = [process for process in family[1:] if _runs(process)]
    print(json.dumps({**found, "family": len(family), "left": [process.pid for process in left]}))


def _answer() -> str:
    """What a replica on Ray Serve says."""
    pool = deploy("listening", EngineConfig.model_validate({"num_cpus": 0.5}), engine_factory=STUB, start_timeout_s=120)
    weights = Weights("a", "base", "m", "", embedding_id="e")
    call = LMCall(weights, Sampling(), ({"role": "user", "content": "hello"},))
    return asyncio.run(pool.generate(call)).text


def _job(gcs_address: str) -> str:
    """The output of a job that connects to the cluster and runs a task."""
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(f"http://{_job_server()}")
    name = jobs.submit_job(entrypoint=f'{sys.executable} -c "{JOB}" {gcs_address}')
    deadline = time.monotonic() + 120
    while jobs.get_job_status(name).value not in DONE and time.monotonic() < deadline:
        time.sleep(0.5)
    return str(jobs.get_job_logs(name))


def _job_server() -> str:
    import ray

    return str(ray._private.worker.get_dashboard_url())


def _sockets(family: list[psutil.Process]) -> list[list[Any]]:
    """[command, address, port] of every listening socket."""
    found: list[list[Any]] = []
    for process in family:
        try:
            name = " ".join(process.cmdline())[:200]
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found += [[name, one.laddr.ip, one.laddr.port] for one in sockets if one.status == psutil.CONN_LISTEN]
    return found


def _statuses() -> dict[str, int]:
    """HTTP status of requests to the job server without a token."""
    address = urlsplit(f"http://{_job_server()}")
    found = {}
    for method in ("GET", "POST"):
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        connection.request(method, "/api/jobs/", json.dumps({"entrypoint": "true"}), {"Content-Type": "application/json"})
        found[method] = connection.getresponse().status
    return found


def _call_without_token(port: int) -> str:
    """The gRPC status of a call to a replica's port."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=30)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


if __name__ == "__main__":
    main()
