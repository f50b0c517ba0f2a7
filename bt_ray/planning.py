"""Which stages may start, and how engines and trainers share the GPUs. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bt_ray.config import EngineConfig
from bt_ray.strategy import StageNode


def num_replicas(engine: EngineConfig, gpus: int) -> int:
    """Engines to hold: as many as the GPUs carry, within `replicas`; without GPUs the least that is asked for."""
    wanted = gpus // engine.tensor_parallel_size if gpus else engine.replicas.min
    return max(1, engine.replicas.min, min(engine.replicas.max, wanted))


def must_yield(gpus: int, engine_gpus: int, training_gpus: int) -> bool:
    """Whether the engines must give their GPUs back before a fine-tune can be placed."""
    return engine_gpus + training_gpus > gpus


def max_parallel(gpus: int, engine_gpus: int, training_gpus: int) -> int:
    """Branches to run side by side: as many fine-tunes as fit beside the engines.

    On a CPU (no GPUs) the engine holds one set of weights, which branches would only swap back and
    forth; and where a fine-tune takes the engines' GPUs, nobody else may generate.
    """
    if not gpus or must_yield(gpus, engine_gpus, training_gpus):
        return 1
    return max(1, (gpus - engine_gpus) // training_gpus) if training_gpus else gpus


def ready(nodes: Iterable[StageNode], states: Mapping[str, str], max_parallel: int) -> list[StageNode]:
    """Stages to start now: parent done, not yet started, at most `max_parallel` running at once."""
    nodes = list(nodes)
    running = sum(1 for node in nodes if states.get(node.id) == "running")
    startable = [
        node
        for node in nodes
        if states.get(node.id, "pending") == "pending" and (node.parent is None or states.get(node.parent.id) == "done")
    ]
    return startable[: max(0, max_parallel - running)]


def blocked(nodes: Iterable[StageNode], states: Mapping[str, str]) -> list[StageNode]:
    """Pending stages whose parent was skipped or failed: they can never start."""
    return [
        node
        for node in nodes
        if node.parent and states.get(node.id, "pending") == "pending" and states.get(node.parent.id) in ("skipped", "failed")
    ]
