"""That each part of `random_fewshot` finds more, on a planted problem with a stub LM; no Ray."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from functools import cache

import pytest

from bt_ray.search import random_fewshot
from bt_ray.search.base import Candidate, SearchContext
from tests.support.planted_demos import Planted, dspy_search, search

SEEDS = range(50)
NUM_DRAWS = 10


@cache
def searches() -> list[tuple[bool, float, int]]:
    """Of each seed: whether the winner answers everything, the share of such candidates, and the calls of the stub LM."""
    results = []
    for seed in SEEDS:
        problem = Planted(seed)
        ledger = search(problem, problem.context(NUM_DRAWS))
        best = ledger.best()
        assert best is not None
        perfect = sum(entry.complete and entry.score == 1.0 for entry in ledger.entries.values())
        results.append((best.score == 1.0, perfect / len(ledger.entries), problem.calls))
    return results


def num_found() -> int:
    return sum(found for found, _, _ in searches())


def num_found_without() -> int:
    """The same searches, not remembered."""
    return sum(found for found, _, _ in searches.__wrapped__())


def test_finds_a_planted_demo_set_at_least_as_often_as_dspy_with_the_same_number_of_calls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """38 against 26 of 50: the training examples are run once, not again for each draw."""
    caplog.set_level(logging.ERROR, logger="dspy")
    theirs = sum(dspy_search(Planted(seed), calls) == 1.0 for seed, (_, _, calls) in zip(SEEDS, searches(), strict=True))
    print("ours", num_found(), "dspy", theirs)
    assert num_found() >= 34 and num_found() >= theirs


def test_one_set_of_demos_is_found_far_less_often_than_the_best_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the draws the first passing traces are left."""
    whole = num_found()

    def same(context: SearchContext, pool: dict[str, list[random_fewshot.Row]], rng: random.Random) -> Candidate:
        return random_fewshot.with_demos(context.student, {})

    monkeypatch.setattr(random_fewshot, "_draw", same)
    without = num_found_without()
    print("draws", whole, without)
    assert whole - without >= 15  # 38 and 12 of 50


def test_a_drawn_set_that_is_not_chosen_by_its_score_is_seldom_the_best() -> None:
    """What a choice at random among the candidates would find."""
    blind = sum(share for _, share, _ in searches())
    print("blind", blind)
    assert num_found() - blind >= 25  # 38 and 5 of 50


def test_traces_that_did_not_pass_spoil_the_demos() -> None:
    whole, without = num_found(), 0
    for seed in SEEDS:
        problem = Planted(seed)
        context = problem.context(NUM_DRAWS)
        every = replace(context, rollouts=[{**row, "accept": True} for row in context.rollouts])
        best = search(problem, every).best()
        without += best is not None and best.score == 1.0
    print("filter", whole, without)
    assert whole - without >= 15  # 38 and 8 of 50
