"""The program worker: a long-lived Ray actor that holds the user's program. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

import ray

from bt_ray.environment import end_with_parent
from bt_ray.errors import PoolError
from bt_ray.lm.types import LMPool
from bt_ray.planning import START_TIMEOUT_S, WORKER_CPUS
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.rows import SegmentWriter
from bt_ray.rollout.runner import ProgramRunner
from bt_ray.rollout.tasks import RolloutBatch, RolloutTask
from bt_ray.rollout.watchdog import GRACE_S, LoopWatch

MAX_RESTARTS = 20  # the dispatcher finds out which rows a worker dies of, which takes some deaths
ALONE = -1  # what the number inside says while a batch runs alone
# Requests that wait in one worker, more than there ever are: a question for a sign of life is behind none of them. The rows in
# flight are bounded by `concurrency`.
MAX_CALLS = 1000


class ProgramWorker:
    """Runs batches of rollouts in one process and appends each row as it ends.

    `concurrency` bounds the program runs in flight over all its batches.
    """

    def __init__(self, spec: ProgramSpec, pool: LMPool, concurrency: int = 64) -> None:
        end_with_parent()
        # Its lines hold inputs and answers, as where a ReAct's answer does not parse: rows have them, and no log.
        logging.getLogger("dspy").setLevel(logging.CRITICAL)
        self._runner = ProgramRunner(spec, pool)
        self._slots = asyncio.Semaphore(concurrency)
        self._segments: dict[str, SegmentWriter] = {}
        self._users: Counter[str] = Counter()  # batches that write to each open segment
        self._turns = Turns()
        self._watch = LoopWatch(spec.timeout_s + GRACE_S)

    async def run(self, batch: RolloutBatch) -> None:
        """Run the tasks of a batch that are not done; each row is on disk before this returns, and is read from there.

        Raises PoolError, CanaryError, ConfigError as themselves; the other rows in flight are
        cancelled, and what was written stays.
        """
        self._watch.start(asyncio.get_running_loop())
        async with self._turns.take(batch.alone):
            with marked(batch) if batch.alone else nullcontext():
                await self._run(batch)

    async def _run(self, batch: RolloutBatch) -> None:
        with self._segment(batch.segment) as segment:
            try:
                async with asyncio.TaskGroup() as group:
                    for task in batch.tasks:
                        if task.key not in batch.done:
                            group.create_task(self._one(task, segment))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def ready(self) -> bool:
        """True once program and metric are loaded; an actor that could not load them raises instead. Each answer is a sign of life."""
        return True

    async def _one(self, task: RolloutTask, segment: SegmentWriter) -> None:
        async with self._slots:
            segment.write(await self._runner.run(task))

    @contextmanager
    def _segment(self, path: str) -> Iterator[SegmentWriter]:
        """The open file of a segment, one for all batches that write to it, closed after the last."""
        if path not in self._segments:
            self._segments[path] = SegmentWriter(path)
        self._users[path] += 1
        try:
            yield self._segments[path]
        finally:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]
                self._segments.pop(path).close()


@contextmanager
def marked(batch: RolloutBatch) -> Iterator[None]:
    """Leave the batch's mark while the block lasts. The death of this process leaves it there."""
    batch.mark.parent.mkdir(parents=True, exist_ok=True)
    batch.mark.touch()
    try:
        yield
    finally:
        batch.mark.unlink(missing_ok=True)


class Turns:
    """Lets batches run together, and one that asks for it alone, before any that comes later."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._waiting_alone = 0

    @asynccontextmanager
    async def take(self, alone: bool) -> AsyncIterator[None]:
        """Hold a turn for the block."""
        async with self._changed:
            self._waiting_alone += alone
            try:
                await self._changed.wait_for(
                    lambda: self._inside == 0 if alone else self._inside >= 0 and not self._waiting_alone
                )
            finally:
                self._waiting_alone -= alone
                self._changed.notify_all()  # those that waited for it, where it gave up
            self._inside += ALONE if alone else 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= ALONE if alone else 1
                self._changed.notify_all()


def start_workers(spec: ProgramSpec, pool: LMPool, count: int, concurrency: int = 64) -> list[Any]:
    """Start program workers on the connected cluster and wait until they have loaded the program.

    Returns actor handles; they end with the job that started them. Raises as `await_workers`.
    """
    workers = begin_workers(spec, pool, count, concurrency)
    await_workers(workers, spec, pool)
    return workers


def begin_workers(spec: ProgramSpec, pool: LMPool, count: int, concurrency: int = 64) -> list[Any]:
    """Handles of program workers that start meanwhile."""
    # A call whose worker died is not sent again by Ray: the dispatcher sends only the rows that lack.
    restarts = {"max_restarts": MAX_RESTARTS, "max_task_retries": 0}
    actor = ray.remote(ProgramWorker).options(num_cpus=WORKER_CPUS, max_concurrency=MAX_CALLS, **restarts)
    return [actor.remote(spec, pool, concurrency) for _ in range(count)]


def await_workers(workers: Sequence[Any], spec: ProgramSpec, pool: LMPool) -> None:
    """Return once all have loaded the program; after an error all are stopped.

    Raises ConfigError where program or metric cannot be used, PoolError where the cluster has no
    room for the workers.
    """
    try:
        ray.get([worker.ready.remote() for worker in workers], timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        stop_workers(workers)
        raise PoolError(
            f"{len(workers)} program workers did not start within {START_TIMEOUT_S:g} s; each needs {WORKER_CPUS} logical CPUs. "
            "Look at `ray status`; give the cluster more CPUs or set cluster.program_workers lower."
        ) from None
    except BaseException:
        stop_workers(workers)
        # Ray tells of a failed constructor only in words; loading here gives the error itself.
        ProgramRunner(spec, pool)
        raise


def stop_workers(workers: Sequence[Any]) -> None:
    """End the workers now; rows that were written stay."""
    for worker in workers:
        ray.kill(worker, no_restart=True)
