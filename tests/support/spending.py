"""What a run has spent before a test looks at it, and records as somebody would forge them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bt_ray.rollout.rows import StoredRows
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.files import write_atomic
from bt_ray.runs.identity import content_hash


def spend(root: Path, lm_calls: int) -> str:
    """Commit a step that cost so many calls, once; its name."""
    step = Step(root, StepKey("evaluate", {"lm_calls": lm_calls}))
    if step.record() is None:
        step.begin()
        step.commit("vanilla", {}, Cost(lm_calls=lm_calls))
    return step.key.name


def plant(root: Path, name: str, stage: str, cost: dict[str, Any], result: dict[str, Any] | None = None) -> None:
    """The record of a step of this name, as if it had been committed with the rows that are there."""
    found, sealed = result or {}, StoredRows(root / "steps" / name / "rows", ()).sealed
    data = {"name": name, "stage": stage, "attempt": 1, "result": found, "files": {}, "sealed": sealed, "cost": cost}
    forge(root / "steps" / name, {**data, "result_hash": content_hash(found)})


def forge(folder: Path, data: dict[str, Any]) -> None:
    """Write a record that keeps its own checksum, as somebody who means it would."""
    data = {name: value for name, value in data.items() if name != "checksum"}
    write_atomic(folder / "record.json", json.dumps({**data, "checksum": content_hash(data)}))
