"""The user's metric, called with as many arguments as it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bt_ray.errors import ConfigError

METRIC_FORM = "metric(example, prediction, trace=None)"
MAX_POSITIONAL = 5  # GEPA's metrics: (gold, pred, trace, pred_name, pred_trace)
PREDICTOR_PARTS = ("pred_name", "pred_trace")


@dataclass(frozen=True)
class Metric:
    """A metric and how many positional arguments it is called with."""

    function: Callable[..., Any]
    positional: int
    takes_trace: bool
    takes_predictor: bool = False

    @classmethod
    def of(cls, function: Any, name: str) -> Metric:
        """Check a metric. Raises ConfigError."""
        if not callable(function):
            raise ConfigError(f"{name} is a {type(function).__name__}; name a function {METRIC_FORM}.")
        if inspect.isclass(function):
            raise ConfigError(f"{name} is a class; name an instance of it, or a function {METRIC_FORM}.")
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"{name} is a coroutine function; write it with plain `def`.")
        signature = inspect.signature(function)
        fitting = [count for count in range(2, MAX_POSITIONAL + 1) if _binds(signature, count)]
        if not fitting:
            raise ConfigError(f"{name} cannot take (example, prediction): it is defined as {signature}. Write {METRIC_FORM}.")
        # By their names: the fourth and fifth parameter of another metric mean something else.
        takes_predictor = fitting[0] == MAX_POSITIONAL or {*PREDICTOR_PARTS} <= signature.parameters.keys()
        return cls(function, fitting[0], _binds(signature, max(3, fitting[0])), takes_predictor)

    def __call__(self, example: Any, prediction: Any, trace: list[Any] | None = None) -> Any:
        count = max(3, self.positional) if trace is not None and self.takes_trace else self.positional
        return self.function(*(example, prediction, trace, None, None)[:count])

    def of_predictor(self, example: Any, prediction: Any, trace: list[Any], name: str, steps: list[Any]) -> Any:
        """What a metric that takes a predictor says of one: `steps` is the predictor's part of the trace."""
        if self.positional == MAX_POSITIONAL:
            return self.function(example, prediction, trace, name, steps)
        return self.function(example, prediction, trace, **dict(zip(PREDICTOR_PARTS, (name, steps), strict=True)))


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
