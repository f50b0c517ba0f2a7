"""Ends a program worker whose event loop is held: while code keeps the loop to itself, no row in it times out.

The dispatcher then finds out which row it was, as with any worker that dies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from bt_ray.environment import exit_hard

GRACE_S = 5.0  # beyond the time that a row may take
LOOKS_PER_LIMIT = 4


class LoopWatch:
    """A thread that asks the loop for a sign of life. `end` is called, once, where none came for `limit_s`."""

    def __init__(self, limit_s: float, end: Callable[[str], object] = exit_hard) -> None:
        self._limit_s = limit_s
        self._end = end
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch, unless that was begun before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, args=(loop,), name="loop-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stop.set()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stop.wait(self._limit_s / LOOKS_PER_LIMIT):
            answered = threading.Event()
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # the loop was closed: this process is about to end
                return
            # In pieces: a process that was suspended wakes up late in one, and answers in the next.
            if not any(answered.wait(self._limit_s / LOOKS_PER_LIMIT) for _ in range(LOOKS_PER_LIMIT)):
                self._end(f"code in a coroutine held the event loop for {self._limit_s:g} s, in which no row could time out")
                return
