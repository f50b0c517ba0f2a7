"""Which stage a run takes home: the mean on `select`, with a one-standard-error rule. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.report.statistics import paired, present

# A stage without a score on more rows than this was scored on other examples than its rivals.
MIN_SCORED_SHARE = 0.9
# Costs this close are equal: answers of the same prompts differ by a token or two from stage to stage.
SAME_COST = 1.05


@dataclass(frozen=True)
class StageScores:
    """What the pick looks at. `tokens`: of prompts and completions, per example of `select`: what an answer costs."""

    id: str
    path: str
    depth: int
    tokens: float
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Pick:
    """The stage that was picked, the stage with the best mean, and why in a sentence."""

    id: str
    best_id: str
    why: str


@dataclass(frozen=True)
class _Ranked:
    stage: StageScores
    mean: float
    behind: float  # mean paired difference best - stage
    error: float  # standard error of that difference


def pick(stages: Sequence[StageScores]) -> Pick | None:
    """The cheapest stage within one standard error of the best mean on `select`. None without scores.

    The rule of Breiman et al. 1984 (CART, section 3.4.3) with the standard error of the *paired*
    difference to the best, as all stages are scored on the same examples. The cost is that of using
    the stage's program, in tokens: what training it took is spent by now, whichever is picked. Equal
    costs go to the shorter path, then to the higher mean, then to the earlier stage. A stage that was
    scored on fewer than nine tenths of the rows is left out.
    """
    fullest = max((len(present(stage.scores)) for stage in stages), default=0)
    if fullest == 0:
        return None
    eligible = [stage for stage in stages if len(present(stage.scores)) >= MIN_SCORED_SHARE * fullest]
    best = min(eligible, key=lambda stage: (-_mean(stage), stage.depth, stage.tokens))
    ranked = [_rank(stage, best) for stage in eligible]
    near = [item for item in ranked if item.behind <= item.error + 1e-12]
    cheapest = min(item.stage.tokens for item in near)
    cheap = [item for item in near if item.stage.tokens <= SAME_COST * cheapest]
    chosen = min(cheap, key=lambda item: (item.stage.depth, -item.mean))
    top = next(item for item in ranked if item.stage is best)
    why = _sentence(chosen, top, len(eligible))
    left_out = [stage.path for stage in stages if stage not in eligible and present(stage.scores)]
    if left_out:
        why += (
            f" Left out, as too many of their rows have no score (the metric failed, or the process died): {', '.join(left_out)}."
        )
    return Pick(chosen.stage.id, best.id, why)


def from_facts(facts: Mapping[str, Any]) -> list[StageScores]:
    """The finished stages of `facts` (see `bt_ray.report.build`), each with what its program costs to use."""
    by_id = {stage["id"]: stage for stage in facts["stages"]}
    result = []
    for stage in facts["stages"]:
        if stage["status"] != "done" or not present(stage.get("select_scores")):
            continue
        tokens = stage.get("tokens_per_example")
        cost = math.inf if tokens is None else float(tokens)  # what is not known is not cheap
        depth = len(path_of(stage["id"], by_id)) - 1
        result.append(StageScores(stage["id"], stage["path"], depth, cost, stage["select_scores"]))
    return result


def path_of(stage_id: str, by_id: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The stages from the root to `stage_id`, both included. Raises ValueError on a circle."""
    chain: list[Mapping[str, Any]] = []
    current: str | None = stage_id
    while current is not None and current in by_id:
        if len(chain) > len(by_id):
            raise ValueError(f"stages: the parents of {stage_id!r} run in a circle.")
        chain.append(by_id[current])
        current = by_id[current].get("parent")
    return chain[::-1]


def _mean(stage: StageScores) -> float:
    values = present(stage.scores).values()
    return math.fsum(values) / len(values)


def _rank(stage: StageScores, best: StageScores) -> _Ranked:
    top, own = paired(best.scores, stage.scores)
    differences = [x - y for x, y in zip(top, own, strict=True)]
    n = len(differences)
    if n < 2:
        # No spread to speak of: only an equal mean counts as near.
        return _Ranked(stage, _mean(stage), _mean(best) - _mean(stage), 0.0)
    mean = math.fsum(differences) / n
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    return _Ranked(stage, _mean(stage), mean, math.sqrt(variance / n))


def _sentence(chosen: _Ranked, top: _Ranked, count: int) -> str:
    if count == 1:
        return f"{chosen.stage.path} is the only stage with scores on select ({chosen.mean:.3f})."
    if chosen.stage is top.stage:
        rest = "and no cheaper stage is within one standard error of it"
        return f"{top.stage.path} has the best mean on select ({top.mean:.3f}), {rest}."
    own, best = chosen.stage, top.stage
    if own.tokens * SAME_COST < best.tokens:
        cheaper = f"costs less to use ({own.tokens:.0f} tokens an example against {best.tokens:.0f})"
    else:
        cheaper = "takes fewer steps" if own.depth < best.depth else "costs no more to use"
    if chosen.behind <= 1e-12:
        return f"{own.path} scores as high on select as the best stage, {best.path} ({top.mean:.3f}), and {cheaper}."
    return (
        f"{own.path} ({chosen.mean:.3f} on select) is within one standard error ({chosen.error:.3f}) "
        f"of the best stage, {best.path} ({top.mean:.3f}), and {cheaper}."
    )
