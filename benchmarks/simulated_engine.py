"""An engine without a model, whose answers take the time that recorded rates say. For benchmarks/scaling.py.

Requests are prefilled one after another and decoded together, `max_num_seqs` at most, as continuous batching does. An
answer's length follows from its prompt, so that answers differ in length and every run asks for the same work.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib

from bt_ray.lm.settings import EngineSettings
from bt_ray.lm.types import LMAnswer, LMCall, Weights

PREFILL, DECODE = "SIMULATED_PREFILL_TOKENS_PER_S", "SIMULATED_DECODE_STEPS_PER_S"  # variables with the rates
SHORTEST_TOKENS, LONGEST_TOKENS = 8, 56  # of an answer
CHARACTERS_PER_TOKEN = 4


class SimulatedEngine:
    """Follows the rules of `bt_ray.lm.engine.Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        self.held: Weights | None = None
        self._prefill_s_per_token = 1.0 / float(os.environ[PREFILL])
        self._decode_s_per_step = 1.0 / float(os.environ[DECODE])
        self._prefilled_at_s = 0.0
        self._slots = asyncio.Semaphore(settings.max_num_seqs)

    def key(self, weights: Weights) -> str:
        return weights.id

    async def start(self, weights: Weights) -> None:
        self.held = weights

    async def swap(self, weights: Weights) -> None:
        self.held = weights

    async def generate(self, call: LMCall, request_id: str) -> LMAnswer:
        text = "\n".join(str(message["content"]) for message in call.messages)
        prompt, tokens = max(1, len(text) // CHARACTERS_PER_TOKEN), num_tokens(text)
        async with self._slots:
            now_s = time.monotonic()
            self._prefilled_at_s = max(now_s, self._prefilled_at_s) + prompt * self._prefill_s_per_token
            await asyncio.sleep(self._prefilled_at_s + tokens * self._decode_s_per_step - now_s)
        ids = tuple(range(tokens))
        return LMAnswer("word " * (tokens - 1), ids, tuple(range(prompt)), "stop", call.weights.id)

    async def pulse(self) -> None:
        pass

    async def close(self) -> None:
        self.held = None


def num_tokens(text: str) -> int:
    """Length of the answer to a prompt."""
    return SHORTEST_TOKENS + zlib.crc32(text.encode()) % (LONGEST_TOKENS - SHORTEST_TOKENS + 1)
