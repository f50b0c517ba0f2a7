"""From rollouts to chat rows for fine-tuning. Pure: no file, no model, no cluster.

A rollout that passed is a worked example of each of its calls: what the predictor was given and
what it answered. The rows of all modules are pooled, since one set of weights serves them all;
each row still names its predictor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from bt_ray.errors import TrainingError

RolloutRow = Mapping[str, Any]
Render = Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]]
How = Literal["all", "first", "best", "shortest"]


def select_rollouts(rows: Iterable[RolloutRow], samples_per_example: How) -> list[RolloutRow]:
    """The passing rollouts that give training rows.

    `all`: each of them; `first`: of each example the one with the lowest sample number; `best`:
    of each example the one with the highest score; `shortest`: the one with the fewest completion
    tokens over its calls (among equals: the lowest sample number). The order is that of each
    example's first appearance, then of the sample number, so it does not depend on which rollout
    ended first. Raises TrainingError for an unknown `samples_per_example`.
    """
    if samples_per_example not in ("all", "first", "best", "shortest"):
        raise TrainingError(f"samples_per_example {samples_per_example!r} is unknown; take all, first, best or shortest.")
    passing: dict[str, list[RolloutRow]] = {}
    for row in rows:
        kept = passing.setdefault(row["example_id"], [])  # also fixes the place of an example that only passes later
        if row["accept"] and row.get("error") is None:
            kept.append(row)
    chosen: list[RolloutRow] = []
    for kept in passing.values():
        kept.sort(key=lambda row: row["sample"])
        if samples_per_example == "all":
            chosen.extend(kept)
        elif samples_per_example == "first":
            chosen.extend(kept[:1])
        elif kept:
            chosen.append(max(kept, key=_score) if samples_per_example == "best" else min(kept, key=completion_tokens))
    return chosen


def completion_tokens(rollout: RolloutRow) -> int:
    """Tokens that the LM wrote in all calls of a rollout."""
    return sum(len(call["token_ids"]) for call in rollout["calls"])


def build_rows(
    rollouts: Sequence[RolloutRow], render: Render, deduplicate: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Chat rows of the calls of `rollouts` (as `select_rollouts` gives them), and counts.

    `render(predictor, inputs, outputs)` gives {"prompt": messages, "completion": messages}; the
    caller binds to it the adapter and the prompts (vanilla or optimised) that the rows get.

    Exact duplicates (the same prompt and completion) are dropped within one (example, predictor):
    several samples of an easy example often answer with the same words, and would count it several
    times. The same words for different examples stay: that is how often the task asks for them;
    with `deduplicate` they too count once, for the first example and predictor that has them.

    Counts: `rollouts` and `examples` that passed, `rows`, `rows_per_predictor`, `duplicates`
    dropped, `unparsed` calls left out (a retry inside a program that passed in the end), and, where
    there are any, `unnamed` calls (see `has_prompts`), which teach nothing.
    """
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str, str]] = set()
    duplicates = unparsed = unnamed = 0
    for rollout in rollouts:
        for call in rollout["calls"]:
            predictor = call["predictor"]
            if not has_prompts(predictor):
                unnamed += 1
                continue
            if call["outputs"] is None:
                unparsed += 1
                continue
            rendered = render(predictor, dict(call["inputs"]), dict(call["outputs"]))
            row = {"prompt": rendered["prompt"], "completion": rendered["completion"]}
            place = ("", "") if deduplicate else (rollout["example_id"], predictor)
            key = (*place, json.dumps(row, sort_keys=True, ensure_ascii=False))
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
            rows.append({**row, "predictor": predictor, "example_id": rollout["example_id"], "sample": rollout["sample"]})
    counts = {
        "rollouts": len(rollouts),
        "examples": len({rollout["example_id"] for rollout in rollouts}),
        "rows": len(rows),
        "rows_per_predictor": dict(sorted(Counter(row["predictor"] for row in rows).items())),
        "duplicates": duplicates,
        "unparsed": unparsed,
    }
    return rows, {**counts, "unnamed": unnamed} if unnamed else counts


def has_prompts(predictor: str) -> bool:
    """Whether candidates hold prompts of a recorded predictor.

    They hold none of frozen predictors, `(fixed) path`, nor of those that the program builds while
    it runs, `(dynamic)`. A row of such a call could not be put into the prompts of a candidate.
    """
    return not predictor.startswith("(")


def _score(row: RolloutRow) -> float:
    score = row.get("score")
    return float("-inf") if score is None else float(score)
