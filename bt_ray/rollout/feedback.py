"""What a metric says of single predictors of a run, beside what it says of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.lm.call_context import DYNAMIC, PREDICTOR_TAG, CallRecord
from bt_ray.lm.fields import jsonable
from bt_ray.lm.types import FIXED


@dataclass(frozen=True)
class Said:
    """The metric's words on one step of a program's trace."""

    predictor: str
    inputs: dict[str, Any]
    feedback: str


def said_of(trace: Sequence[Any], ask: Callable[[str, list[Any]], str | None]) -> list[Said]:
    """What `ask(pred_name, pred_trace)` answers for each step of a predictor whose prompts may change."""
    found = ((name, step, ask(name, [step])) for name, step in _steps(trace))
    return [Said(name, jsonable(step[1]), feedback) for name, step, feedback in found if feedback]


def attach(calls: Sequence[CallRecord], said: Sequence[Said]) -> None:
    """Put the words into the `feedback` of the calls that they are about; each call has one step of the trace."""
    for one in said:
        for call in calls:
            same = call["predictor"] == one.predictor and call["outputs"] is not None and "feedback" not in call
            if same and all(one.inputs.get(name) == value for name, value in call["inputs"].items()):
                call["feedback"] = one.feedback
                break


def _steps(trace: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for step in trace:
        name = getattr(step[0], PREDICTOR_TAG, DYNAMIC)
        if name != DYNAMIC and not name.startswith(FIXED):
            yield name, step
