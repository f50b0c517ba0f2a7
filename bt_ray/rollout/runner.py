"""Runs the program on one example and turns whatever happens into one row. No Ray here."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.call_context import SETTINGS_KEY, CallContext, call_seed
from bt_ray.lm.dspy_engine import make_lm
from bt_ray.lm.fields import jsonable
from bt_ray.lm.types import LMPool
from bt_ray.rollout import candidates
from bt_ray.rollout.feedback import Said, attach, said_of
from bt_ray.rollout.program import ProgramSpec, load_metric, load_program
from bt_ray.rollout.tasks import RolloutRow, RolloutTask

MAX_MESSAGE = 500  # characters of an error's text that a row keeps
PROGRAMS_KEPT = 32  # programs with their prompts applied, per runner


class RowError(Exception):
    """A fault of one row, with its kind: parse, program, metric, timeout or prompt_too_long. (A crash is found by the dispatcher.)"""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @classmethod
    def of(cls, kind: str, error: BaseException) -> RowError:
        return cls(kind, f"{type(error).__name__}: {error}")


class ProgramRunner:
    """The user's program and metric in this process, run against an LM pool.

    Raises ConfigError at once where program or metric cannot be used.
    """

    def __init__(self, spec: ProgramSpec, pool: LMPool) -> None:
        self.spec = spec
        self.pool = pool
        self._program = load_program(spec)
        self._metric = load_metric(spec)
        self._adapter = make_adapter(spec.adapter, spec.constrain)
        self._lm = make_lm()
        self._applied: OrderedDict[str, dspy.Module] = OrderedDict()

    async def run(self, task: RolloutTask) -> RolloutRow:
        """Run one task. The program's and the metric's own failures are in the row's `error`.

        Raises PoolError and CanaryError: they are no fault of the row. ConfigError where the
        candidate does not fit the program.
        """
        start = time.perf_counter()
        cid = candidates.candidate_id(task.candidate)
        program = self._apply(cid, task.candidate)
        example_id, sample = task.key
        context = self._context(task, call_seed(task.seed, example_id, sample))
        row: RolloutRow = {"example_id": example_id, "sample": sample, "candidate_id": cid, "weights_id": task.weights.id}
        row.update(prediction=None, score=None, accept=False, feedback=None, error=None)
        trace: list[Any] = []
        said: list[Said] = []
        try:
            prediction = await self._predict(program, task, context, trace)
            row["prediction"] = jsonable(prediction)
            judged, said = await self._judge(task, prediction, trace)
            row.update(judged)
        except RowError as error:
            row["error"] = {"kind": error.kind, "message": str(error)[:MAX_MESSAGE]}
        finally:
            context.close()
        if context.fatal is not None:
            raise context.fatal
        row["calls"] = context.finished_calls()
        attach(row["calls"], said)
        row["seconds"] = time.perf_counter() - start
        return row

    def _apply(self, cid: str, candidate: dict[str, Any]) -> dspy.Module:
        if cid not in self._applied:
            self._applied[cid] = candidates.apply(self._program, candidate)
            if len(self._applied) > PROGRAMS_KEPT:
                self._applied.popitem(last=False)
        self._applied.move_to_end(cid)
        return self._applied[cid]

    def _context(self, task: RolloutTask, seed: int) -> CallContext:
        loop = asyncio.get_running_loop()
        return CallContext(self.pool, task.weights, loop, temperature=task.temperature, max_tokens=task.max_tokens, seed=seed)

    def _settings(self, context: CallContext, trace: list[Any]) -> dict[str, Any]:
        settings = {"lm": self._lm, "adapter": self._adapter, "trace": trace, "disable_history": True}
        return {**settings, "warn_on_type_mismatch": False, SETTINGS_KEY: context}

    async def _predict(self, program: dspy.Module, task: RolloutTask, context: CallContext, trace: list[Any]) -> Any:
        """The program's prediction. Raises RowError."""
        inputs = task.example["inputs"]
        limit = asyncio.timeout(self.spec.timeout_s)
        try:
            async with limit:
                with dspy.context(**self._settings(context, trace)):
                    if hasattr(program, "aforward"):
                        prediction = await program.acall(**inputs)
                    else:
                        prediction = await in_thread(lambda: program(**inputs))
        except AdapterParseError as error:
            raise RowError("parse", str(error)) from error
        except ContextWindowExceededError as error:
            raise RowError("prompt_too_long", str(error)) from error
        except (Exception, SystemExit) as error:
            if limit.expired():
                raise RowError("timeout", f"the program ran longer than {self.spec.timeout_s:g} s") from error
            raise RowError.of("program", error) from error
        if not isinstance(prediction, dspy.Example):  # the base class of dspy.Prediction
            raise RowError("program", f"the program returned a {type(prediction).__name__}; return a dspy.Prediction")
        return prediction

    async def _judge(self, task: RolloutTask, prediction: Any, trace: list[Any]) -> tuple[dict[str, Any], list[Said]]:
        """Score, acceptance and feedback of a prediction, and what is said of its predictors. Raises RowError.

        As dspy does: the score comes from the metric without a trace, acceptance from the metric
        with it, where it takes one. Its own LM calls are greedy and are not the row's calls.
        """
        example = dspy.Example(**task.example["inputs"], **task.example.get("labels", {})).with_inputs(*task.example["inputs"])
        context = self._context(task, 0)
        context.temperature = 0.0

        def ask(name: str, steps: list[Any]) -> str | None:
            return read_score(self._metric.of_predictor(example, prediction, trace, name, steps), task.key)[1]

        def judge() -> tuple[float, str | None, float, list[Said]]:
            score, feedback = read_score(self._metric(example, prediction), task.key)
            accepted = read_score(self._metric(example, prediction, trace), task.key)[0] if self._metric.takes_trace else score
            said = said_of(trace, ask) if task.by_predictor and self._metric.takes_predictor else []
            return score, feedback, accepted, said

        limit = asyncio.timeout(self.spec.timeout_s)
        try:
            async with limit:
                with dspy.context(**self._settings(context, [])):
                    score, feedback, accepted, said = await in_thread(judge)
        except RowError:
            raise
        except (Exception, SystemExit) as error:
            if context.fatal is not None:
                raise context.fatal from error
            if limit.expired():
                raise RowError("metric", f"the metric ran longer than {self.spec.timeout_s:g} s") from error
            raise RowError.of("metric", error) from error
        finally:
            context.close()
        if context.fatal is not None:
            raise context.fatal
        threshold = self.spec.metric_threshold
        accept = bool(accepted) if threshold is None else accepted >= threshold
        return {"score": score, "feedback": feedback, "accept": accept}, said


