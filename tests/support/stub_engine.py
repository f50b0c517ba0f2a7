"""An engine without a model: it answers by a function of the prompt, and does what prompts say.

A prompt's last message may hold `sleep N`, `die`, `hang` or `too long`; anything else is answered with
`<weights id>: <content>`. Weights whose model_dir is `bad` fail their canary; others whose
embedding_id differs from what is held need a restart.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from bt_ray.errors import CanaryError, PromptTooLongError
from bt_ray.lm.engine import EngineDied, NeedsRestart
from bt_ray.lm.settings import EngineSettings
from bt_ray.lm.types import LMAnswer, LMCall, Weights
from bt_ray.lm.weights import swap_mode


class StubEngine:
    """Follows the engine's rules. Writes one line per event to the file in `base_dir` of the weights, if it is one."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.held: Weights | None = None
        self._hangs = False

    def key(self, weights: Weights) -> str:
        return weights.id

    async def start(self, weights: Weights) -> None:
        self._note(weights, "start")
        await self._take(weights)

    async def swap(self, weights: Weights) -> None:
        if swap_mode(self.held, weights) == "restart":
            raise NeedsRestart(weights.id)
        self._note(weights, "swap")
        await self._take(weights)

    async def generate(self, call: LMCall, request_id: str) -> LMAnswer:
        assert self.held is not None and self.held.id == call.weights.id
        content = str(call.messages[-1]["content"])
        if content == "die":
            raise EngineDied("as asked")
        if content == "hang":
            self._hangs = True
            await asyncio.sleep(3600)
        if content == "exit":
            os._exit(1)
        if content == "too long":
            raise PromptTooLongError("the prompt has 99 tokens and asks for 9 more, the context holds 64.")
        if content.startswith("sleep "):
            self._note(call.weights, "sleeping")
            try:
                await asyncio.sleep(float(content.split()[1]))
            except asyncio.CancelledError:
                self._note(call.weights, "aborted")
                raise
        await asyncio.sleep(0)
        assert self.held is not None
        return LMAnswer(f"{self.held.id}: {content}", (1,), (2,), "stop", self.held.id, extra={"pid": os.getpid()})

    async def pulse(self) -> None:
        if self._hangs:
            await asyncio.sleep(3600)

    async def close(self) -> None:
        self.held = None

    async def _take(self, weights: Weights) -> None:
        self.held = None
        await asyncio.sleep(0.01)
        if weights.model_dir == "bad":
            raise CanaryError(f"canary: weights {weights.id} disagree.")
        self.held = weights

    @staticmethod
    def _note(weights: Weights, event: str) -> None:
        if os.path.isfile(weights.base_dir):
            with Path(weights.base_dir).open("a") as file:
                file.write(f"{event} {weights.id}\n")
