"""Counts what a stage writes while it runs: LM calls, and completion tokens per second."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray.rollout.rows import REUSED

JOURNALS = "*_calls.jsonl"  # what a search step writes of its proposer and of optimisers that run the program themselves


@dataclass
class _Step:
    """A step's folder of rows, and the journals beside it; `places` holds how far each file was read."""

    started_s: float
    lm_calls: int = 0
    tokens: int = 0
    before: int | None = None  # tokens that an earlier attempt had written
    places: dict[Path, int] = field(default_factory=dict)


class RowMeter:
    """Reads row files, and the journals of calls that are no rows (`*_calls.jsonl` beside the rows), as they grow.

    Every byte is read once.
    """

    def __init__(self) -> None:
        self._steps: dict[str, dict[Path, _Step]] = defaultdict(dict)

    def read(self, stage_id: str, folder: Path | None, now_s: float | None = None) -> tuple[int, float | None]:
        """(LM calls of the stage's steps seen so far, completion tokens per second of the step in `folder`).

        The rate counts from the first reading; None before there is a second one, and for a step without rows.
        """
        steps = self._steps[stage_id]
        rate = self._look(steps, folder, time.monotonic() if now_s is None else now_s) if folder else None
        return sum(step.lm_calls for step in steps.values()), rate

    def _look(self, steps: dict[Path, _Step], folder: Path, now: float) -> float | None:
        step = steps.setdefault(folder, _Step(now))
        for path in sorted([*folder.rglob("*.jsonl"), *folder.parent.glob(JOURNALS)]):
            self._read_on(path, step)
        if step.before is None:
            step.before = step.tokens
        seconds = now - step.started_s
        return (step.tokens - step.before) / seconds if seconds > 0 else None

    def _read_on(self, path: Path, step: _Step) -> None:
        with open(path, "rb") as file:
            file.seek(step.places.get(path, 0))
            whole, newline, _ = file.read().rpartition(b"\n")
        for line in whole.splitlines():
            found = json.loads(line)
            calls = [] if found.get(REUSED) else found["calls"] if "calls" in found else [found["answer"]]
            step.lm_calls += len(calls)
            step.tokens += sum(_tokens(call) for call in calls)
        step.places[path] = step.places.get(path, 0) + len(whole) + len(newline)


def _tokens(call: dict[str, Any]) -> int:
    """Completion tokens of a call; an endpoint gives their number in place of their ids."""
    return int(call.get("extra", {}).get("completion_tokens", len(call["token_ids"])))
