"""Ends a program worker whose event loop is held: while code keeps the loop to itself, no row in it times out.

The dispatcher then finds out which row it was, as with any worker that dies.
"""

from __future__ import annotations

import asyncio
import faulthandler
import threading
from collections.abc import Callable

from bt_ray.environment import exit_hard

GRACE_S = 5.0  # beyond the time that a row may take
LOOKS_PER_LIMIT = 4
LAST_RESORT = 1.25  # times the limit
STDERR = 2


class LoopWatch:
    """A thread that asks the loop for a sign of life. `end` is called, once, where none came for `limit_s`.

    Native code that keeps the interpreter's lock, as a regular expression that backtracks without end does, stops this
    thread too. So it winds a clock of `faulthandler`, which needs no lock: where nobody winds it again for
    LAST_RESORT * `limit_s`, it writes the stack to stderr and ends the process. So does a process that was suspended for that
    long, once it wakes up: its rows run again. One that does not is ended from outside (`heartbeat`).
    """

    def __init__(self, limit_s: float, end: Callable[[str], object] = exit_hard) -> None:
        self._limit_s = limit_s
        self._end = end
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch, unless that was begun before."""
        if self._thread is None:
            self._wind()
            self._thread = threading.Thread(target=self._watch, args=(loop,), name="loop-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._look(loop)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stop.wait(self._limit_s / LOOKS_PER_LIMIT):
            self._wind()
            answered = threading.Event()
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # the loop was closed: this process is about to end
                return
            if not self._heard(answered):
                self._end(f"code in a coroutine held the event loop for {self._limit_s:g} s, in which no row could time out")
                return

    def _heard(self, answered: threading.Event) -> bool:
        # In pieces: a process that was suspended for a moment wakes up late in one, and answers in the next.
        for _ in range(LOOKS_PER_LIMIT):
            self._wind()
            if self._stop.is_set():
                return True
            if answered.wait(self._limit_s / LOOKS_PER_LIMIT):
                return True
        return False

    def _wind(self) -> None:
        faulthandler.dump_traceback_later(LAST_RESORT * self._limit_s, exit=True, file=STDERR)
