"""One engine behind its gate: what a Serve replica and the in-process pool share. Works without Ray."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bt_ray.config import EngineConfig
from bt_ray.lm.engine import Engine, NeedsRestart
from bt_ray.lm.gate import WeightsGate
from bt_ray.lm.settings import EngineSettings, Machine, resolve_settings
from bt_ray.lm.types import LMAnswer, LMCall, Weights
from bt_ray.resources import engines_here

log = logging.getLogger(__name__)
LOOKS_PER_LIMIT = 4


class AnyEngine(Protocol):
    """What the service needs of an engine; `bt_ray.lm.engine.Engine` is the real one."""

    held: Weights | None

    def key(self, weights: Weights) -> str: ...
    async def start(self, weights: Weights) -> None: ...
    async def swap(self, weights: Weights) -> None: ...
    async def generate(self, call: LMCall, request_id: str) -> LMAnswer: ...
    async def close(self) -> None: ...
    async def pulse(self) -> None: ...


@dataclass(frozen=True)
class ServiceOptions:
    """How a service is built: the engine's config, and what tests and placement replace."""

    config: EngineConfig
    engine_factory: str | None = None  # "module:attr", called with EngineSettings; None: the vLLM engine
    gpus: int | None = None  # GPUs of the engine where this process itself sees none (ray executor)
    tenure_s: float = 10.0  # seconds in which calls may still join the present weights while others wait


class EngineService:
    """Answers every call with the weights that it names, starting and switching the engine as needed.

    `on_stall` is told of an engine that calls wait for and that gives no sign of life: it would hang for ever.
    """

    def __init__(self, options: ServiceOptions, on_stall: Callable[[str], object] | None = None) -> None:
        self._options = options
        self._on_stall = on_stall
        self._watch: asyncio.Task[None] | None = None
        self._engine: AnyEngine | None = None
        self._made = asyncio.Lock()
        self._gate: WeightsGate | None = None
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether a call uses the engine now."""
        return self._gate is not None and self._gate.inside > 0

    async def generate(self, call: LMCall) -> LMAnswer:
        """Answer with `call.weights`; the errors are those of the engine's start, swap and generate."""
        gate, engine = await self._ready()
        async with gate.use(call.weights):
            return await engine.generate(call, f"call-{os.getpid()}-{next(self._numbers)}")

    async def load(self, weights: Weights) -> None:
        """Return once the engine holds `weights` and their canary passed."""
        gate, engine = await self._ready()
        async with gate.use(weights):
            # The gate does not switch between adapters of one base: an adapter loads, and is checked, here.
            if engine.held is None or engine.held.id != weights.id:
                await engine.swap(weights)

    async def close(self) -> None:
        """Stop the engine; the next call starts it again."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._gate is not None:
            self._gate.forget()
        if self._engine is not None:
            await self._engine.close()

    async def _ready(self) -> tuple[WeightsGate, AnyEngine]:
        async with self._made:
            if self._engine is None or self._gate is None:
                # In a thread: the factory may import vLLM, which takes seconds.
                engine = await asyncio.to_thread(make_engine, self._options)
                self._engine = engine
                self._gate = WeightsGate(self._switch, engine.key, self._options.tenure_s)
        if (self._watch is None or self._watch.done()) and self._on_stall is not None:
            self._watch = asyncio.create_task(self._watch_pulse(self._engine, self._on_stall))
        return self._gate, self._engine

    async def _watch_pulse(self, engine: AnyEngine, on_stall: Callable[[str], object]) -> None:
        limit_s = self._options.config.stall_timeout_s
        while True:
            await asyncio.sleep(limit_s / LOOKS_PER_LIMIT)
            if not self.busy:
                continue  # it may be taking other weights, which takes as long as it takes
            try:
                await asyncio.wait_for(engine.pulse(), limit_s)
            except TimeoutError:
                on_stall(f"the engine gave no sign of life for {limit_s:g} s (engine.stall_timeout_s) while calls wait for it")

    async def _switch(self, weights: Weights) -> None:
        """Runs alone, after every call inside has left."""
        engine = self._engine
        assert engine is not None
        if engine.held is not None:
            try:
                await engine.swap(weights)
                return
            except NeedsRestart:
                log.info("weights %s need a fresh engine", weights.id)
        await engine.start(weights)


def make_engine(options: ServiceOptions) -> AnyEngine:
    """The engine that `options` name, with settings for this machine; nothing is started yet."""
    machine = replace(Machine.here(options.gpus), engines=engines_here(options.config))
    settings = resolve_settings(options.config, machine)
    factory: Callable[[EngineSettings], Any] = Engine
    if options.engine_factory is not None:
        module, _, name = options.engine_factory.partition(":")
        factory = getattr(importlib.import_module(module), name)
    return factory(settings)
