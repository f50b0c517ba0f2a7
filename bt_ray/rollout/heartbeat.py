"""Looks at program workers from outside: a process that is suspended, or whose host went away, ends nothing inside itself.

How long a batch may take has no bound: its rows wait for slots and for turns. So what is asked is whether the worker still
answers, which one that is merely busy does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from bt_ray.rollout.watchdog import GRACE_S, LAST_RESORT

SILENCE = 1.5  # times the longest that the watchdog inside takes: where that can still act it comes first, and leaves a stack
LOOKS_PER_LIMIT = 4
END_TIMEOUT_S = 30.0  # from the request to the news: a raylet gives a worker 5 s, one that is gone gives no news


class WorkerSilent(Exception):
    """A worker gave no sign of life, and what was sent to it is given up."""


def silence_limit_s(timeout_s: float) -> float:
    """Seconds without a sign of life after which a worker is ended whose program may run for `timeout_s`. Pure."""
    return SILENCE * LAST_RESORT * (timeout_s + GRACE_S)


async def answers(worker: Any) -> bool:
    """Whether a worker answers: False where it died, or starts again. Waits for as long as it says nothing."""
    from ray.exceptions import RayActorError

    try:
        await worker.ready.remote()
    except RayActorError:
        return False
    return True


async def outcome(worker: Any, reference: Awaitable[Any], limit_s: float) -> None:
    """Return or raise as what was sent to a worker does, for which `reference` stands.

    A worker that gives no sign of life for `limit_s` is ended, and begins anew; raises WorkerSilent.
    """
    sent = asyncio.create_task(_await(reference))
    question: asyncio.Task[bool] | None = None  # what takes less than one look asks nothing
    missed = 0
    try:
        # Looks are counted, and not seconds: where this process was itself suspended, one of them ends late, and the answer
        # that came meanwhile is there at the next.
        while missed < LOOKS_PER_LIMIT:
            await asyncio.wait({sent}, timeout=limit_s / LOOKS_PER_LIMIT)
            if sent.done():
                return await sent
            if question is not None:
                missed = 0 if question.done() and question.result() else missed + 1
            if question is None or question.done():
                question = asyncio.create_task(answers(worker))
        return await _end(worker, reference, sent, limit_s)
    finally:
        for task in (sent, question):
            if task is not None:
                task.cancel()


async def _await(reference: Awaitable[Any]) -> Any:
    return await reference


async def _end(worker: Any, reference: Awaitable[Any], sent: asyncio.Task[Any], limit_s: float) -> None:
    """End a worker, unless it ends what was sent to it after all. Raises WorkerSilent."""
    import ray
    from ray.exceptions import RayActorError

    # This hands the request over and waits for nobody. The cluster's control store passes it to the worker's raylet, which
    # asks the process to exit, and sends it SIGKILL where that did not help within RAY_kill_worker_timeout_milliseconds (5 s):
    # a process that is stopped, or frozen by version 2 of cgroups, ends of that. A raylet that is gone does nothing; then the
    # node is declared dead sooner or later, and until that is heard of the others have this share.
    ray.kill(worker, no_restart=False)
    await asyncio.wait({sent}, timeout=END_TIMEOUT_S)
    silent = f"it gave no sign of life for {limit_s:g} s: it is suspended, or its host is gone"
    if not sent.done():
        ray.cancel(reference)  # where it wakes up after all: its rows run elsewhere by then
        raise WorkerSilent(f"{silent}, nor is there news of its end")
    try:
        return await sent
    except RayActorError as error:
        raise WorkerSilent(silent) from error
