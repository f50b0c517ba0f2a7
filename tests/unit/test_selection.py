"""The pick: best mean on select, one standard error toward the cheaper stage."""

from __future__ import annotations

import random
from typing import Any

from bt_ray.report.selection import Pick, StageScores, from_facts, pick
from tests.support.report_facts import demo_facts


def stage(path: str, tokens: float, scores: list[float | None]) -> StageScores:
    depth = 0 if path == "vanilla" else path.count("->") + 1
    return StageScores(path, path, depth, tokens, {f"e{index}": score for index, score in enumerate(scores)})


def chosen(*stages: StageScores) -> Pick:
    found = pick(stages)
    assert found is not None
    return found


def test_a_clear_winner_is_picked_though_it_costs_more() -> None:
    found = chosen(stage("vanilla", 10, [0.0] * 30 + [1.0] * 10), stage("p -> w", 900, [1.0] * 40))
    assert (found.id, found.best_id) == ("p -> w", "p -> w")
    assert "best mean on select (1.000)" in found.why


def test_a_cheaper_stage_within_one_standard_error_is_picked() -> None:
    # One row of 40 apart: difference 0.025, standard error of the paired difference 0.025.
    best, cheap = [1.0] * 30 + [0.0] * 10, [1.0] * 29 + [0.0] * 11
    found = chosen(stage("p", 100, cheap), stage("p -> w", 400, best))
    assert (found.id, found.best_id) == ("p", "p -> w")
    assert (
        "within one standard error (0.025)" in found.why and "costs less to use (100 tokens an example against 400)" in found.why
    )


def test_the_error_is_that_of_the_paired_difference() -> None:
    # Unpaired, 0.75 and 0.675 of 40 lie well within one error (0.07); paired, three rows all go one way.
    best, worse = [1.0] * 30 + [0.0] * 10, [1.0] * 27 + [0.0] * 13
    assert chosen(stage("p", 100, worse), stage("p -> w", 400, best)).id == "p -> w"


def test_a_dearer_stage_within_the_error_is_not_picked() -> None:
    best, near = [1.0] * 30 + [0.0] * 10, [1.0] * 29 + [0.0] * 11
    assert chosen(stage("p", 100, best), stage("w", 400, near)).id == "p"


def test_equal_costs_go_to_the_shorter_path() -> None:
    same: list[float | None] = [1.0, 0.0, 1.0, 0.5]
    found = chosen(stage("p -> w", 99, same), stage("p", 100, same))
    assert (found.id, found.best_id) == ("p", "p")


def test_a_token_or_two_is_no_difference_of_cost() -> None:
    best, near = [1.0] * 30 + [0.0] * 10, [1.0] * 29 + [0.0] * 11
    found = chosen(stage("p -> w", 98, best), stage("w", 100, near))
    assert found.id == "w" and "takes fewer steps" in found.why
    assert chosen(stage("p -> w", 98, best), stage("w", 104, near)).id == "p -> w"


def test_of_equal_cost_and_length_the_higher_mean_is_picked() -> None:
    best, near = [1.0] * 30 + [0.0] * 10, [1.0] * 29 + [0.0] * 11
    assert chosen(stage("p", 100, near), stage("w", 101, best)).id == "w"


def test_a_stage_whose_metric_failed_often_cannot_win() -> None:
    lucky: list[float | None] = [1.0] * 5 + [None] * 35
    found = chosen(stage("vanilla", 10, [1.0] * 20 + [0.0] * 20), stage("p", 50, lucky))
    assert found.id == "vanilla"
    assert "Left out" in found.why and "p." in found.why


def test_nothing_to_pick_without_scores() -> None:
    assert pick([]) is None
    assert pick([stage("p", 1, [None, None])]) is None


def test_one_row_settles_only_ties() -> None:
    assert chosen(stage("vanilla", 1, [0.0]), stage("p", 2, [1.0])).id == "p"
    assert chosen(stage("vanilla", 1, [1.0]), stage("p", 2, [1.0])).id == "vanilla"


def test_noise_alone_picks_the_cheapest_most_of_the_time() -> None:
    """Five stages of equal worth: taking the top mean would take the cheapest one time in five."""
    draw, cheapest, trials = random.Random(3), 0, 200
    for _ in range(trials):
        stages = [stage(f"s{index}", index, [float(draw.random() < 0.6) for _ in range(60)]) for index in range(5)]
        cheapest += chosen(*stages).id == "s0"
    assert cheapest / trials > 0.35


def test_facts_give_what_an_example_costs() -> None:
    facts = demo_facts()
    found = {item.id: item for item in from_facts(facts)}
    assert {key: item.tokens for key, item in found.items()} == {
        stage["id"]: stage["tokens_per_example"] for stage in facts["stages"] if stage["status"] == "done"
    }
    assert (found["p.w.p"].depth, found["vanilla"].depth) == (3, 0)
    assert "w.w" not in found, "a skipped stage cannot be picked"


def test_a_stage_of_unknown_cost_is_not_the_cheapest() -> None:
    facts = demo_facts()
    known = chosen(*from_facts(facts))
    assert known.id != known.best_id
    next(stage for stage in facts["stages"] if stage["id"] == known.id)["tokens_per_example"] = None
    assert chosen(*from_facts(facts)).id != known.id


def test_the_example_run_picks_the_cheaper_of_two_near_stages() -> None:
    facts: dict[str, Any] = demo_facts()
    found = chosen(*from_facts(facts))
    assert (found.id, found.best_id) == ("p.w", "p.w.p")
