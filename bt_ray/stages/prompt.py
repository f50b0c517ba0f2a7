"""A prompt step: rollouts of the teacher -> demos -> search on Ray Tune -> evaluate.

The weights stay as they came. By default the search starts from the original prompts, and the
incoming program, with its own prompts, is a candidate too (paper, section 2).
"""

from __future__ import annotations

from typing import Any

from bt_ray.config import PromptStep
from bt_ray.stages import steps
from bt_ray.stages.context import StageContext
from bt_ray.stages.searching import search


def run(ctx: StageContext, config: PromptStep) -> dict[str, Any]:
    """Search prompts for the incoming weights and publish the stage's record."""
    start = ctx.incoming()
    teacher = ctx.vanilla if config.teacher == "original" else start.candidate
    student = ctx.vanilla if config.student == "original" else start.candidate
    rollouts = steps.rollout(ctx, teacher, start.weights)
    found = search(ctx, config, (student, start.candidate), rollouts, start.weights)
    evaluated = steps.evaluate(ctx, found.result["best"], start.weights)
    passed = rollouts.record.result
    note = (
        f"{passed['passed']} of {passed['rows']} rollouts pass, on {passed['examples_passed']} of {passed['examples']} examples"
    )
    outcome = {
        "kind": "p",
        "status": "done",
        "note": "; ".join([f"{note}: demos from them", f"best is {found.result['label']}", *found.result["notes"]]),
        "candidate": found.result["best"],
        "weights": ctx.relative(start.weights),
        "rollouts": steps.pass_counts(rollouts.record),
        "search": found.name,
        "evaluate": evaluated.record.name,
        "search_scores": found.result["scores"],
        "select_scores": steps.scores(ctx, evaluated),
        "row_errors": found.result["errors"] + sum(evaluated.record.result["errors"].values()),
    }
    return ctx.publish(outcome, [rollouts.record, found, evaluated.record])
