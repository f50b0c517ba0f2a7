"""One pool over those of several models: each call goes to the engines of the model that its weights belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from bt_ray.config import EngineConfig, RunConfig
from bt_ray.lm.types import LMAnswer, LMCall, LMPool, Weights


class RoutedPool:
    """Implements LMPool over `pools`, by the name of their model; the run's own has the empty name."""

    def __init__(self, pools: Mapping[str, LMPool]) -> None:
        self._pools = dict(pools)

    async def ensure(self, weights: Weights) -> None:
        """Every model's engines answer with their part."""
        await asyncio.gather(*(pool.ensure(part) for pool, part in self._each(weights)))

    async def generate(self, call: LMCall) -> LMAnswer:
        return await self._pools[call.weights.model].generate(call)

    async def load(self, weights: Weights) -> None:
        await asyncio.gather(*(pool.load(part) for pool, part in self._each(weights)))

    async def scale(self, num_replicas: int) -> None:
        await asyncio.gather(*(pool.scale(num_replicas) for pool in self._pools.values()))

    async def close(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))

    def begin_load(self, weights: Weights) -> None:
        """As ServePool.begin_load, of each model."""
        for pool, part in self._each(weights):
            pool.begin_load(part)

    def renew(self) -> None:
        """As ServePool.renew, of each model."""
        for pool in self._pools.values():
            pool.renew()  # type: ignore[attr-defined]

    def _each(self, weights: Weights) -> list[tuple[Any, Weights]]:
        """Pools with the weights that they hold; two globs may name one model, whose weights are then the same."""
        parts = {part.model: part for _, part in weights.parts} if weights.parts else {weights.model: weights}
        return [(self._pools[model], part) for model, part in parts.items()]


def pools_of(config: RunConfig, make: Callable[[str, EngineConfig], Any]) -> Any:
    """What a run's calls go through: one pool, or one for each model. `make(model name, its engines' config)`."""
    pools = {name: make(name, engine) for name, engine in config.engines().items()}
    return RoutedPool(pools) if config.assign else pools[""]


def context_of(config: RunConfig, weights: Weights, predictor: str) -> tuple[str, int]:
    """Folder of the model that answers a predictor, for its tokenizer, and the tokens that its engines' context holds."""
    part = weights.part_for(predictor)
    return part.model_dir, config.engines()[part.model].max_model_len
