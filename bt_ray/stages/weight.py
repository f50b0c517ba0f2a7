"""A weight step: rollouts of the incoming program -> chat rows or preference pairs -> fine-tune -> evaluate.

Training rows carry the vanilla prompts by default (paper, section 2). Afterwards both the vanilla
and the incoming prompts are evaluated on the new weights; the better on `select` is carried on.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.rollout.candidates import candidate_id
from bt_ray.runs.commit import Record
from bt_ray.stages import steps
from bt_ray.stages.context import Candidate, StageContext

UNITS = {"sft": "rows", "dpo": "preference pairs"}  # what a method learns from


def run(ctx: StageContext, config: WeightStep) -> dict[str, Any]:
    """Fine-tune on the incoming program's rollouts and publish the stage's record."""
    start = ctx.incoming()
    rollouts = steps.rollout(ctx, start.candidate, start.weights, ctx.examples("train"))
    if not rollouts.record.result["passed"]:
        return _skipped(ctx, rollouts.record, f"none of {rollouts.record.result['rows']} rollouts passes")
    prompts = ctx.vanilla if config.row_prompts == "vanilla" else start.candidate
    rows, counts = training_rows(ctx, config, rollouts.rows, prompts)
    why = nothing_to_learn(config, rows, counts)
    if why:
        return _skipped(ctx, rollouts.record, why)
    tuned, weights = steps.finetune_parts(ctx, config, rows, start.weights)
    outcome = _better_prompts(ctx, weights, start.candidate)
    used = [rollouts.record, *tuned, *outcome.pop("records")]
    passed = rollouts.record.result
    note = f"{passed['passed']} of {passed['rows']} rollouts pass: {len(rows)} {UNITS[config.method]} to learn from"
    note += steps.taken_over(ctx, rollouts.record)
    outcome |= {
        "kind": "w",
        "status": "done",
        "note": "; ".join([note + kept_back([one.result.get("counts", {}) for one in tuned]), *outcome.pop("notes")]),
        "weights": ctx.relative(weights),
        "rollouts": steps.pass_counts(rollouts.record),
        "rows": len(rows),
        "rows_by_predictor": counts["rows_per_predictor"],
        "finetune": tuned[0].name,
    }
    return ctx.publish(outcome, used)


def training_rows(
    ctx: StageContext, config: WeightStep, rollouts: Sequence[dict[str, Any]], prompts: Candidate
) -> tuple[list, dict]:
    """Chat rows of the passing rollouts (dpo: pairs of better and worse ones), all modules pooled, and counts."""
    from bt_ray.rollout.render import row_renderer
    from bt_ray.training.pairs import build_pairs
    from bt_ray.training.rows import build_rows, select_rollouts

    render = row_renderer(ctx.spec, prompts)
    if config.method == "dpo":
        return build_pairs(rollouts, render, config)
    return build_rows(select_rollouts(rollouts, config.samples_per_example), render, config.deduplicate)


def nothing_to_learn(config: WeightStep, rows: list[dict[str, Any]], counts: dict[str, Any]) -> str | None:
    """Why the step is skipped, or None."""
    from bt_ray.training.pairs import why_no_pair

    if not rows:
        return why_no_pair(counts) if config.method == "dpo" else "no call of a passing rollout could be parsed"
    if config.validation_share and len({row["example_id"] for row in rows}) < 2:
        return "validation_share holds out the only example that passes"
    return None


def kept_back(counts: list[dict[str, int]]) -> str:
    """What of the rows was not trained on, for the note: `, 4 held out, 7 left out by max_train_tokens`."""
    held_out, left_out = (sum(one.get(name, 0) for one in counts) for name in ("held_out", "left_out"))
    words = f", {held_out} held out" if held_out else ""
    return words + (f", {left_out} left out by max_train_tokens" if left_out else "")


def _skipped(ctx: StageContext, record: Record, why: str) -> dict[str, Any]:
    note = f"{why}, so there is nothing to learn from"
    outcome = {"kind": "w", "status": "skipped", "note": note, "rollouts": steps.pass_counts(record), "row_errors": 0}
    return ctx.publish(outcome, [record])


def _better_prompts(ctx: StageContext, weights: Any, incoming: Candidate) -> dict[str, Any]:
    """Evaluate the vanilla and the incoming prompts on the new weights; ties go to the vanilla ones."""
    choices = {"vanilla": ctx.vanilla}
    if candidate_id(incoming) != candidate_id(ctx.vanilla):
        choices["incoming"] = incoming
    found = {name: steps.evaluate(ctx, candidate, weights) for name, candidate in choices.items()}
    means = {name: mean(steps.scores(ctx, evaluated)) for name, evaluated in found.items()}
    best = max(choices, key=lambda name: (means[name], name == "vanilla"))
    notes = [f"carries on the {best} prompts ({', '.join(f'{name} {value:.2f}' for name, value in means.items())} on select)"]
    return {
        "candidate": choices[best],
        "evaluate": found[best].record.name,
        "select_scores": steps.scores(ctx, found[best]),
        "alternatives": means,
        "row_errors": sum(found[best].record.result["errors"].values()),
        "records": [evaluated.record for evaluated in found.values()],
        "notes": notes if len(choices) > 1 else [],
    }


def mean(scores: dict[str, float | None]) -> float:
    values = [score for score in scores.values() if score is not None]
    return fmean(values) if values else 0.0
