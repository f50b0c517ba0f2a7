"""What a stage cost in devices' time, and which of its steps another stage ran. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bt_ray.config import EngineConfig

Step = Mapping[str, Any]  # of `facts`: name, kind, stage (that ran it), lm_calls, seconds, workers
FINETUNE = "finetune"


def engine_devices(engines: Iterable[EngineConfig], recorded: int | None) -> dict[str, Any]:
    """{held, exact}: the devices of a generating step, engines x devices of each (tensor parallel), over its models.

    `recorded`: as the run wrote them down at its end. Until then, where a config gives a range of engines, its lower
    end is taken and `exact` is False.
    """
    engines = list(engines)
    least = sum(max(1, engine.replicas.min) * engine.tensor_parallel_size for engine in engines)
    known = recorded is not None or all(engine.replicas.min == engine.replicas.max for engine in engines)
    return {"held": least if recorded is None else recorded, "exact": known}


def device_seconds(steps: Sequence[Step] | None, devices: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{engine, training, total, exact} of the steps that a stage ran itself; None where they are not known.

    - engine: engines x devices of each (tensor parallel) x seconds of its rollouts, searches and evaluations; of a
      program with several models the engines of all, which are up together.
    - training: workers x seconds of its fine-tunes.

    A device is a GPU; without GPUs it is an engine's or a training worker's share of the machine. Counted is the time
    in which a step holds devices, whether they are busy or not: the start of what it needs within the step is in it.
    Not counted: the start of jobs, engines that stand by while a fine-tune runs, attempts that were cut off, and
    engines of a proposer or a teacher beside the run's own. `exact` is False where more engines may have been up.
    """
    if steps is None or devices is None:
        return None
    engine = sum(devices["held"] * step["seconds"] for step in steps if step["kind"] != FINETUNE)
    training = sum(step["workers"] * step["seconds"] for step in steps if step["kind"] == FINETUNE)
    generated = any(step["kind"] != FINETUNE for step in steps)
    return {
        "engine": round(engine, 3),
        "training": round(training, 3),
        "total": round(engine + training, 3),
        "exact": bool(devices["exact"]) or not generated,
    }


def own_steps(stage: Mapping[str, Any]) -> list[Step] | None:
    """The steps of a stage of `facts` that it ran itself: what its calls, tokens and seconds are of."""
    steps = stage.get("steps")
    return None if steps is None else [step for step in steps if step["stage"] == stage["id"]]


def shared_steps(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps that a stage of `facts` used and another stage had run: they are in that stage's cost."""
    names = ("kind", "stage", "lm_calls", "seconds")
    return [{name: step[name] for name in names} for step in stage.get("steps") or () if step["stage"] != stage["id"]]


def total_devices(found: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Sum of `device_seconds` over stages; None where one is None."""
    parts = list(found)
    if not parts or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    sums = {name: round(sum(part[name] for part in known), 3) for name in ("engine", "training", "total")}
    return {**sums, "exact": all(part["exact"] for part in known)}
