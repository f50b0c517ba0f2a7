"""What a run has spent before a test looks at its budget."""

from __future__ import annotations

from pathlib import Path

from bt_ray.runs.commit import Cost, Step, StepKey


def spend(root: Path, lm_calls: int) -> str:
    """Commit a step that cost so many calls, once; its name."""
    step = Step(root, StepKey("evaluate", {"lm_calls": lm_calls}))
    if step.record() is None:
        step.begin()
        step.commit("vanilla", {}, Cost(lm_calls=lm_calls))
    return step.key.name
