"""Racing: nested rungs, and a stopping rule that keeps its stated error and saves calls."""

from __future__ import annotations

import math
import random

import pytest

from bt_ray.search.racing import StopRule, beaten, expected_gain, rung_batches, should_stop


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
        if should_stop(candidate[:count], incumbent, total, StopRule(error)):
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
    assert should_stop([0.0] * 5, incumbent, 10, StopRule(1e-9))  # 5 at most, against 6
    assert not should_stop([0.0] * 4, incumbent, 10, StopRule(1e-9))  # 6 is still possible


def test_scores_beyond_one_are_not_called_out_of_reach() -> None:
    assert not should_stop([0.0] * 5, [3.0] * 6 + [0.0] * 4, 10, StopRule(1e-9))
    assert should_stop([0.0] * 20, [3.0] * 40, 40, StopRule(0.05))


def test_nothing_in_common_stops_nothing() -> None:
    assert not should_stop([], [1.0] * 4, 4, StopRule(0.05))
    assert not should_stop([0.0] * 4, [], 8, StopRule(0.05))


def test_a_candidate_ahead_is_never_stopped() -> None:
    assert not should_stop([1.0] * 10, [0.0] * 20, 20, StopRule(0.5))
    assert not should_stop([0.5] * 10, [0.5] * 20, 20, StopRule(0.5))


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.5), (-0.2, 0.5), (0.1, 0.3)])
def test_the_expected_gain_is_the_mean_of_the_positive_part(mean: float, spread: float) -> None:
    count, rng = 400, random.Random(5)
    differences = [mean + spread * sign for sign in (-1, 1)] * (count // 2)
    error = spread / count**0.5
    drawn = sum(max(0.0, rng.gauss(mean, error)) for _ in range(200_000)) / 200_000
    assert expected_gain(differences) == pytest.approx(drawn, rel=0.03, abs=2e-4)


def test_a_few_equal_scores_are_no_certainty_and_many_are() -> None:
    assert expected_gain([0.0] * 4) > 0.05
    assert expected_gain([0.0] * 60) < 0.01


def test_more_calls_that_would_gain_too_little_are_not_made() -> None:
    """Behind by 0.1 with a spread of 0.7: no proof, and little to hope for."""
    candidate, incumbent = [1.0] * 8 + [0.0] * 12 + [0.0, 1.0] * 10, [0.0] * 8 + [1.0] * 12 + [0.0, 1.0] * 10
    whole = [*incumbent, *([0.0, 1.0] * 20)]
    assert not should_stop(candidate, whole, len(whole), StopRule(0.05))
    assert should_stop(candidate, whole, len(whole), StopRule(0.05, regret=0.02))
    level = [1.0] * 10 + [0.0] * 10 + [0.0, 1.0] * 10
    assert not should_stop(level, whole, len(whole), StopRule(0.05, regret=0.02)), "as likely to be better as to be worse"


def test_the_regret_is_in_the_units_of_the_score() -> None:
    """In scores ten times as large the same candidate may gain ten times as much."""
    candidate, incumbent = [10.0] * 8 + [0.0] * 12 + [0.0, 10.0] * 10, [0.0] * 8 + [10.0] * 12 + [0.0, 10.0] * 10
    whole = [*incumbent, *([0.0, 10.0] * 20)]
    assert not should_stop(candidate, whole, len(whole), StopRule(0.05, regret=0.02))
    assert should_stop(candidate, whole, len(whole), StopRule(0.05, regret=0.2))


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_the_rule_spares_calls_and_its_winner_is_as_good(spread: float) -> None:
    """Candidates alike and far apart: calls against full evaluation, and what is lost on unseen rows; the test alone
    saves far less. `benchmarks/racing.py` prints the same with its interval."""
    with_regret, test_alone = [mean_race(spread, StopRule(0.05, regret)) for regret in (0.01, 0.0)]
    assert with_regret[0] < test_alone[0] - 0.08
    assert with_regret[0] < 0.7
    assert with_regret[1] < 0.01


def mean_race(spread: float, rule: StopRule) -> tuple[float, float]:
    """(share of the calls, regret on unseen rows) over 40 searches of 16 candidates on 100 rows."""
    found = [simulated_race(random.Random(seed), spread, rule) for seed in range(40)]
    return sum(item[0] for item in found) / len(found), sum(item[1] for item in found) / len(found)


def simulated_race(rng: random.Random, spread: float, rule: StopRule) -> tuple[float, float]:
    rows, unseen, count = 100, 1000, 16
    hard = [rng.gauss(0, 1) for _ in range(rows + unseen)]
    skills = [rng.gauss(-0.5, spread) for _ in range(count)]
    scores = [[float(rng.random() < 1 / (1 + math.exp(each - skill))) for each in hard] for skill in skills]
    asked, best = 0, scores[0]
    for mine in scores:
        ends = (25, 50, 75)
        asked += next((end for end in ends if mine is not best and should_stop(mine[:end], best[:rows], rows, rule)), 0) or rows
        stopped = mine is not best and any(should_stop(mine[:end], best[:rows], rows, rule) for end in ends)
        if not stopped and sum(mine[:rows]) > sum(best[:rows]):
            best = mine
    full = max(scores, key=lambda mine: sum(mine[:rows]))
    return asked / (count * rows), (sum(full[rows:]) - sum(best[rows:])) / unseen
