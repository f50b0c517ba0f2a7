"""Baselines beside the stages, scored on test after the pick.

What labels alone would have brought: the labelled predictor fine-tuned on gold labels, and TF-IDF
with logistic regression. And what prompt search alone brings at the cost of the whole pick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bt_ray.config import PromptStep, WeightStep
from bt_ray.errors import CanaryError, TrainingError
from bt_ray.runs.commit import Record, read_record
from bt_ray.stages import steps
from bt_ray.stages.context import Incoming, Row, StageContext
from bt_ray.stages.lent import lenders
from bt_ray.stages.prompt import teacher_rollouts
from bt_ray.stages.searching import search
from bt_ray.strategy import StageNode

GOLD = "fine-tuned on gold labels"
EQUAL_COST = "equal_cost"  # the kind of the control that the pick is set against, paired
MAX_TIMES = 20  # of the step's own number of candidates: beyond it a search only repeats itself


def gold(ctx: StageContext, records: list[Record]) -> dict[str, Any] | None:
    """The labelled predictor, fine-tuned alone on gold labels; its inputs come from vanilla rollouts."""
    name = ctx.config.controls.gold
    if not name:
        return None
    step = ctx.config.steps[name]
    every = {predictor: signature["outputs"] for predictor, signature in ctx.identity["signatures"].items()}
    labelled = {name: outputs for name, outputs in ctx.labelled_outputs().items() if set(outputs) == set(every[name])}
    if not isinstance(step, WeightStep) or not labelled:
        return {"name": GOLD, "test_scores": None, "note": "no predictor has labels for all of its outputs"}
    rollouts = steps.rollout(ctx, ctx.vanilla, ctx.base, ctx.examples("train"))
    rows = gold_rows(ctx, rollouts.rows, labelled)
    if not rows:
        return {"name": GOLD, "test_scores": None, "note": "no rollout reached the labelled predictor"}
    try:
        tuned, weights = steps.finetune_parts(ctx, step.model_copy(update={"method": "sft"}), rows, ctx.base)
        found = steps.evaluate(ctx, ctx.vanilla, weights, "test")
    except (TrainingError, CanaryError) as error:  # a control must not cost the results of the stages
        return {"name": GOLD, "test_scores": None, "note": str(error)}
    records += [*tuned, found.record]
    note = f"{', '.join(labelled)} alone, {len(rows)} labelled rows"
    return {"name": GOLD, "test_scores": steps.scores(ctx, found), "note": note}


def gold_rows(ctx: StageContext, rollouts: Sequence[Row], labelled: dict[str, list[str]]) -> list[Row]:
    """One row per train example and predictor of `labelled` (with all its outputs): its inputs as they came, the label as
    answer."""
    from bt_ray.rollout.render import row_renderer

    render = row_renderer(ctx.spec, ctx.vanilla)
    labels = {row["id"]: row["labels"] for row in ctx.examples("train")}
    rows, seen = [], set()
    for rollout in rollouts:
        for call in rollout["calls"]:
            outputs = labelled.get(call["predictor"])
            key = (rollout["example_id"], call["predictor"])
            if not outputs or key in seen:
                continue
            if any(output not in labels[rollout["example_id"]] for output in outputs):
                continue  # this row has no label, others do
            seen.add(key)
            gold = {output: labels[rollout["example_id"]][output] for output in outputs}
            row = render(call["predictor"], call["inputs"], gold)
            rows.append({**row, "predictor": call["predictor"], "example_id": rollout["example_id"]})
    return rows


def tfidf(ctx: StageContext) -> dict[str, Any] | None:
    """TF-IDF of the text inputs with logistic regression on one label field: scikit-learn's defaults, but for more iterations,
    so that it converges."""
    label = ctx.config.controls.tfidf
    if not label:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = ([row for row in ctx.examples(split) if label in row["labels"]] for split in ("train", "test"))
    text = {row["id"]: " ".join(str(value) for value in row["inputs"].values()) for row in [*train, *test]}
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([text[row["id"]] for row in train], [row["labels"][label] for row in train])
    predicted = model.predict([text[row["id"]] for row in test])
    scores = {row["id"]: float(row["labels"][label] == answer) for row, answer in zip(test, predicted, strict=True)}
    return {"name": "TF-IDF + logistic regression", "test_scores": scores, "note": f"{len(train)} labelled rows"}


def equal_cost(ctx: StageContext, records: list[Record]) -> dict[str, Any] | None:
    """The prompt step alone on the base weights, with as many candidates as the seconds of the pick's whole path pay for."""
    name = ctx.config.controls.equal_cost
    pick = ctx.run.pick()
    if not name or pick is None:
        return None
    title, step = f"{name} at equal cost", ctx.config.steps[name]
    control = {"name": title, "kind": EQUAL_COST, "step": name, "test_scores": None}
    own = ctx.run.stage_record(name) if isinstance(step, PromptStep) else None
    if not isinstance(step, PromptStep) or own is None or own["status"] != "done":
        return {**control, "note": f"the stage {name!r} has no outcome to take its cost from"}
    searched = read_record(ctx.run.step(own["search"]))
    assert searched is not None
    seconds = path_seconds(ctx, pick["id"])
    rest = path_seconds(ctx, name) - searched.cost.seconds  # what the prompt step pays beside its search, whoever ran it
    number = candidates_for(seconds - rest, searched, step)
    if number <= step.num_candidates:
        return {**control, "note": f"the pick cost no more than {name} itself"}
    rollouts = teacher_rollouts(ctx, step, Incoming(ctx.vanilla, ctx.base))
    found = search(ctx, step.model_copy(update={"num_candidates": number}), (ctx.vanilla, ctx.vanilla), rollouts, ctx.base)
    evaluated = steps.evaluate(ctx, found.result["best"], ctx.base, "test")
    records += [found, evaluated.record]
    most = ", the most that are tried" if number == MAX_TIMES * step.num_candidates else ""
    spent = rest + found.cost.seconds
    note = f"{number} candidates{most} in place of {step.num_candidates}: {spent:.0f} s, where the pick took {seconds:.0f} s"
    return {**control, "test_scores": steps.scores(ctx, evaluated), "note": note}


def path_seconds(ctx: StageContext, stage_id: str) -> float:
    """Seconds of the steps that a stage and those before it on its path used: each step once, whichever stage ran it, and of one
    that only lent rows the share that these are of it."""
    names: list[str] = []
    node: StageNode | None = StageNode.of(stage_id)
    while node is not None:
        names += (ctx.run.stage_record(node.id) or {"steps": []})["steps"]
        node = node.parent
    shares = dict.fromkeys(names, 1.0)
    for name in list(shares):
        for lender, rows in lenders(ctx.run.step(name)).items():
            if shares.get(lender, 0.0) < 1.0 and (lent := read_record(ctx.run.step(lender), verify_files=False)):
                shares[lender] = min(1.0, shares.get(lender, 0.0) + rows / lent.result["rows"])
    found = {name: read_record(ctx.run.step(name), verify_files=False) for name in shares}
    return sum(share * record.cost.seconds for name, share in shares.items() if (record := found[name]))


def candidates_for(seconds: float, searched: Record, step: PromptStep) -> int:
    """`num_candidates` of a search that takes `seconds`, at the rate per trial of one that was made. Pure.

    Trials beside those that are counted, such as the prompts as they came in, are in both searches.
    """
    each = searched.cost.seconds / max(1, len(searched.result["trials"]))
    more = int((seconds - searched.cost.seconds) / each) if each > 0 else 0
    return min(MAX_TIMES * step.num_candidates, step.num_candidates + more)
