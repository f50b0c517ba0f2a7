"""What one rollout knows about its LM calls, and how an adapter and the engine speak.

dspy hands an engine only messages and a few settings. The rest travels beside it: the rollout's
`CallContext` in dspy's own settings (so that it follows dspy into its threads), and the
`CallSite` of the call in a context variable that the adapter sets around it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from bt_ray.errors import BtRayError, PoolError, PromptTooLongError
from bt_ray.lm.types import LMAnswer, LMCall, LMPool, Weights

SETTINGS_KEY = "bt_ray_call_context"  # name of the CallContext in dspy.settings
PREDICTOR_TAG = "bt_ray_predictor"  # attribute of a dspy.Predict that holds its name
DYNAMIC = "(dynamic)"  # predictors that the program builds while it runs

CallRecord = dict[str, Any]


@dataclass
class CallSite:
    """One call of an adapter: how the answer ends, and where its records are completed."""

    stop: tuple[str, ...] = ()
    constraint: dict[str, Any] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    records: list[CallRecord] = field(default_factory=list)

    def complete(self, values: list[dict[str, Any]]) -> None:
        """Note the parsed outputs (JSON values) of the calls made here, one per answer."""
        for record, value in zip(self.records, values, strict=False):
            record["outputs"] = value


CALL_SITE: ContextVar[CallSite | None] = ContextVar("bt_ray_call_site", default=None)


@dataclass
class CallContext:
    """The calls of one rollout.

    `temperature`, `max_tokens` are used where the program itself sets none. `fatal` is the pool's
    fault, if there was one: dspy wraps and programs swallow exceptions, so whoever ran the program
    reads it here. `loop` is where the pool's coroutines run.
    """

    pool: LMPool
    weights: Weights
    loop: asyncio.AbstractEventLoop
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    calls: list[CallRecord] = field(default_factory=list)
    fatal: BtRayError | None = None
    closed: bool = False
    _counts: dict[str, int] = field(default_factory=dict)
    _pending: set[concurrent.futures.Future[LMAnswer]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open_record(self, predictor: str) -> tuple[CallRecord, int]:
        """A new record, in the order in which calls start, and the seed of its call."""
        record: CallRecord = {"predictor": predictor, "inputs": {}, "outputs": None, "text": None}
        with self._lock:
            index = self._counts.get(predictor, 0)
            self._counts[predictor] = index + 1
            self.calls.append(record)
        return record, call_seed(self.seed, predictor, index)

    def finished_calls(self) -> list[CallRecord]:
        """Records of the calls that were answered."""
        with self._lock:
            return [dict(record) for record in self.calls if record["text"] is not None]

    async def answer(self, call: LMCall, record: CallRecord) -> LMAnswer:
        """Ask the pool, on its loop, and complete the record.

        Raises PromptTooLongError, which is this row's fault; every other failure is the pool's and
        is kept in `fatal` before it is raised.
        """
        if self.fatal is not None:
            raise self.fatal
        if self.closed:
            raise RuntimeError("this program run has ended; its later LM calls are refused")
        try:
            answer = await self.pool.generate(call)
            if answer.weights_id != call.weights.id:
                raise PoolError(
                    f"The pool answered with weights {answer.weights_id} where {call.weights.id} were asked for. "
                    "Its answers cannot be trusted; stop the run and look at the replica's log."
                )
        except PromptTooLongError:
            raise
        except BtRayError as error:
            self.fatal = error
            raise
        except Exception as error:
            self.fatal = PoolError(f"The LM pool failed with {type(error).__name__}: {error}")
            raise self.fatal from error
        record["prompt_token_ids"] = list(answer.prompt_token_ids)
        record["token_ids"] = list(answer.token_ids)
        record["finish_reason"] = answer.finish_reason
        record["cached_tokens"] = answer.cached_tokens
        record["text"] = answer.text
        return answer

    def submit(self, call: LMCall, record: CallRecord) -> concurrent.futures.Future[LMAnswer]:
        """Ask the pool from a thread that does not run `loop`."""
        refused = self.closed  # `answer` says so
        future = asyncio.run_coroutine_threadsafe(self.answer(call, record), self.loop)
        with self._lock:
            self._pending.add(future)
        if self.closed and not refused:
            future.cancel()  # the run ended before this call was in `_pending` for `close` to see
        future.add_done_callback(self._forget)
        return future

    def close(self) -> None:
        """Refuse further calls and cancel those of the program's threads."""
        self.closed = True
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.cancel()

    def _forget(self, future: concurrent.futures.Future[LMAnswer]) -> None:
        with self._lock:
            self._pending.discard(future)


def call_seed(seed: int, *parts: str | int) -> int:
    """A seed of 31 bits that follows from `seed` and the parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
