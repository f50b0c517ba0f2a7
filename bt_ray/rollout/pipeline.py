"""Drives the program workers: directly for small steps, through Ray Data for large ones.

Both paths send the same batches to the same workers, so rows and their durability are the same.
Which rows exist is read from the workers' segments: a resumed step, and a batch whose worker
died, run only what is missing. Imports neither dspy nor torch.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_ray import errors
from bt_ray.errors import BtRayError
from bt_ray.rollout.dispatch import BATCHES_PER_WORKER, Dispatcher, own_error
from bt_ray.rollout.rows import done_keys, read_rows
from bt_ray.rollout.tasks import Key, RolloutPlan, RolloutRow, RolloutTask

DATA_CPUS = 0.1  # Ray's default of 1 CPU per read or write task hangs a pipeline beside a replica
BLOCK_BATCHES = 4  # batches of one block of the tasks: as many as an actor's task keeps in flight
FAILURE = "failure.json"  # beside the segments: the error that stopped a Ray Data pipeline


def begin_data() -> None:
    """Import Ray Data meanwhile: it takes seconds, in which program workers start and engines take their weights."""
    threading.Thread(target=importlib.import_module, args=("ray.data",), daemon=True).start()


def run_rollouts(plan: RolloutPlan, workers: Sequence[Any], large: bool) -> None:
    """Run the tasks of a plan that have no row yet, on the given ProgramWorker actors.

    `large` goes through Ray Data; its start takes seconds, so small steps go directly. Raises PoolError,
    CanaryError, ConfigError as themselves; PoolError where workers keep dying.
    """
    if large:
        _run_data(plan, workers)
    else:
        run_direct(plan.read_tasks(), workers, plan.segment_dir, plan.chunk_size)


def run_direct(
    tasks: Sequence[RolloutTask], workers: Sequence[Any], segment_dir: str, chunk_size: int = 16
) -> dict[Key, RolloutRow]:
    """Run the tasks that have no row in `segment_dir` yet; returns the rows of all the tasks."""
    done = done_keys(segment_dir)
    missing = [task for task in tasks if task.key not in done]
    asyncio.run(Dispatcher(list(workers), segment_dir).run(missing, chunk_size))
    rows = read_rows(segment_dir)
    return {task.key: rows[task.key] for task in tasks}


class RolloutProxy:
    """The UDF of the Ray Data pipeline: forwards batches to the workers and returns small columns."""

    def __init__(self, plan: RolloutPlan, workers: list[Any]) -> None:
        self._plan = plan
        self._done = done_keys(plan.segment_dir)  # read here: Ray Data builds a proxy that died anew
        self._dispatcher = Dispatcher(workers, plan.segment_dir)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        lines = zip(batch["example"], batch["sample"], strict=True)
        tasks = [self._plan.task(json.loads(text), int(sample)) for text, sample in lines]
        try:
            rows = await self._dispatcher.run([task for task in tasks if task.key not in self._done], self._plan.chunk_size)
        except BtRayError as error:
            _keep_failure(self._plan.segment_dir, error)
            raise
        if len(rows) < len(tasks):  # rows of an earlier attempt
            found = {(row["example_id"], row["sample"]): row for row in rows}
            before = read_rows(self._plan.segment_dir)
            rows = [found.get(task.key) or before[task.key] for task in tasks]
        return {"example_id": [row["example_id"] for row in rows], "sample": [row["sample"] for row in rows]}


def _keep_failure(segment_dir: str, error: BtRayError) -> None:
    """Ray Data hands a UDF's error on as text only; its class and message go this way."""
    path = Path(segment_dir, FAILURE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))


def _kept_failure(segment_dir: str) -> BtRayError | None:
    path = Path(segment_dir, FAILURE)
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    kind = getattr(errors, str(data["type"]), None)
    return kind(data["message"]) if isinstance(kind, type) and issubclass(kind, BtRayError) else None


def _run_data(plan: RolloutPlan, workers: Sequence[Any]) -> None:
    import pyarrow.parquet
    import ray.data

    Path(plan.segment_dir, FAILURE).unlink(missing_ok=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    proxies = max(1, math.ceil(len(workers) / 2))  # each holds up to four batches in flight
    batch_size = plan.chunk_size * BATCHES_PER_WORKER
    # The driver wrote this file itself a moment ago. Ray Data's own reader would list and read it in tasks, whose
    # processes take seconds to start; what makes rows durable are the workers' segments and not the plan's ends.
    tasks = pyarrow.parquet.read_table(plan.tasks_path)
    blocks = [tasks.slice(start, BLOCK_BATCHES * batch_size) for start in range(0, len(tasks), BLOCK_BATCHES * batch_size)]
    try:
        dataset = ray.data.from_arrow(blocks).map_batches(
            RolloutProxy,
            fn_constructor_args=(plan, list(workers)),
            compute=ray.data.ActorPoolStrategy(size=proxies),
            batch_size=batch_size,
            num_cpus=DATA_CPUS,
        )
        for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            pass  # the rows are in the segments; what comes back is only their keys
    except Exception as error:
        raise _kept_failure(plan.segment_dir) or own_error(error) from error
