"""Racing: nested rungs, and a stopping rule that keeps its stated error and saves calls."""

from __future__ import annotations

import random

import pytest

from bt_ray.search.racing import beaten, rung_batches, should_stop


def test_rungs_are_nested_ordered_and_complete() -> None:
    ids = [f"e{i}" for i in range(10)]
    batches = rung_batches(ids, (0.5, 0.25))
    assert [len(batch) for batch in batches] == [3, 2, 5]
    assert [example_id for batch in batches for example_id in batch] == ids


@pytest.mark.parametrize(
    ("num", "shares", "sizes"), [(1, (0.25, 0.5), [1]), (2, (0.25, 0.5), [1, 1]), (10, (0.7,), [7, 3]), (4, (), [4])]
)
def test_rungs_of_small_sets_lose_nothing(num: int, shares: tuple[float, ...], sizes: list[int]) -> None:
    assert [len(batch) for batch in rung_batches([str(i) for i in range(num)], shares)] == sizes


def race(candidate: list[float], incumbent: list[float], error: float) -> int:
    """Examples scored when the candidate races at 1/4 and 1/2 of them."""
    total = len(incumbent)
    for count in (total // 4, total // 2):
        if should_stop(candidate[:count], incumbent, total, error):
            return count
    return total


def shuffled(rng: random.Random, *columns: list[float]) -> list[list[float]]:
    rows = list(zip(*columns, strict=True))
    rng.shuffle(rows)
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("candidate", "incumbent"),
    [
        ([1.0] * 20 + [0.0] * 20, [0.0] * 20 + [1.0] * 20),  # equal, as different as can be: the hardest case
        ([1.0] * 10 + [0.0] * 30, [0.0] * 30 + [1.0] * 10),
        ([1.0] * 22 + [0.0] * 18, [0.0] * 20 + [1.0] * 20),  # better by two
        ([i / 39 for i in range(40)], [(39 - i) / 39 for i in range(40)]),  # real scores
        ([1.0] * 4 + [0.45] * 36, [0.5] * 39 + [0.7]),  # real, skewed: few examples carry the mean
    ],
)
def test_a_candidate_that_is_no_worse_is_stopped_no_more_often_than_stated(
    candidate: list[float], incumbent: list[float]
) -> None:
    assert sum(candidate) >= sum(incumbent) - 1e-9
    error, rounds = 0.1, 1000
    rng = random.Random(7)
    stopped = sum(race(*shuffled(rng, candidate, incumbent), error=error) < 40 for _ in range(rounds))
    assert stopped / rounds <= error


def test_looking_after_every_example_keeps_the_error_too() -> None:
    rng = random.Random(3)
    rounds, error, wrong = 800, 0.1, 0
    for _ in range(rounds):
        (differences,) = shuffled(rng, [1.0] * 15 + [-1.0] * 15)
        wrong += any(beaten(differences[:count], 30, error) for count in range(1, 30))
    assert wrong / rounds <= error


@pytest.mark.parametrize(("high", "low", "most"), [(0.7, 0.2, 0.55), (0.4, 0.0, 0.65)])
def test_hopeless_candidates_cost_less(high: float, low: float, most: float) -> None:
    rng = random.Random(11)
    asked, total, rounds = 0, 40, 200
    for _ in range(rounds):
        incumbent = [float(rng.random() < high) for _ in range(total)]
        asked += race([float(rng.random() < low) for _ in range(total)], incumbent, error=0.05)
    assert asked / (rounds * total) < most


def test_out_of_reach_stops_and_a_reachable_tie_does_not() -> None:
    incumbent = [1.0] * 6 + [0.0] * 4
    assert should_stop([0.0] * 5, incumbent, 10, error=1e-9)  # 5 at most, against 6
    assert not should_stop([0.0] * 4, incumbent, 10, error=1e-9)  # 6 is still possible


def test_scores_beyond_one_are_not_called_out_of_reach() -> None:
    assert not should_stop([0.0] * 5, [3.0] * 6 + [0.0] * 4, 10, error=1e-9)
    assert should_stop([0.0] * 20, [3.0] * 40, 40, error=0.05)


def test_nothing_in_common_stops_nothing() -> None:
    assert not should_stop([], [1.0] * 4, 4, 0.05)
    assert not should_stop([0.0] * 4, [], 8, 0.05)


def test_a_candidate_ahead_is_never_stopped() -> None:
    assert not should_stop([1.0] * 10, [0.0] * 20, 20, 0.5)
    assert not should_stop([0.5] * 10, [0.5] * 20, 20, 0.5)
