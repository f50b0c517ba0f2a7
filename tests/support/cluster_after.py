"""Starts a cluster by ray's own means, after a local one of ours was left in this process; prints what a task and an engine say there."""

from __future__ import annotations

import asyncio

from bt_ray.cluster import Cluster
from bt_ray.config import ClusterConfig, EngineConfig
from bt_ray.lm.pool import deploy
from bt_ray.lm.types import LMCall, Sampling, Weights


def ask() -> str:
    pool = deploy("stub", EngineConfig(num_cpus=0.5), engine_factory="tests.support.stub_engine:StubEngine")
    weights = Weights(id="a", kind="base", model_dir="m", base_dir="", embedding_id="e")
    return asyncio.run(pool.generate(LMCall(weights, Sampling(), ({"role": "user", "content": "hello"},)))).text


def main() -> None:
    with Cluster(ClusterConfig()):
        first = ask()
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        print(ray.get(ray.remote(lambda: 20 + 22).remote()), [first, ask()])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