class NoScore(ValueError):
    """What a metric returned is no score; the message shows it."""


def score_of(value: Any) -> tuple[float, str | None]:
    """Score and feedback from a metric's value: a bool, a number, or dspy.Prediction(score=, feedback=).

    Raises NoScore for anything else and for NaN and infinity.
    """
    feedback = None
    if isinstance(value, dspy.Example):
        feedback = None if value.get("feedback") is None else str(value["feedback"])
        value = value.get("score")
    if hasattr(value, "item") and not isinstance(value, numbers.Number):
        try:
            value = value.item()  # numpy's bool and zero-dimensional arrays
        except (TypeError, ValueError, RuntimeError):
            raise NoScore(f"{value!r} of type {type(value).__name__}") from None  # more than one value
    if value is None:
        raise NoScore("None")  # a branch without `return`, as a rule
    if not isinstance(value, numbers.Real):
        raise NoScore(f"{value!r} of type {type(value).__name__}")
    score = float(value)
    if not math.isfinite(score):
        raise NoScore(str(score))
    return score, feedback


def read_score(value: Any, key: tuple[str, int]) -> tuple[float, str | None]:
    """As `score_of`, for a row: raises RowError of kind metric, naming the row."""
    try:
        return score_of(value)
    except NoScore as error:
        where = f"on example {key[0]!r}, sample {key[1]}"
        raise RowError("metric", f"the metric gave {error} {where}; return a finite number or a bool") from None


class _Thread:
    """A daemon thread that runs one function after another. It is idle, and used again, once a function returned."""

    idle: ClassVar[list[_Thread]] = []

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="bt_ray-program", daemon=True).start()

    @classmethod
    def submit(cls, body: Callable[[], None]) -> None:
        try:
            thread = cls.idle.pop()
        except IndexError:
            thread = cls()
        thread._work.put(body)

    def _run(self) -> None:
        while True:
            self._work.get()()
            self.idle.append(self)


def in_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run a blocking function in a daemon thread that nothing else waits for, with the caller's context.

    No pool of a fixed size: user code that never returns would take its place for good, and other
    rows would time out while they wait for one.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def body() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = context.run(function)
            if inspect.isawaitable(result):
                raise TypeError("the function returned an awaitable; write it with plain `def`")
        except (SystemExit, StopIteration, KeyboardInterrupt) as error:
            # A future cannot carry these without ending the loop.
            failure = RuntimeError(f"{type(error).__name__}: {error}")
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(deliver, result, failure)
        except RuntimeError:
            if not loop.is_closed():
                raise  # a closed loop has nobody left who waits for the result

    _Thread.submit(body)
    return future


__all__ = ["ProgramRunner", "RolloutTask", "RowError", "in_thread", "read_score", "score_of"]
