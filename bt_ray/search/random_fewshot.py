"""`random_fewshot`: bootstrap few-shot with random search (BFRS).

Source: the prompt step of Soylu, Potts and Khattab (2024, arXiv 2407.10930), after Khattab et al.
(2024, arXiv 2310.03714): demos come from the program's own passing traces; several sets are drawn
and scored, and the best is kept. Four fixed candidates come first, so a search never returns
less than what it was given.
"""

from __future__ import annotations

import random

from bt_ray.search.base import Candidate, ListSearcher, Proposal, SearchContext
from bt_ray.search.demos import Row, draw_labelled, labelled_demos, labelled_predictors, passed, trace_demos, with_demos

REDRAWS = 20  # tries for a draw that no earlier one equals; few passing rows make few distinct sets


def build(context: SearchContext) -> ListSearcher:
    """Candidates, in this order: `incoming`, `zero_shot`, `labels`, `first`, then the draws.

    A draw has 1..max_bootstrapped_demos traces (size uniform), one per example, and labelled demos
    for the rest up to max_labeled_demos where a predictor can have them. With no passing rollout
    the draws are of labelled demos alone.
    """
    pool, step = passed(context), context.step
    proposals: list[Proposal] = [
        {"label": "incoming", "candidate": context.incoming or context.student},
        {"label": "zero_shot", "candidate": with_demos(context.student, {})},
        {"label": "labels", "candidate": _labels_only(context, random.Random(f"{context.seed}/labels"), step.max_labeled_demos)},
    ]
    if pool and step.max_bootstrapped_demos:
        first = [rows[0] for rows in list(pool.values())[: step.max_bootstrapped_demos]]
        proposals.append({"label": "first", "candidate": _fill(context, first, random.Random(f"{context.seed}/first"))})
    seen = [proposal["candidate"] for proposal in proposals]
    for number in range(step.num_candidates):
        for attempt in range(REDRAWS):
            candidate = _draw(context, pool, random.Random(f"{context.seed}/draw/{number}/{attempt}"))
            if candidate not in seen:
                seen.append(candidate)
                proposals.append({"label": f"draw {number + 1}", "candidate": candidate})
                break
    return ListSearcher(_distinct(proposals), _notes(context, pool, proposals))


def _draw(context: SearchContext, pool: dict[str, list[Row]], rng: random.Random) -> Candidate:
    step = context.step
    if not pool or not step.max_bootstrapped_demos:
        return _labels_only(context, rng, rng.randint(min(1, step.max_labeled_demos), step.max_labeled_demos))
    size = min(rng.randint(1, step.max_bootstrapped_demos), len(pool))
    # Examples first, then one rollout of each: every predictor's demos come from the same traces.
    rows = [rng.choice(pool[example_id]) for example_id in rng.sample(list(pool), size)]
    return _fill(context, rows, rng)


def _fill(context: SearchContext, rows: list[Row], rng: random.Random) -> Candidate:
    """Demos of these traces, then labelled demos of other examples up to max_labeled_demos."""
    demos = trace_demos(context, rows, rng)
    used = {row["example_id"] for row in rows}
    others = [example for example in context.examples if example["id"] not in used]
    spare = max(0, context.step.max_labeled_demos - len(rows))
    labelled = labelled_demos(context, draw_labelled(context, others, rng, spare))
    return with_demos(context.student, {name: demos[name] + labelled[name] for name in demos})


def _labels_only(context: SearchContext, rng: random.Random, size: int) -> Candidate:
    chosen = draw_labelled(context, context.examples, rng, size)
    return with_demos(context.student, labelled_demos(context, chosen))


def _distinct(proposals: list[Proposal]) -> list[Proposal]:
    """Each candidate once, under its first label: the report then counts what was really tried."""
    kept: list[Proposal] = []
    for proposal in proposals:
        if all(proposal["candidate"] != other["candidate"] for other in kept):
            kept.append(proposal)
    return kept


def _notes(context: SearchContext, pool: dict[str, list[Row]], proposals: list[Proposal]) -> list[str]:
    notes = []
    if not pool:
        notes.append("No rollout passed, so no candidate has bootstrapped demos; labelled demos and zero-shot are left.")
    else:
        notes.append(f"Bootstrapped demos come from {len(pool)} of {len(context.examples)} examples.")
    bare = [name for name in context.signatures if name not in labelled_predictors(context)]
    if bare:
        notes.append(f"No labelled demos for {', '.join(bare)}: the examples do not label all of their outputs.")
    drawn = sum(proposal["label"].startswith("draw ") for proposal in proposals)
    if drawn < context.step.num_candidates:
        notes.append(f"Only {drawn} of {context.step.num_candidates} draws differ from the other candidates.")
    return notes
