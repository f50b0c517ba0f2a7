"""CPUs and GPUs: what a cluster has and can grow to, what a config asks for, and what can never fit."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_ray.config import ClusterConfig, EngineConfig, RunConfig, WeightStep
from bt_ray.planning import STAGE_CPUS, WORKER_CPUS, num_replicas

MIN_LOGICAL_CPUS = 4
CGROUP_ROOT, CGROUP_MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may keep busy: those of its affinity mask, and no more than its cgroups' CPU quota.

    A quota's broken core counts as none: threads beyond the quota stand still together for the rest of each period.
    """
    # macOS has no affinity masks.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores(CGROUP_ROOT, CGROUP_MEMBERSHIP)
    return cores if quota is None else max(1, min(cores, int(quota)))


def quota_cores(root: Path, membership: Path) -> float | None:
    """Cores of the smallest CPU quota among the cgroups (v2 and v1) that `membership` names; None without one."""
    quotas = []
    for folder in _cgroups(root, membership, "cpu"):
        # v2: "<quota or max> <period>" in one file; v1: one file each, and -1 for no quota.
        one, two = _read(folder / "cpu.max").split(), _read(folder / "cpu.cfs_quota_us").split()
        quota, period = one if len(one) == 2 else (*two, *_read(folder / "cpu.cfs_period_us").split(), "", "")[:2]
        if quota.isdecimal() and period.isdecimal():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> int | None:
    """Bytes of the smallest memory limit among this process's cgroups (v2 and v1); None without one."""
    folders = list(_cgroups(root, membership, "memory"))
    texts = [_read(folder / name).strip() for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def _cgroups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups that may limit `controller`, up to the roots of their trees.

    A container without a cgroup namespace of its own names a path of its host, which is not there: its
    own limits are then at the root.
    """
    for line in _read(membership).splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        trees = [root / names, root / controller] if names else [root, root / "unified"]
        for tree in dict.fromkeys(trees):
            own = tree / path.strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(tree) and folder.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not there, or not ours to read: no limit is known
        return ""


def engines_here(engine: EngineConfig) -> int:
    """CPU engines that share this machine: all of the pool's on a cluster of one node; one where no Ray is connected."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return 1
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]}
    return engines_per_node(num_replicas(engine, {}), engine.num_cpus, nodes.pop(own, 0.0), list(nodes.values()))


