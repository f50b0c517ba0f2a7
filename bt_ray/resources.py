"""CPUs and GPUs: what a cluster has and can grow to, what a config asks for, and what can never fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bt_ray.config import ClusterConfig, RunConfig

MIN_LOGICAL_CPUS = 4


def reachable() -> dict[str, float]:
    """Resources that the connected cluster has, or can have once its autoscaler has brought up all nodes.

    An autoscaling cluster that idles shows its head alone: planning by that would put engines on CPUs.
    """
    import ray
    from ray._private.state import state  # the public API tells what is there, not what can come

    now = {name: float(value) for name, value in ray.cluster_resources().items()}
    return grown(now, state.get_max_resources_from_cluster_config() or {})


def grown(now: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """The larger of both for each resource; `most` may be without a resource, or lag behind `now`. Pure."""
    return {name: max(float(now.get(name, 0.0)), float(most.get(name, 0.0))) for name in {*now, *most}}


def reachable_gpus() -> int:
    """GPUs of the connected cluster at its largest."""
    return int(reachable().get("GPU", 0.0))


def local_cpus(config: ClusterConfig, cores: int) -> int:
    """Logical CPUs of a local cluster. Pure.

    More than the cores: replica, trainer, program workers and Tune trials take turns, and Ray
    must be able to place all of them.
    """
    return config.num_cpus or max(MIN_LOGICAL_CPUS, 2 * cores)


@dataclass(frozen=True)
class Demand:
    """What one config asks of a cluster at the same time: generating, and training."""

    generate_cpus: float
    generate_gpus: float
    train_cpus: float
    train_gpus: float


def demand(config: RunConfig, has_gpu: bool) -> Demand:
    """Resources that the config needs at the least. Pure."""
    engines = max(1, config.engine.replicas.min)
    gpus = float(engines * config.engine.tensor_parallel_size) if has_gpu else 0.0
    workers = max((getattr(step, "num_workers", 0) for step in config.steps.values()), default=0)
    generate = engines * config.engine.num_cpus + 0.5 * config.cluster.program_workers + 0.5
    return Demand(generate, gpus, float(workers), float(workers) if has_gpu else 0.0)


def refusal(config: RunConfig, resources: Mapping[str, float]) -> str | None:
    """One sentence on what can never fit into `resources` (CPU, GPU of the whole cluster), or None."""
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    need = demand(config, gpus > 0)
    if config.engine.tensor_parallel_size > 1 and gpus < config.engine.tensor_parallel_size:
        return (
            f"engine.tensor_parallel_size asks for {config.engine.tensor_parallel_size} GPUs for each engine, and the cluster "
            f"has {gpus:g} at most. Lower it to 1, or add GPU nodes."
        )
    if need.generate_gpus > gpus:
        return f"engine.replicas.min asks for {need.generate_gpus:g} GPUs, and the cluster has {gpus:g} at most. Lower it, or add GPU nodes."
    if need.train_gpus > gpus:
        return f"steps: num_workers asks for {need.train_gpus:g} GPUs, and the cluster has {gpus:g} at most. Lower num_workers."
    if need.generate_cpus > cpus:
        return (
            f"the engines and program workers ask for {need.generate_cpus:g} logical CPUs, and the cluster has {cpus:g} at most. "
            "Lower engine.replicas.min, cluster.program_workers, or raise cluster.num_cpus."
        )
    if need.train_cpus > cpus:
        return f"steps: num_workers asks for {need.train_cpus:g} logical CPUs, and the cluster has {cpus:g} at most. Lower num_workers."
    return None


def expected_resources(config: ClusterConfig) -> dict[str, float] | None:
    """What a local cluster will have; None where an existing cluster is to be asked."""
    if config.address or os.environ.get("RAY_ADDRESS"):
        return None
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return {"CPU": float(local_cpus(config, os.cpu_count() or 1)), "GPU": float(gpus)}
