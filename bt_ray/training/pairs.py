"""From rollouts to preference pairs for fine-tuning. Pure: no file, no model, no cluster.

Several rollouts of one example are compared by a reward that weighs quality against tokens, as in
Optima (arXiv 2410.08115):

    reward = score - token_weight * completion tokens / most completion tokens of the example's rollouts

A pair is one module call of the better rollout against the same call of the worse one, where both
saw the same prompt. So in a chain of calls the first ones are compared directly, the later ones
where what came before them was equal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.rollout.evaluator import row_score
from bt_ray.training.rows import Render, completion_tokens, has_prompts

Rollout = dict[str, Any]
Pair = dict[str, Any]
Slot = tuple[str, int]  # (predictor, index among its calls in the rollout)


@dataclass(frozen=True)
class _Ranked:
    """A rollout with its reward, and its calls by slot."""

    row: Rollout
    reward: float
    tokens: int
    calls: dict[Slot, Any]

    @property
    def passes(self) -> bool:
        return bool(self.row["accept"]) and self.row["error"] is None


def build_pairs(rollouts: Sequence[Rollout], render: Render, step: WeightStep) -> tuple[list[Pair], dict[str, Any]]:
    """Preference pairs of `rollouts` (all of them, passing or not), and counts.

    Two rollouts of an example are compared where the better one passes and has the higher reward;
    the comparison with the largest difference comes first. With token_weight 0 tokens decide among
    equal scores only: the shortest of the best is chosen, the longest of the worst is rejected. A
    rollout whose program failed has the score 0; one without a score (the metric failed, or the process died) is not compared. Each
    (example, predictor, call index) gives at most `step.max_pairs_per_call` pairs.

    `render(predictor, inputs, outputs)` gives {"prompt": messages, "completion": messages}. A pair is
    {"prompt", "chosen", "rejected"} of messages, with its `predictor` and `example_id`.

    Counts: `examples`, those `without_preference` (no passing rollout has a worse one beside it),
    `rows` (pairs), `rows_per_predictor`, and the compared calls that gave no pair: `prompts_differ`,
    `completions_equal`, `unparsed` (the output of one could not be read), `duplicates` of a pair.
    """
    samples: dict[str, list[Rollout]] = {}
    for row in rollouts:
        samples.setdefault(row["example_id"], []).append(row)
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for example_id, rows in samples.items():
        comparisons = _comparisons(_rank(rows, step.token_weight))
        counts["without_preference"] += not comparisons
        for slot in dict.fromkeys(slot for better, _ in comparisons for slot in better.calls):
            taken = islice(_pairs_of(slot, comparisons, render, counts), step.max_pairs_per_call)
            pairs += [{**pair, "predictor": slot[0], "example_id": example_id} for pair in taken]
    reasons = ("without_preference", "prompts_differ", "completions_equal", "unparsed", "duplicates")
    return pairs, {
        "examples": len(samples),
        "rows": len(pairs),
        "rows_per_predictor": dict(sorted(Counter(pair["predictor"] for pair in pairs).items())),
        **{reason: counts[reason] for reason in reasons},
    }


def why_no_pair(counts: dict[str, Any]) -> str:
    """Why `build_pairs` gave nothing, from its counts: `there is no preference pair (...)`."""
    words = {
        "without_preference": "of {examples} examples have no passing rollout beside a worse one",
        "prompts_differ": "compared calls had different prompts",
        "completions_equal": "gave the same answer",
        "unparsed": "could not be parsed",
    }
    found = [f"{counts[reason]} {text.format(**counts)}" for reason, text in words.items() if counts[reason]]
    return f"there is no preference pair ({'; '.join(found)})"


def _rank(rows: Sequence[Rollout], token_weight: float) -> list[_Ranked]:
    tokens = [completion_tokens(row) for row in rows]
    most = max(tokens) or 1
    return [
        _Ranked(row, score - token_weight * used / most, used, _slots(row))
        for row, used in zip(rows, tokens, strict=True)
        if (score := row_score(row)) is not None
    ]


def _slots(row: Rollout) -> dict[Slot, Any]:
    seen: Counter[str] = Counter()
    slots = {}
    for call in row["calls"]:
        if not has_prompts(call["predictor"]):
            continue
        slots[call["predictor"], seen[call["predictor"]]] = call
        seen[call["predictor"]] += 1
    return slots


def _comparisons(ranked: Sequence[_Ranked]) -> list[tuple[_Ranked, _Ranked]]:
    """(better, worse) rollouts of one example, the clearest preference first."""
    found = [(a, b) for a in ranked for b in ranked if a.passes and a.reward > b.reward]

    def order(pair: tuple[_Ranked, _Ranked]) -> tuple[float, int, int, int, int]:
        better, worse = pair
        return worse.reward - better.reward, better.tokens, -worse.tokens, better.row["sample"], worse.row["sample"]

    return sorted(found, key=order)


def _pairs_of(slot: Slot, comparisons: Sequence[tuple[_Ranked, _Ranked]], render: Render, counts: Counter[str]) -> Iterator[Pair]:
    """The pairs of one call in the order of the comparisons; counts why the others gave none."""
    seen: set[str] = set()
    for better, worse in comparisons:
        calls = [side.calls[slot] for side in (better, worse) if slot in side.calls]
        if len(calls) < 2:
            continue  # the other run ended before this call
        if any(call["outputs"] is None for call in calls):
            counts["unparsed"] += 1
            continue
        chosen, rejected = (render(slot[0], dict(call["inputs"]), dict(call["outputs"])) for call in calls)
        pair = {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
        key = json.dumps(pair, sort_keys=True, ensure_ascii=False)
        if chosen["prompt"] != rejected["prompt"]:
            counts["prompts_differ"] += 1
        elif chosen["completion"] == rejected["completion"]:
            counts["completions_equal"] += 1
        elif key in seen:
            counts["duplicates"] += 1
        else:
            seen.add(key)
            yield pair
