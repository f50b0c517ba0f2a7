"""LM calls that are made once: each answer is on disk before its caller has it, and equal calls read it.

For work whose calls are not rollout rows: instructions that an LM proposes, and optimisers that
run programs themselves. Interrupted and started again, they repeat their calls in the same order
and are answered from here up to where they were.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bt_ray.lm.types import LMAnswer, LMCall, LMPool, Weights
from bt_ray.runs.files import append_line, read_lines


def call_key(call: LMCall) -> str:
    """First 24 hex digits of the sha256 of all that an answer follows from; weights by their id."""
    data: dict[str, Any] = {"weights": call.weights.id, "sampling": asdict(call.sampling)}
    data |= {"messages": list(call.messages), "prompt_token_ids": list(call.prompt_token_ids)}
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


class JournalPool:
    """An LMPool in front of another, with a journal file. Equal calls have one answer, also at once.

    One process writes a journal; it may call from several threads and event loops. `paying` is entered around calls that
    go out, with their number, and may refuse them; an answer of the journal goes past it.
    """

    def __init__(self, pool: LMPool, path: Path, paying: Callable[[int], AbstractContextManager[Any]] = nullcontext) -> None:
        self._pool, self._path, self._paying = pool, path, paying
        self._lock = threading.Lock()
        self._answers = {entry["key"]: _answer(entry["answer"]) for entry in read_lines(path)}

    async def generate(self, call: LMCall) -> LMAnswer:
        """The answer of the journal, or of the pool. Raises what the pool raises, which is not kept, and what `paying` does."""
        key = call_key(call)
        if key in self._answers:
            return self._answers[key]
        with self._paying(1):
            return await self._asked(key, call)

    async def generate_all(self, calls: Sequence[LMCall]) -> list[LMAnswer]:
        """As `generate` of each, at once. `paying` is asked for all that the journal lacks, so either all go out or none."""
        keys = [call_key(call) for call in calls]
        missing = {key: call for key, call in zip(keys, calls, strict=True) if key not in self._answers}
        with self._paying(len(missing)):
            await asyncio.gather(*(self._asked(key, call) for key, call in missing.items()))
        return [self._answers[key] for key in keys]

    async def _asked(self, key: str, call: LMCall) -> LMAnswer:
        answer = await self._pool.generate(call)
        with self._lock:
            if key not in self._answers:  # else an equal call was faster
                append_line(self._path, {"key": key, "answer": asdict(answer)})
                self._answers[key] = answer
        return self._answers[key]

    async def ensure(self, weights: Weights) -> None:
        await self._pool.ensure(weights)

    async def load(self, weights: Weights) -> None:
        await self._pool.load(weights)

    async def scale(self, num_replicas: int) -> None:
        await self._pool.scale(num_replicas)

    async def close(self) -> None:
        """Nothing: the pool belongs to whoever made it."""

    def answers(self) -> list[LMAnswer]:
        """Every answer of the journal, for its cost."""
        with self._lock:
            return list(self._answers.values())


def _answer(data: dict[str, Any]) -> LMAnswer:
    lists = {name: tuple(data[name]) for name in ("token_ids", "prompt_token_ids")}
    return LMAnswer(**{**data, **lists})
