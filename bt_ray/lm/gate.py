"""Who may use an engine that holds one set of weights at a time. Pure asyncio, no engine inside."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bt_ray.lm.types import Weights


@dataclass(eq=False)
class _Waiter:
    weights: Weights
    key: str
    turn: asyncio.Future[None]


class WeightsGate:
    """Lets calls in together while they name the same weights, and switches when the others' turn comes.

    - A call is inside only while the engine holds what it names.
    - `switch(weights)` runs alone: every call inside has left before it starts.
    - First come, first served between weights: once calls for others wait, calls for the present
      weights still join for `tenure_s` seconds after the last switch (so that two programs do not
      pay a switch per call), then they queue behind.
    - A switch that raises gives its error to all who wait for these weights, and the gate holds
      nothing then; calls for other weights go on.
    """

    def __init__(
        self,
        switch: Callable[[Weights], Awaitable[None]],
        key: Callable[[Weights], str] = lambda weights: weights.id,
        tenure_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._switch_to, self._key, self._tenure_s, self._clock = switch, key, tenure_s, clock
        self._holds: str | None = None
        self._since = clock()
        self._inside = 0
        self._waiting: deque[_Waiter] = deque()
        self._switching: asyncio.Task[None] | None = None

    @property
    def holds(self) -> str | None:
        """Key of the weights that answer now; None before the first and during a switch."""
        return self._holds

    @property
    def inside(self) -> int:
        """Calls that use the engine now."""
        return self._inside

    @asynccontextmanager
    async def use(self, weights: Weights) -> AsyncIterator[None]:
        """Be inside, with these weights held, for the length of the block."""
        await self._enter(weights)
        try:
            yield
        finally:
            self._inside -= 1
            self._advance()

    def forget(self) -> None:
        """The engine lost its weights: the next call switches again, whatever it names."""
        self._holds = None

    async def _enter(self, weights: Weights) -> None:
        key = self._key(weights)
        if self._may_join(key):
            self._inside += 1
            return
        waiter = _Waiter(weights, key, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._advance()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._inside -= 1  # let in, and cancelled before it could run
            self._advance()
            raise

    def _may_join(self, key: str) -> bool:
        if self._switching is not None or key != self._holds:
            return False
        return not self._waiting or self._clock() - self._since < self._tenure_s

    def _advance(self) -> None:
        """Give the first in the queue its turn, if nobody is inside."""
        if self._switching is not None or self._inside or not self._waiting:
            return
        first = self._waiting[0]
        if first.key == self._holds:
            self._admit(first.key)
        else:
            # A task of its own: the caller that started it may be cancelled, the switch may not.
            self._switching = asyncio.create_task(self._switch(first))

    async def _switch(self, first: _Waiter) -> None:
        self._holds = None
        try:
            await self._switch_to(first.weights)
        except BaseException as error:  # also a cancelled switch must not leave its waiters behind
            for waiter in self._take(first.key):
                waiter.turn.set_exception(error if isinstance(error, Exception) else RuntimeError("the switch was cancelled"))
            if not isinstance(error, Exception):
                raise
        else:
            self._holds, self._since = first.key, self._clock()
            self._admit(first.key)
        finally:
            self._switching = None
            self._advance()

    def _admit(self, key: str) -> None:
        for waiter in self._take(key):
            self._inside += 1
            waiter.turn.set_result(None)

    def _take(self, key: str) -> list[_Waiter]:
        """Remove and return those who wait for `key` and were not cancelled."""
        taken = [waiter for waiter in self._waiting if waiter.key == key]
        self._waiting = deque(waiter for waiter in self._waiting if waiter.key != key)
        return [waiter for waiter in taken if not waiter.turn.done()]