def engines_per_node(engines: int, num_cpus: float, own_cpus: float, other_cpus: Sequence[float]) -> int:
    """Engines that a node with `own_cpus` logical CPUs will hold, where Serve spreads them over all nodes with room. Pure."""
    nodes = 1 + sum(cpus >= num_cpus for cpus in other_cpus)
    room = max(1, int(own_cpus // num_cpus))
    return max(1, min(room, math.ceil(engines / nodes)))


def reachable() -> dict[str, float]:
    """Resources that the connected cluster has, or can have once its autoscaler has brought up all nodes.

    An autoscaling cluster that idles shows its head alone: planning by that would put engines on CPUs. What can come is told
    by Ray where its control store knows, by the config of an autoscaler that runs on this machine (the head's, where driver
    and stages run), and by cluster.max_resources.
    """
    import ray
    from ray._private.state import state  # the public API tells what is there, not what can come

    now = {name: float(value) for name, value in ray.cluster_resources().items()}
    own = autoscaler_config(ray.get_runtime_context().gcs_address)
    return grown(now, state.get_max_resources_from_cluster_config() or {}, most_resources(own) if own else {}, _declared)


_declared: dict[str, float] = {}


def declare(config: ClusterConfig) -> None:
    """Have `reachable` of this process count with `cluster.max_resources`."""
    _declared.clear()
    _declared.update(config.max_resources)


def grown(*known: Mapping[str, float]) -> dict[str, float]:
    """The largest of all for each resource; one may be without a resource, or lag behind another. Pure."""
    return {name: max(float(one.get(name, 0.0)) for one in known) for name in {name for one in known for name in one}}


@functools.cache
def autoscaler_config(gcs_address: str) -> Mapping[str, Any] | None:
    """The config that the autoscaler of this cluster was started with, where its process is on this machine."""
    import psutil
    import yaml

    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        named = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        if named and f"--gcs-address={gcs_address}" in words and any(word.endswith("monitor.py") for word in words):
            try:
                return dict(yaml.safe_load(Path(named[0]).expanduser().read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, yaml.YAMLError):  # not ours to read: what is there now counts
                return None
    return None


def node_shapes() -> list[dict[str, float]]:
    """Resources of one node of each kind that the connected cluster has or can bring up; empty where its largest is only
    known as a total (cluster.max_resources, or Ray's own control store)."""
    import ray
    from ray._private.state import state

    if _declared or state.get_max_resources_from_cluster_config():
        return []
    now = [{name: float(value) for name, value in node["Resources"].items()} for node in ray.nodes() if node["Alive"]]
    config = autoscaler_config(ray.get_runtime_context().gcs_address) or {}
    return now + shapes_to_come(config)


def shapes_to_come(config: Mapping[str, Any]) -> list[dict[str, float]]:
    """Resources of one node of each type in an autoscaler's config. Pure."""
    types = [node_type or {} for node_type in (config.get("available_node_types") or {}).values()]
    return [{name: float(value) for name, value in (one.get("resources") or {}).items()} for one in types]


def most_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """Resources of a cluster at its largest, from its autoscaler's config: one head, and `max_workers` of each other type. Pure."""
    most, head = config.get("max_workers", 0), config.get("head_node_type")
    types = {name: node_type or {} for name, node_type in (config.get("available_node_types") or {}).items()}
    total: dict[str, float] = {}
    for resource in dict.fromkeys(resource for node_type in types.values() for resource in node_type.get("resources") or {}):
        amounts = []  # of each worker that may come; no more than `max_workers` are there at a time
        for name, node_type in types.items():
            amount = float((node_type.get("resources") or {}).get(resource, 0.0))
            if name == head:
                total[resource] = amount
            else:
                amounts += [amount] * min(most, node_type.get("max_workers", most))
        total[resource] = total.get(resource, 0.0) + sum(sorted(amounts, reverse=True)[:most])
    return total


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
    engines = list(config.engines().values())
    counts = [max(1, engine.replicas.min) for engine in engines]
    beside = max(  # the largest that a step starts for itself: never two at once
        (engine for _, engine in config.engines_beside()),
        key=lambda engine: (engine.tensor_parallel_size, engine.num_cpus),
        default=None,
    )
    gpus = sum(count * engine.tensor_parallel_size for count, engine in zip(counts, engines, strict=True))
    gpus += beside.tensor_parallel_size if beside else 0
    workers = max((getattr(step, "num_workers", 0) for step in config.steps.values()), default=0)
    generate = sum(count * engine.num_cpus for count, engine in zip(counts, engines, strict=True))
    generate += WORKER_CPUS * (config.cluster.program_workers or 1) + STAGE_CPUS
    generate += beside.num_cpus if beside else 0.0
    return Demand(generate, float(gpus) if has_gpu else 0.0, float(workers), float(workers) if has_gpu else 0.0)


def refusal(config: RunConfig, resources: Mapping[str, float], shapes: Sequence[Mapping[str, float]] = ()) -> str | None:
    """One sentence on what can never fit into `resources` (CPU, GPU of the whole cluster), or onto any one node, or None.

    `shapes`: resources of one node of each kind; where there is none, the total is all that is looked at.
    """
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
    return _unmet(config, resources) or _on_no_node(config, resources, shapes)


def _on_no_node(config: RunConfig, reach: Mapping[str, float], shapes: Sequence[Mapping[str, float]]) -> str | None:
    """As `refusal`, of the pieces that one node must hold whole: an engine's replica, a training worker. The GPUs of an engine
    that takes several may lie on several nodes."""
    gpu = {"GPU": 1.0} if reach.get("GPU") else {}
    pieces: list[tuple[str, Mapping[str, float]]] = [
        ("engine", {"CPU": engine.num_cpus, **(gpu if engine.tensor_parallel_size == 1 else {}), **engine.resources})
        for engine in [*config.engines().values(), *(engine for _, engine in config.engines_beside())]
    ]
    for name, step in config.steps.items():
        if isinstance(step, WeightStep):
            pieces.append((f"steps.{name}: a training worker", {**(gpu or {"CPU": 1.0}), **step.resources}))
    for what, piece in pieces:
        if shapes and not any(all(shape.get(one, 0.0) >= amount for one, amount in piece.items()) for shape in shapes):
            asked = ", ".join(f"{one} {amount:g}" for one, amount in piece.items())
            return f"{what} asks for {asked} on one node, and no node of the cluster has that. Ask for less, or add such nodes."
    return None


def _unmet(config: RunConfig, reach: Mapping[str, float]) -> str | None:
    """As `refusal`, of the resources that the config itself names."""
    together: dict[str, float] = {}
    for engine in config.engines().values():
        for resource, amount in engine.resources.items():
            together[resource] = together.get(resource, 0.0) + max(1, engine.replicas.min) * amount
    asked: list[tuple[str, Mapping[str, float]]] = [("engine", together)]
    asked += [("engine", engine.resources) for _, engine in config.engines_beside()]
    for name, step in config.steps.items():
        workers = getattr(step, "num_workers", 1)
        asked.append((f"steps.{name}", {one: workers * amount for one, amount in getattr(step, "resources", {}).items()}))
    for where, resources in asked:
        for resource, amount in resources.items():
            if amount > reach.get(resource, 0.0):
                return (
                    f"{where}.resources asks for {amount:g} of {resource!r}, and the cluster has {reach.get(resource, 0.0):g} at "
                    "most. Check the name, or add nodes that have it."
                )
    return None


def expected_resources(config: ClusterConfig) -> dict[str, float] | None:
    """What a local cluster will have; None where an existing cluster is to be asked."""
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if config.address or os.environ.get("RAY_ADDRESS") or joined:
        return None
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return {"CPU": float(local_cpus(config, usable_cores())), "GPU": float(gpus)}
