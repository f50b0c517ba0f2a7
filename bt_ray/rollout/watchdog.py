"""Ends a program worker whose event loop is held: while code keeps the loop to itself, no row in it times out.

The dispatcher then finds out which row it was, as with any worker that dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

GRACE_S = 5.0  # beyond the time that a row may take
LOOKS_PER_LIMIT = 4


class LoopWatch:
    """A thread that asks the loop for a sign of life. `end` is called, once, where none came for `limit_s`."""

    def __init__(self, limit_s: float, end: Callable[[str], object] | None = None) -> None:
        self._limit_s = limit_s
        self._end = end or exit_now
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
            if not answered.wait(self._limit_s):
                self._end(f"code in a coroutine held the event loop for {self._limit_s:g} s, in which no row could time out")
                return


def exit_now(reason: str) -> None:
    """End this process; nothing is cleaned up, as what holds the loop would not let it."""
    logger.error("program worker exits: %s", reason)
    sys.stderr.flush()
    os._exit(1)
