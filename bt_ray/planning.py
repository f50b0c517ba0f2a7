"""Which stages may start, and how engines and trainers share the GPUs. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bt_ray.config import EngineConfig, PromptStep, RunConfig, WeightStep
from bt_ray.strategy import StageNode

WORKER_CPUS = 0.5  # of a program worker
STAGE_CPUS = 0.5  # of a stage's own process and what it starts beside the workers
START_TIMEOUT_S = 600.0  # what work waits for room at most, on a cluster that has to start a node first
ROUNDING = 1e-9  # what floating point takes from 0.3 / 0.1


def num_replicas(engine: EngineConfig, reach: Mapping[str, float]) -> int:
    """Engines to hold: as many as `reach` (resources of the cluster at its largest) carries, within `replicas`.

    What counts is the GPUs and the engine's own `resources`. Where there is neither, the least that is asked for:
    engines on the CPUs of one machine would only share its cores.
    """
    bounds = [int(reach.get(name, 0.0) / amount + ROUNDING) for name, amount in engine_needs(engine, reach).items()]
    wanted = min(bounds, default=engine.replicas.min)
    return max(1, engine.replicas.min, min(engine.replicas.max, wanted))


def engine_needs(engine: EngineConfig, reach: Mapping[str, float]) -> dict[str, float]:
    """What one engine takes of the resources that bound its number."""
    gpus = {"GPU": float(engine.tensor_parallel_size)} if reach.get("GPU") else {}
    return {**gpus, **engine.resources}


def engine_counts(config: RunConfig, reach: Mapping[str, float]) -> dict[str, int]:
    """Engines to hold of each of the program's models: the least that each asks for, then by turns what is left.

    GPUs for what single steps start beside them (a proposer's or a teacher's engine) are left free where there are as many.
    """
    engines = config.engines()
    needs = {name: engine_needs(engine, reach) for name, engine in engines.items()}
    most = {name: num_replicas(engine, reach) for name, engine in engines.items()}
    counts = {name: max(1, engine.replicas.min) for name, engine in engines.items()}
    left = {
        **reach,
        "GPU": reach.get("GPU", 0.0) - max((one.tensor_parallel_size for _, one in config.engines_beside()), default=0),
    }
    for resource, amount in _held(config, counts, reach).items():
        left[resource] = left.get(resource, 0.0) - amount

    def fits(name: str) -> bool:
        return all(left[resource] + ROUNDING >= amount for resource, amount in needs[name].items())

    while more := [name for name in engines if counts[name] < most[name] and fits(name)]:
        name = min(more, key=lambda one: counts[one])
        counts[name] += 1
        for resource, amount in needs[name].items():
            left[resource] -= amount
    return counts


def num_program_workers(config: RunConfig, reach: Mapping[str, float]) -> int:
    """Processes that a stage runs the program in: one for each engine to hold, which keeps one busy, on half of its share of the
    CPUs beside the engines at most. The other half is for searches and Ray Data; stages that run side by side share."""
    if config.cluster.program_workers is not None:
        return config.cluster.program_workers
    engine_cpus = _engine_cpus(config, reach) + max((engine.num_cpus for _, engine in config.engines_beside()), default=0.0)
    stages = min(max_parallel(config, reach), len(config.strategy_steps()))
    room = (reach.get("CPU", 0.0) - engine_cpus) / stages / 2 / WORKER_CPUS
    return max(1, min(sum(engine_counts(config, reach).values()), int(room)))


def _held(config: RunConfig, counts: Mapping[str, int], reach: Mapping[str, float]) -> dict[str, float]:
    """Resources that so many engines of each model take."""
    held: dict[str, float] = {}
    for name, engine in config.engines().items():
        for resource, amount in engine_needs(engine, reach).items():
            held[resource] = held.get(resource, 0.0) + counts[name] * amount
    return held


def engines_in_the_way(config: RunConfig, step: WeightStep, reach: Mapping[str, float]) -> bool:
    """Whether the engines are to give their devices back for a fine-tune: its workers do not fit beside them, or none is to
    be held meanwhile (`replicas.min` 0)."""
    held = _held(config, engine_counts(config, reach), reach)
    wanted = {**({"GPU": 1.0} if reach.get("GPU") else {}), **step.resources}
    crowded = any(held.get(name, 0.0) + step.num_workers * amount > reach.get(name, 0.0) for name, amount in wanted.items())
    crowded = crowded or _engine_cpus(config, reach) + training_cpus(step, reach) > reach.get("CPU", math.inf)
    return crowded or not config.engine.replicas.min


def workers_in_the_way(config: RunConfig, step: WeightStep, reach: Mapping[str, float], num_workers: int) -> bool:
    """Whether so many program workers are to end for a fine-tune: its own do not fit beside them and the engines that stay."""
    engines = 0.0 if engines_in_the_way(config, step, reach) else _engine_cpus(config, reach)
    return engines + num_workers * WORKER_CPUS + training_cpus(step, reach) > reach.get("CPU", math.inf)


def training_cpus(step: WeightStep, reach: Mapping[str, float]) -> float:
    """Logical CPUs of a fine-tune's workers: none where each has a GPU."""
    return 0.0 if reach.get("GPU") else float(step.num_workers)


