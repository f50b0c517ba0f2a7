"""`labeled`: labelled examples as demos, drawn at random. The control of the bootstrapping searchers."""

from __future__ import annotations

import random

from bt_ray.search.base import ListSearcher, Proposal, SearchContext
from bt_ray.search.demos import draw_labelled, labelled_demos, labelled_predictors, with_demos


def build(context: SearchContext) -> ListSearcher:
    """The incoming prompts, no demos, then `num_candidates` draws of `max_labeled_demos` examples.

    The order of the demos within a prompt is part of a draw.
    """
    step, notes = context.step, []
    proposals: list[Proposal] = [
        {"label": "incoming", "candidate": context.incoming or context.student},
        {"label": "zero_shot", "candidate": with_demos(context.student, {})},
    ]
    if labelled_predictors(context) and step.max_labeled_demos:
        for number in range(step.num_candidates):
            rng = random.Random(f"{context.seed}/labeled/{number}")
            chosen = draw_labelled(context, context.examples, rng, step.max_labeled_demos)
            candidate = with_demos(context.student, labelled_demos(context, chosen))
            proposals.append({"label": f"labels {number + 1}", "candidate": candidate})
    else:
        notes.append("No predictor has all its outputs labelled and its inputs given, so no candidate has labelled demos.")
    return ListSearcher(proposals, notes)
