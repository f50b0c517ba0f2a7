"""A prompt step: rollouts of the teacher -> demos -> search on Ray Tune -> evaluate.

The weights stay as they came. By default the search starts from the original prompts, and the
incoming program, with its own prompts, is a candidate too (paper, section 2).
"""

from __future__ import annotations

from typing import Any

from bt_ray.config import PromptStep
from bt_ray.errors import BudgetError
from bt_ray.runs.commit import Record
from bt_ray.stages import steps
from bt_ray.stages.beside import other_model, other_weights
from bt_ray.stages.context import Incoming, StageContext
from bt_ray.stages.searching import examples_of, search


def run(ctx: StageContext, config: PromptStep) -> dict[str, Any]:
    """Search prompts for the incoming weights and publish the stage's record.

    Where the budget does not pay for it the stage is skipped, until the run is given another budget.
    """
    used: list[Record] = []
    try:
        outcome = _searched(ctx, config, used)
    except BudgetError as error:
        budget = ctx.config.budget.model_dump(mode="json")
        outcome = {"kind": "p", "status": "skipped", "note": f"stopped by the budget: {error}", "row_errors": 0, "budget": budget}
    return ctx.publish(outcome, used)


def _searched(ctx: StageContext, config: PromptStep, used: list[Record]) -> dict[str, Any]:
    """What the stage ends with; the records that it follows from are added to `used`. Raises BudgetError."""
    start = ctx.incoming()
    student = ctx.vanilla if config.student == "original" else start.candidate
    rollouts = teacher_rollouts(ctx, config, start)
    used.append(rollouts.record)
    found = search(ctx, config, (student, start.candidate), rollouts, start.weights)
    used.append(found)
    evaluated = steps.evaluate(ctx, found.result["best"], start.weights)
    used.append(evaluated.record)
    passed = rollouts.record.result
    note = (
        f"{passed['passed']} of {passed['rows']} rollouts pass, on {passed['examples_passed']} of {passed['examples']} examples"
        f"{steps.taken_over(ctx, rollouts.record)}"
    )
    return {
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


def teacher_rollouts(ctx: StageContext, config: PromptStep, start: Incoming) -> steps.Rollouts:
    """Rollouts of the program that gives the demos, on the step's training examples: with the incoming weights, or with
    those of another model."""
    prompts = ctx.vanilla if config.teacher_prompts == "original" else start.candidate
    train = examples_of(ctx, config, "train")
    if isinstance(config.teacher, str):
        return steps.rollout(ctx, prompts, start.weights, train)
    found = steps.committed_rollout(ctx, prompts, other_weights(ctx, config.teacher.model), train)
    if found is not None:  # no engine is started for what is there
        return found
    with other_model(ctx, config.teacher.model, config.teacher.engine) as (other, weights):
        return steps.rollout(other, prompts, weights, train)
