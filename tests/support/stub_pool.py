"""An LMPool in memory: answers with a function of the messages. Picklable with that function."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bt_ray.lm.types import LMAnswer, LMCall, Weights

BASE = Weights(id="base0000", kind="base", model_dir="/none", base_dir="/none")


def words(text: str) -> tuple[int, ...]:
    """Token ids of a toy tokenizer: one per word."""
    return tuple(sum(map(ord, word)) for word in text.split())


@dataclass
class StubPool:
    """`answer(messages)` gives the text, or raises. With `log`, each call appends a line to that
    file, so that calls of several processes can be counted. With `gate`, the calls of a process
    after its first `free_calls` wait until that file exists."""

    answer: Callable[[tuple[dict[str, Any], ...]], str]
    log: str | None = None
    delay_s: float = 0.0
    gate: str | None = None
    free_calls: int = 0
    weights_id: str | None = None  # answers claim these weights instead of those asked for
    calls: list[LMCall] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    cancelled: int = 0

    async def ensure(self, weights: Weights) -> None: ...

    async def generate(self, call: LMCall) -> LMAnswer:
        self.calls.append(call)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            while self.gate and len(self.calls) > self.free_calls and not os.path.exists(self.gate):
                await asyncio.sleep(0.02)
            text = self.answer(call.messages)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\t{call.messages[-1]['content']!r}\n")
        prompt = " ".join(message["content"] for message in call.messages)
        return LMAnswer(text, words(text), words(prompt), "stop", self.weights_id or call.weights.id)

    async def load(self, weights: Weights) -> None: ...

    async def scale(self, num_replicas: int) -> None: ...

    async def close(self) -> None: ...
