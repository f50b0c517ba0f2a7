"""A pool of one engine in this process, without Ray: for `bt-ray ask` and for tuned programs at home."""

from __future__ import annotations

import logging
from typing import Any

from bt_ray.config import EngineConfig
from bt_ray.errors import PoolError
from bt_ray.lm.engine import EngineDied
from bt_ray.lm.service import EngineService, ServiceOptions
from bt_ray.lm.types import LMAnswer, LMCall, Weights

log = logging.getLogger(__name__)


class LocalPool:
    """Implements LMPool. Travels as its config: a copy in another process starts an engine of its own.

    All calls must come from one event loop, the engine's.
    """

    def __init__(self, config: EngineConfig, engine_factory: str | None = None) -> None:
        self._options = ServiceOptions(config, engine_factory)
        self._service = EngineService(self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalPool, (self._options.config, self._options.engine_factory)

    async def ensure(self, weights: Weights) -> None:
        """Start the engine with these weights. CanaryError, PoolError."""
        await self.load(weights)

    async def generate(self, call: LMCall) -> LMAnswer:
        """Answer with exactly `call.weights`; an engine that died is started again once."""
        try:
            return await self._service.generate(call)
        except EngineDied:
            await self._revive()
        try:
            return await self._service.generate(call)
        except EngineDied as error:
            raise PoolError(f"the engine died twice over one call ({error}). Its log above says why.") from error

    async def load(self, weights: Weights) -> None:
        """Swap to, or start with, `weights`, and check their canary."""
        try:
            await self._service.load(weights)
        except EngineDied:
            await self._revive()
            await self._service.load(weights)

    async def scale(self, num_replicas: int) -> None:
        """0 stops the engine; the next call starts it again. More than one engine needs Ray."""
        if num_replicas > 1:
            raise PoolError(f"a local pool holds one engine, {num_replicas} were asked for. Use the Serve pool.")
        if num_replicas == 0:
            await self._service.close()

    async def close(self) -> None:
        """Stop the engine."""
        await self._service.close()

    async def _revive(self) -> None:
        log.warning("the engine died; starting it again")
        await self._service.close()
