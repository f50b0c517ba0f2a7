"""Sends chunks of tasks to the program workers, and finds out which rows a worker dies of.

A worker's death says nothing of which row was to blame: several ran in it. So what a dead worker left is sent again row by
row, a row that was there at two deaths waits until the others are done, and one that ends its worker alone, twice, is a row
with that reason. A worker may die before such a row has begun in it, of another that had its turn before: the mark that the
worker leaves (`RolloutBatch.mark`) tells. Many such rows are no fault of the rows.
A worker that gives no sign of life is ended (`heartbeat`), which is a death like another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bt_ray.errors import BtRayError, PoolError
from bt_ray.rollout.heartbeat import WorkerSilent, answers, outcome
from bt_ray.rollout.rows import SUFFIX, SegmentWriter, keys_in
from bt_ray.rollout.tasks import BATCHES_PER_WORKER, RolloutBatch, RolloutRow, RolloutTask, candidate_id, chunks

logger = logging.getLogger(__name__)

DEATHS_IN_COMPANY = 2  # deaths that a row was there at, before it waits to be run alone
DEATHS_ALONE = 2
TRIES_ALONE = 20  # the others of a step that end their workers are fewer
MAX_CRASHED = 3  # examples that ended their workers before the step gives up
RESTART_PAUSE_S = 0.2
RESTART_TIMEOUT_S = 60.0  # after that the others have the dead worker's share


class WorkerDied(Exception):
    """A worker ended while it ran what it was sent. `segment`: the file with what it wrote before."""

    def __init__(self, segment: str, reason: str) -> None:
        super().__init__(reason)
        self.segment = segment


@dataclass
class _Chunk:
    tasks: tuple[RolloutTask, ...]
    deaths: int = 0


@dataclass
class _Work:
    """What is left of one call of `Dispatcher.run`."""

    queue: deque[_Chunk]
    suspects: list[_Chunk] = field(default_factory=list)


@dataclass
class Dispatcher:
    """Sends chunks of tasks to the workers, and sends again what a dead worker left.

    `silence_s`: as `limit_s` of `heartbeat.outcome`.
    """

    workers: list[Any]
    segment_dir: str
    silence_s: float
    in_flight: dict[int, int] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    crashed: set[str] = field(default_factory=set)

    async def run(self, tasks: Sequence[RolloutTask], chunk_size: int) -> None:
        """Return once the rows of the tasks are in segments. Raises PoolError where rows of many examples end their workers."""
        # Small steps: spread over all workers before filling one.
        size = max(1, min(chunk_size, math.ceil(len(tasks) / (len(self.workers) * BATCHES_PER_WORKER))))
        work = _Work(deque(_Chunk(part) for part in chunks(tasks, size)))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(work.queue), len(self.workers) * BATCHES_PER_WORKER)):
                    group.create_task(self._drain(work))
            # Many examples are found out sooner by their first samples.
            suspects = deque(sorted(work.suspects, key=lambda chunk: chunk.tasks[0].sample))
            async with asyncio.TaskGroup() as group:
                for _ in self.workers:
                    group.create_task(self._one_by_one(suspects))
        except ExceptionGroup as group_error:
            first = group_error.exceptions[0]
            raise own_error(first) from first

    async def _drain(self, work: _Work) -> None:
        while work.queue:
            chunk = work.queue.popleft()
            try:
                await self._send(chunk.tasks, alone=False)
            except WorkerDied as death:
                await self._left_over(chunk, work, death)

    async def _send(self, tasks: tuple[RolloutTask, ...], alone: bool) -> None:
        from ray.exceptions import RayActorError

        index = self._next_worker()
        worker = self.workers[index]
        self.in_flight[index] = self.in_flight.get(index, 0) + 1
        reference = worker.run.remote(self._batch(tasks, worker, alone))
        try:
            await outcome(worker, reference, self.silence_s)
        except asyncio.CancelledError:
            import ray

            ray.cancel(reference)  # stops the rows in flight, and so the pool's calls
            raise
        except (RayActorError, WorkerSilent) as error:
            self.deaths[index] = self.deaths.get(index, 0) + 1
            await _restart(worker)
            raise WorkerDied(segment_path(self.segment_dir, worker), str(error)) from error
        finally:
            self.in_flight[index] -= 1

    def _batch(self, tasks: tuple[RolloutTask, ...], worker: Any, alone: bool) -> RolloutBatch:
        return RolloutBatch(tasks, segment_path(self.segment_dir, worker), alone=alone)

    async def _left_over(self, chunk: _Chunk, work: _Work, death: WorkerDied) -> None:
        """What a dead worker left, and did not write, is sent again, row by row."""
        written = await asyncio.to_thread(keys_in, death.segment)  # of a large step it takes a while
        left = [_Chunk((task,), chunk.deaths + 1) for task in chunk.tasks if task.key not in written]
        logger.warning("a program worker died; %d rows run again (%s)", len(left), death)
        for one in left:
            (work.suspects if one.deaths >= DEATHS_IN_COMPANY else work.queue).append(one)

    async def _one_by_one(self, suspects: deque[_Chunk]) -> None:
        while suspects:
            await self._alone(suspects.popleft().tasks[0])

    async def _alone(self, task: RolloutTask) -> None:
        """See to the row of a task that nothing runs beside in its worker: what that dies of is this row, or comes from outside."""
        mark = self._batch((task,), self.workers[0], alone=True).mark
        mark.unlink(missing_ok=True)  # of an earlier run that was killed
        deaths = 0
        for _ in range(TRIES_ALONE):
            try:
                return await self._send((task,), alone=True)
            except WorkerDied as death:
                last = death
            if task.key in await asyncio.to_thread(keys_in, last.segment):
                return None
            deaths += mark.exists()
            mark.unlink(missing_ok=True)
            if deaths == DEATHS_ALONE:
                return self._crashed(task, last)
        raise PoolError(
            f"Program workers died {TRIES_ALONE} times before example {task.key[0]} could run in one: {last}. "
            "Look at the memory of the nodes and at the Ray logs of the workers."
        )

    def _crashed(self, task: RolloutTask, error: Exception) -> None:
        """Write the row of a task that its worker does not survive. Raises PoolError after too many."""
        self.crashed.add(task.key[0])
        if len(self.crashed) > MAX_CRASHED:
            raise PoolError(
                f"Program workers died while each of the examples {', '.join(sorted(self.crashed))} ran alone: {error}. "
                "Run the program on one of them by itself; it takes too much memory, or its native code crashes."
            )
        message = (
            "the process that ran the program and the metric died of this row: too much memory, native code that crashes or "
            "never returns, a coroutine that blocks for longer than rollout.timeout_s, or code that suspends it"
        )
        row: RolloutRow = {
            "example_id": task.key[0],
            "sample": task.sample,
            "candidate_id": candidate_id(task.candidate),
            "weights_id": task.weights.id,
            "prediction": None,
            "score": None,
            "accept": False,
            "feedback": None,
            "error": {"kind": "crash", "message": message},
            "calls": [],
            "seconds": 0.0,
        }
        segment = SegmentWriter(f"{self.segment_dir}/crashed-{uuid.uuid4().hex}{SUFFIX}")
        try:
            segment.write(row)
        finally:
            segment.close()

    def _next_worker(self) -> int:
        return min(range(len(self.workers)), key=lambda i: (self.deaths.get(i, 0), self.in_flight.get(i, 0), i))


async def _restart(worker: Any) -> None:
    """Return once a worker that died is there again: what is sent before that fails without having run."""
    with suppress(TimeoutError):
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            while not await answers(worker):
                await asyncio.sleep(RESTART_PAUSE_S)


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
