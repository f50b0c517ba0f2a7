"""Programs, metrics and pool answers that the tests share."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, Literal

import dspy

from bt_ray.errors import PoolError

Department = Literal["cards", "transfers"]
Intent = Literal["card_lost", "card_late", "transfer_failed", "transfer_slow"]


class Route(dspy.Signature):
    """Name the department that answers the message."""

    message: str = dspy.InputField()
    department: Department = dspy.OutputField()


class Classify(dspy.Signature):
    """Name the intent of the message."""

    message: str = dspy.InputField()
    department: Department = dspy.InputField()
    intent: Intent = dspy.OutputField()


class TwoModules(dspy.Module):
    """Department, then intent; without `aforward`."""

    def __init__(self) -> None:
        super().__init__()
        self.route = dspy.Predict(Route)
        self.classify = dspy.Predict(Classify)

    def forward(self, message: str) -> dspy.Prediction:
        department = self.route(message=message).department
        return self.classify(message=message, department=department)


class TwoModulesAsync(TwoModules):
    """The same, native async."""

    async def aforward(self, message: str) -> dspy.Prediction:
        routed = await self.route.acall(message=message)
        return await self.classify.acall(message=message, department=routed.department)


class RaisesOnMark(TwoModules):
    """Raises where the message says so."""

    def forward(self, message: str) -> dspy.Prediction:
        if "RAISE" in message:
            raise KeyError("the message is marked")
        return super().forward(message)


class CrashesOnMark(TwoModules):
    """Ends its process where the message says so, as native code that crashes does."""

    def forward(self, message: str) -> dspy.Prediction:
        if "CRASH" in message:
            os._exit(1)
        return super().forward(message)


class BlocksOnMark(TwoModulesAsync):
    """Holds the event loop where the message says so."""

    async def aforward(self, message: str) -> dspy.Prediction:
        if "BLOCK" in message:
            time.sleep(3600)
        return await super().aforward(message)


class WaitsOnMark(TwoModulesAsync):
    """Waits, where the message says so, for the file that it names last."""

    async def aforward(self, message: str) -> dspy.Prediction:
        while "WAIT" in message and not os.path.exists(message.split()[-1]):
            await asyncio.sleep(0.05)
        return await super().aforward(message)


class SuspendsOnMark(TwoModules):
    """Suspends its process where the message says so, once: the file that the message names last tells, and holds the process's id."""

    def forward(self, message: str) -> dspy.Prediction:
        if "SUSPEND" in message:
            with suppress(FileExistsError):
                with open(message.split()[-1], "x") as file:
                    file.write(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(message)


class Swallows(TwoModules):
    """Catches whatever its predictor raises, as careless programs do."""

    def forward(self, message: str) -> dspy.Prediction:
        try:
            return super().forward(message)
        except Exception:
            return dspy.Prediction(intent="card_lost")


class Reasons(dspy.Module):
    """Chain of thought before one of two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.think = dspy.ChainOfThought("question -> answer: Literal['yes', 'no']")

    def forward(self, question: str) -> dspy.Prediction:
        return self.think(question=question)


class NeedsArgument(TwoModules):
    def __init__(self, depth: int) -> None:
        super().__init__()


def make_program() -> dspy.Module:
    return TwoModules()


NOT_A_PROGRAM = 5


def crashing_metric(example: Any, prediction: Any, trace: Any = None) -> float:
    """As `exact`, but ends its process, as native code and as sys.exit do, where the message says so."""
    if "SEGFAULT" in example.message:
        ctypes.string_at(0)
    if "EXIT" in example.message:
        sys.exit(3)
    return exact(example, prediction, trace)


def exact(example: Any, prediction: Any, trace: Any = None) -> float:
    return float(prediction.intent == example.intent)


def answer(messages: tuple[dict[str, Any], ...]) -> str:
    """What an able model would say to the two modules under the compact adapter."""
    content = messages[-1]["content"]
    topic = "card" if "card" in content.split("\n")[0] else "transfer"
    if "\ndepartment: " not in content:
        return f"{topic}s"
    return {"card": "card_lost", "transfer": "transfer_failed"}[topic]


def no_replica(messages: tuple[dict[str, Any], ...]) -> str:
    raise PoolError("no replica answers")


def example(number: int, message: str = "", intent: str = "card_lost") -> dict[str, Any]:
    return {"id": f"e{number}", "inputs": {"message": message or f"my card {number} is gone"}, "labels": {"intent": intent}}