def _engine_cpus(config: RunConfig, reach: Mapping[str, float]) -> float:
    """Logical CPUs of the program's engines."""
    engines = config.engines()
    return sum(count * engines[name].num_cpus for name, count in engine_counts(config, reach).items())


def held_devices(config: RunConfig, reach: Mapping[str, float]) -> int:
    """Devices that the engines of all of the program's models hold: engines x GPUs of each; without GPUs the engines."""
    counts = engine_counts(config, reach)
    return sum(count * config.engines()[name].tensor_parallel_size for name, count in counts.items())


@dataclass(frozen=True)
class CandidateCost:
    """LM calls of one candidate, scored on every search example and then evaluated on `select`."""

    search: int
    select: int


def candidate_cost(search: int, select: int, calls_per_run: float) -> CandidateCost:
    """`search`, `select`: examples. An evaluation runs the followed training example too."""
    return CandidateCost(math.ceil(search * calls_per_run), math.ceil((select + 1) * calls_per_run))


def budget_problem(config: RunConfig, sizes: Mapping[str, int], calls_per_run: float) -> str | None:
    """Why the budget cannot pay for one candidate of any prompt step, with the numbers; None where it can.

    `sizes`: examples by split. Before the first prompt step `vanilla` is evaluated and the teacher runs over the step's
    training examples. The numbers are those of the step that needs the fewest calls.
    """
    budget = config.budget.max_lm_calls
    steps = [config.steps[name] for path in config.strategy_steps() for name in path]
    examples = [
        (step.num_train(sizes["train"]), step.num_search(sizes["search"])) for step in steps if isinstance(step, PromptStep)
    ]
    if budget is None or not examples:
        return None
    train, search = min(examples, key=lambda pair: pair[0] * config.rollout.samples + pair[1])
    cost = candidate_cost(search, sizes["select"], calls_per_run)
    rollouts = math.ceil(train * config.rollout.samples * calls_per_run)
    needed = cost.select + rollouts + cost.search
    if budget >= needed:
        return None
    return (
        f"budget.max_lm_calls: {budget} cannot pay for one candidate of a prompt search. That takes about {needed}: {cost.select} for "
        f"`vanilla` on select, {rollouts} for the rollouts on train, and {cost.search} for the candidate on the {search} "
        f"search examples ({calls_per_run:.3g} calls a run). Raise it, or set data.limit or rollout.samples lower."
    )


def max_parallel(config: RunConfig, reach: Mapping[str, float]) -> int:
    """Branches to run side by side: as many fine-tunes as fit beside the engines.

    On a CPU (no GPUs) the engine holds one set of weights, which branches would only swap back and
    forth; and where a fine-tune sends the engines away, nobody else may generate.
    """
    gpus = int(reach.get("GPU", 0))
    tuned = [step for step in config.steps.values() if isinstance(step, WeightStep)]
    if not gpus or any(engines_in_the_way(config, step, reach) for step in tuned):
        return 1
    return max(1, (gpus - held_devices(config, reach)) // max(step.num_workers for step in tuned)) if tuned else gpus


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
