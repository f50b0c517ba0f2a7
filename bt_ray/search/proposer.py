"""The LM that writes instructions, as a searcher calls it: the program's own, or another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bt_ray.config import PromptStep
from bt_ray.lm.journal import JournalPool
from bt_ray.lm.types import LMCall, Sampling, Weights
from bt_ray.runs.identity import derive_seed


class Proposer:
    """Implements AskLM over a pool whose answers are journaled. Called from one thread at a time."""

    def __init__(self, pool: JournalPool, weights: Weights, step: PromptStep, seed: int) -> None:
        self._pool, self._weights, self._step, self._seed = pool, weights, step, seed

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        """One answer per prompt. Equal prompts get seeds of their own. PoolError, PromptTooLongError, and BudgetError
        before any of them is asked."""
        calls = [self._call(text, derive_seed(self._seed, "proposer", seed, place)) for place, text in enumerate(prompts)]
        return [answer.text for answer in asyncio.run(self._pool.generate_all(calls))]

    def _call(self, text: str, seed: int) -> LMCall:
        temperature = self._step.proposer_temperature
        sampling = Sampling(temperature, self._step.proposer_max_tokens, seed=seed % 2**31 if temperature else None)
        return LMCall(self._weights, sampling, messages=({"role": "user", "content": text},))
