"""What runs in a trial's process: one candidate, a rung per step. Imports no more than it needs."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from bt_ray.environment import end_with_parent
from bt_ray.errors import BtRayError
from bt_ray.search.base import Evaluator


class CandidateTrial(tune.Trainable):
    """Scores one candidate, a rung per step. Its process serves many candidates."""

    def setup(self, config: dict[str, Any], work: list[Any] | None = None) -> None:
        """`work` is [reference to (evaluator, batches)], fetched in the first step: what goes wrong
        in unpickling an evaluator is then reported like any exception of it."""
        end_with_parent()
        self._work = work or []
        self._loaded: tuple[Evaluator, list[list[str]]] | None = None
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        self._candidate_id = config["candidate_id"]
        self._candidate = json.loads(config["candidate"])
        self._rung = 0

    def step(self) -> dict[str, Any]:
        """One rung. An exception travels as a value: Tune would retry it and keep only its text."""
        started = time.monotonic()
        report = {"score": 0.0, "candidate_id": self._candidate_id, "rung": self._rung, "scores": [], "error": None}
        try:
            if self._loaded is None:
                self._loaded = ray.get(self._work[0])
            evaluator, batches = self._loaded
            scores = evaluator.evaluate(self._candidate, batches[self._rung])
            report["scores"] = [(example_id, float(score)) for example_id, score in scores.items()]
            usable = [score for _, score in report["scores"] if math.isfinite(score)]
            report["score"] = math.fsum(usable) / len(batches[self._rung])
        except Exception as error:
            report["error"] = ray.cloudpickle.dumps(_plain(error))
        self._rung += 1
        return {**report, "seconds": time.monotonic() - started}


def _plain(error: Exception) -> Exception:
    """The exception as it was raised, without Ray's wrapping, in a form that pickles."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(cause))
    except Exception:  # an exception of the user's may hold anything, or need arguments to be built
        return BtRayError(f"search: {type(cause).__name__} while scoring a candidate: {cause}")
    return cause
