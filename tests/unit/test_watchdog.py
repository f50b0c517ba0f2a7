"""A loop that is held is found out; one that is only busy is not."""

import asyncio
import subprocess
import sys
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


HOLDS_THE_LOCK = """
import asyncio, ctypes, sys
from bt_ray.rollout.watchdog import LoopWatch

async def run():
    watch = LoopWatch(0.4)
    watch.start(asyncio.get_running_loop())
    await asyncio.sleep(1.0)  # nobody is ended that answers
    if sys.argv[1] == "stop":
        watch.stop()
        ctypes.PyDLL(None).sleep(2)  # without the lock being given back
        return
    print("holds", flush=True)
    await asyncio.to_thread(ctypes.PyDLL(None).sleep, 600)

asyncio.run(run())
"""


def test_a_process_whose_lock_is_held_ends_with_its_stack():
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, "go"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "holds\n") and "Timeout" in done.stderr and "File" in done.stderr
    assert subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, "stop"], timeout=60).returncode == 0
