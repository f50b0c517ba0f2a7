"""A loop that is held is found out; one that is only busy is not."""

import asyncio
import time

from bt_ray.rollout.watchdog import LoopWatch


def watched(work, limit_s=0.3):
    said = []

    async def run():
        watch = LoopWatch(limit_s, said.append)
        watch.start(asyncio.get_running_loop())
        watch.start(asyncio.get_running_loop())
        await work()
        await asyncio.sleep(0.05)
        watch.stop()

    asyncio.run(run())
    return said


def test_a_loop_that_is_held_is_found_out_once():
    async def holds():
        time.sleep(1.5)

    assert watched(holds) == ["code in a coroutine held the event loop for 0.3 s, in which no row could time out"]


def test_a_loop_that_is_busy_or_waits_is_let_be():
    async def works():
        for _ in range(20):
            time.sleep(0.02)
            await asyncio.sleep(0.02)

    assert watched(works, limit_s=0.6) == []
