"""The root of every strategy: the program as written, on the base model."""

from __future__ import annotations

from typing import Any

from bt_ray.stages import steps
from bt_ray.stages.context import StageContext


def run(ctx: StageContext) -> dict[str, Any]:
    """Evaluate on `select` and publish the stage's record."""
    start = ctx.incoming()
    found = steps.evaluate(ctx, start.candidate, start.weights)
    outcome = {
        "kind": "vanilla",
        "status": "done",
        "note": None,
        "candidate": start.candidate,
        "weights": ctx.relative(start.weights),
        "evaluate": found.record.name,
        "select_scores": steps.scores(ctx, found),
        "row_errors": sum(found.record.result["errors"].values()),
    }
    return ctx.publish(outcome, [found.record])
