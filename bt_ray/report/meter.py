"""Counts what a stage's workers write while they run: LM calls, and completion tokens per second."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class _Step:
    """A folder of rows; `places` holds how far each file was read."""

    started_s: float
    lm_calls: int = 0
    tokens: int = 0
    before: int | None = None  # tokens that an earlier attempt had written
    places: dict[Path, int] = field(default_factory=dict)


class RowMeter:
    """Reads row files as they grow, every byte once."""

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
        for path in sorted(folder.rglob("*.jsonl")):
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
            calls = json.loads(line)["calls"]
            step.lm_calls += len(calls)
            step.tokens += sum(len(call["token_ids"]) for call in calls)
        step.places[path] = step.places.get(path, 0) + len(whole) + len(newline)
