"""Drives the program workers: directly for small steps, through Ray Data for large ones.

Both paths send the same batches to the same workers, so rows and their durability are the same.
Which rows exist is read from the workers' segments: a resumed step, and a batch whose worker
died, run only what is missing. Imports neither dspy nor torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray import errors
from bt_ray.errors import BtRayError, PoolError
from bt_ray.rollout.rows import SUFFIX, done_keys, read_rows
from bt_ray.rollout.tasks import Key, RolloutBatch, RolloutPlan, RolloutRow, RolloutTask, chunks

logger = logging.getLogger(__name__)

DATA_CPUS = 0.1  # Ray's default of 1 CPU per read or write task hangs a pipeline beside a replica
BATCHES_PER_WORKER = 2  # one runs, one waits, so that a worker never idles
MAX_DEATHS = 4  # deaths of a worker with the same rows before the step gives up
RESTART_PAUSE_S = 0.2
BLOCK_BATCHES = 4  # batches of one block of the tasks: as many as an actor's task keeps in flight
FAILURE = "failure.json"  # beside the segments: the error that stopped a Ray Data pipeline


def run_rollouts(plan: RolloutPlan, workers: Sequence[Any], large: bool) -> None:
    """Run the tasks of a plan that have no row yet, on the given ProgramWorker actors.

    `large` goes through Ray Data; its start takes seconds, so small steps go directly. Raises PoolError, CanaryError, ConfigError as themselves; PoolError
    where workers keep dying.
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


@dataclass
class _Chunk:
    tasks: tuple[RolloutTask, ...]
    deaths: int = 0


@dataclass
class Dispatcher:
    """Sends chunks of tasks to the workers and sends again what a dead worker left."""

    workers: list[Any]
    segment_dir: str
    in_flight: dict[int, int] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)

    async def run(self, tasks: Sequence[RolloutTask], chunk_size: int) -> list[RolloutRow]:
        """Run the tasks and return their rows, in no order."""
        # Small steps: spread over all workers before filling one.
        size = max(1, min(chunk_size, math.ceil(len(tasks) / (len(self.workers) * BATCHES_PER_WORKER))))
        queue = deque(_Chunk(part) for part in chunks(tasks, size))
        rows: list[RolloutRow] = []
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(queue), len(self.workers) * BATCHES_PER_WORKER)):
                    group.create_task(self._drain(queue, rows))
        except ExceptionGroup as group_error:
            first = group_error.exceptions[0]
            raise own_error(first) from first
        return rows

    async def _drain(self, queue: deque[_Chunk], rows: list[RolloutRow]) -> None:
        from ray.exceptions import RayActorError

        while queue:
            chunk = queue.popleft()
            index = self._next_worker()
            self.in_flight[index] = self.in_flight.get(index, 0) + 1
            try:
                rows.extend(await self._send(index, chunk))
            except RayActorError as error:
                self.deaths[index] = self.deaths.get(index, 0) + 1
                chunk = self._left_over(chunk, rows, error)
                if chunk.tasks:
                    queue.append(chunk)
                await asyncio.sleep(RESTART_PAUSE_S * chunk.deaths)
            finally:
                self.in_flight[index] -= 1

    async def _send(self, index: int, chunk: _Chunk) -> list[RolloutRow]:
        worker = self.workers[index]
        reference = worker.run.remote(RolloutBatch(chunk.tasks, segment_path(self.segment_dir, worker)))
        try:
            return await reference
        except asyncio.CancelledError:
            import ray

            ray.cancel(reference)  # stops the rows in flight, and so the pool's calls
            raise

    def _left_over(self, chunk: _Chunk, rows: list[RolloutRow], error: Exception) -> _Chunk:
        """The part of a chunk that a dead worker did not write; what it wrote joins `rows`."""
        written = read_rows(self.segment_dir)
        chunk.deaths += 1
        rows.extend(written[task.key] for task in chunk.tasks if task.key in written)
        chunk.tasks = tuple(task for task in chunk.tasks if task.key not in written)
        names = ", ".join(task.key[0] for task in chunk.tasks[:5])
        if chunk.tasks and chunk.deaths >= MAX_DEATHS:
            raise PoolError(
                f"A program worker died {chunk.deaths} times while it ran the examples {names}: {error}. "
                "Run the program on them alone; it takes too much memory, or its native code crashes."
            )
        logger.warning("a program worker died; %d rows run again (%s ...)", len(chunk.tasks), names)
        return chunk

    def _next_worker(self) -> int:
        return min(range(len(self.workers)), key=lambda i: (self.deaths.get(i, 0), self.in_flight.get(i, 0), i))


def segment_path(segment_dir: str, worker: Any) -> str:
    """The file of one worker: named by its actor, so that two attempts of a step never share one."""
    return f"{segment_dir}/{worker._actor_id.hex()}{SUFFIX}"


def own_error(error: BaseException) -> BaseException:
    """The project's own error inside what Ray wrapped around it, else the error as it is."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if type(cause) is not type(current) and isinstance(cause, BtRayError):
            return cause
        if isinstance(current, BtRayError) and type(current).__module__ == BtRayError.__module__:
            return current
        current = cause if isinstance(cause, BaseException) else current.__cause__ or current.__context__
    return error


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
