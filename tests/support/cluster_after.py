"""Starts a cluster by ray's own means, after a local one of ours was left in this process, and prints what a task says."""

from __future__ import annotations

from bt_ray.cluster import Cluster
from bt_ray.config import ClusterConfig


def main() -> None:
    with Cluster(ClusterConfig()):
        pass
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, configure_logging=False)
    try:
        print(ray.get(ray.remote(lambda: 20 + 22).remote()))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
