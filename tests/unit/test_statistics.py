"""Intervals and tests against published values, against scipy, and by their coverage."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy import stats

from bt_ray.report import statistics
from bt_ray.report.statistics import (
    bca,
    contrast,
    detectable_difference,
    detectable_mean,
    flip_rate,
    holm,
    interval,
    mcnemar,
    newcombe_paired,
    paired,
    sign_flip,
    wilson,
)


# Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5.1e-5)
    mirrored = wilson(n - successes, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_wilson_covers_95_percent(share: float) -> None:
    """Exact coverage by the binomial distribution. It oscillates with n, so it is averaged over n."""
    coverages = []
    for n in range(50, 301, 10):
        bounds = [wilson(k, n) for k in range(n + 1)]
        weights = stats.binom.pmf(range(n + 1), n, share)
        coverages.append(sum(w for w, b in zip(weights, bounds, strict=True) if b.low <= share <= b.high))
    assert 0.93 <= float(np.mean(coverages)) <= 0.97


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, n)


def test_bca_agrees_with_scipy() -> None:
    scores = np.random.default_rng(3).beta(0.5, 2.0, size=40)
    found = bca(list(scores), seed=1)
    reference = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2))
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.03 * width)
    # The correction is what sets it apart: for skewed scores the upper arm is the longer one.
    assert found.high - found.score > 1.1 * (found.score - found.low)


def test_bca_covers_95_percent() -> None:
    generator, hits, trials = np.random.default_rng(11), 0, 1000
    for trial in range(trials):
        found = bca(list(generator.beta(2.0, 4.0, size=50)), seed=trial, resamples=1000)
        hits += found.low <= 1 / 3 <= found.high
    assert 0.93 <= hits / trials <= 0.97


def test_bca_is_the_same_for_the_same_seed_and_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = list(np.random.default_rng(8).normal(size=30))
    whole = bca(scores, seed=5)
    assert whole == bca(scores, seed=5) != bca(scores, seed=6)
    monkeypatch.setattr(statistics, "_CHUNK", 50)
    assert bca(scores, seed=5) == whole


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5]])
def test_bca_makes_no_claim_without_spread(scores: list[float]) -> None:
    found = bca(scores)
    assert (found.score, found.low, found.high, found.n) == (0.5, None, None, len(scores))


def test_interval_chooses_by_the_scores_and_leaves_missing_ones_out() -> None:
    binary = interval([1.0, 0.0, None, 1.0, math.nan])
    real = interval([1.0, 0.5, 0.25])
    assert binary is not None and real is not None
    assert (binary.method, binary.n, binary.score) == ("wilson", 3, pytest.approx(2 / 3))
    assert real.method == "bca"
    assert interval([None]) is None


def test_mcnemar_gives_worked_values() -> None:
    # Fagerland, Lydersen and Laake 2013: 1 and 7 discordant pairs, exact conditional p = 0.0703.
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(6, 16) == pytest.approx(stats.binomtest(6, 22, 0.5).pvalue)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0


def test_sign_flip_enumerates_small_samples() -> None:
    differences = [0.3, -0.1, 0.25, 0.4, 0.05, 0.0]
    kept = [value for value in differences if value]
    sums = [abs(sum(sign * value for sign, value in zip(signs, kept, strict=True))) for signs in product((1, -1), repeat=5)]
    assert sign_flip(differences) == pytest.approx(np.mean([value >= 0.9 - 1e-9 for value in sums]))
    assert sign_flip([1.0] * 5) == pytest.approx(2 / 2**5)
    assert sign_flip([0.0, 0.0]) == 1.0


def test_sign_flip_draws_for_large_samples() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(0.0, 1.0, size=60)
    reference = stats.permutation_test((noise, np.zeros(60)), lambda x, y: np.mean(x - y), permutation_type="samples", rng=1)
    assert sign_flip(list(noise)) == pytest.approx(reference.pvalue, abs=0.02)
    assert sign_flip(list(noise + 2.0)) == pytest.approx(1 / (statistics.RESAMPLES + 1))


# Newcombe 1998, Statistics in Medicine 17:2635-2650, table III, method 10.
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((35, 14, 0, 1), 0.1461, 0.4175),
        ((18, 14, 0, 18), 0.1441, 0.3963),
        ((2, 97, 1, 0), 0.8721, 0.9854),
        ((1, 97, 1, 1), 0.8736, 0.9850),
        ((0, 29, 1, 0), 0.6666, 0.9882),
        ((2, 98, 0, 0), 0.9178, 0.9945),
        ((0, 30, 0, 0), 0.8395, 1.0),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((30, 0, 0, 24), -0.0358, 0.0358),
    ],
)
def test_newcombe_gives_published_values(table: tuple[int, int, int, int], low: float, high: float) -> None:
    both, a_only, b_only, neither = table
    difference, found_low, found_high = newcombe_paired(*table)
    assert difference == pytest.approx((a_only - b_only) / sum(table))
    assert (found_low, found_high) == pytest.approx((low, high), abs=1e-4)
    _, other_low, other_high = newcombe_paired(both, b_only, a_only, neither)
    assert (-other_high, -other_low) == pytest.approx((found_low, found_high))


@pytest.mark.parametrize("cells", [(0.5, 0.2, 0.1, 0.2), (0.9, 0.05, 0.03, 0.02), (0.05, 0.1, 0.05, 0.8)])
def test_newcombe_covers_95_percent(cells: tuple[float, float, float, float]) -> None:
    tables = np.random.default_rng(4).multinomial(120, cells, size=4000)
    truth, hits = cells[1] - cells[2], 0
    for table in tables:
        _, low, high = newcombe_paired(*(int(count) for count in table))
        hits += low <= truth <= high
    assert 0.93 <= hits / len(tables) <= 0.98


def test_contrast_pairs_by_example() -> None:
    a, b = paired({"x": 1.0, "y": 0.0, "z": None, "only": 1.0}, {"z": 1.0, "y": 1.0, "x": 0.0})
    assert (a, b) == ([1.0, 0.0], [0.0, 1.0])
    found = contrast([1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0])
    assert found is not None
    assert (found.difference, found.p, found.n) == (0.75, pytest.approx(2 / 2**6), 8)
    assert (found.low, found.high) == pytest.approx(newcombe_paired(1, 6, 0, 1)[1:])
    assert contrast([], []) is None
    with pytest.raises(ValueError, match="paired"):
        contrast([1.0], [])


def test_contrast_of_real_scores_is_sharper_for_being_paired() -> None:
    draw = random.Random(2)
    b = [draw.random() for _ in range(40)]
    a = [value + draw.gauss(0.05, 0.02) for value in b]
    found = contrast(a, b)
    assert found is not None and found.low is not None and found.high is not None
    assert found.method == "bca, sign-flip"
    assert 0.03 < found.low < found.difference < found.high < 0.07
    assert found.p < 0.001


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_detectable_difference_has_80_percent_power() -> None:
    n, share = 200, 0.3
    difference = detectable_difference(n, share)
    assert difference is not None
    # The asymptotic test that the formula is for, on draws of the two kinds of changed examples.
    generator = np.random.default_rng(9)
    up, down = (share + difference) / 2, (share - difference) / 2
    counts = generator.multinomial(n, (up, down, 1 - share), size=20_000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(np.maximum(counts[:, 0] + counts[:, 1], 1))
    assert float(np.mean(np.abs(z) > 1.959964)) == pytest.approx(0.80, abs=0.02)


def test_detectable_difference_shrinks_with_more_rows_and_fewer_changes() -> None:
    by_rows = [detectable_difference(n, 0.25) for n in (50, 100, 400)]
    by_share = [detectable_difference(400, share) for share in (0.1, 0.3, 0.9)]
    assert by_rows == sorted(by_rows, reverse=True) and by_share == sorted(by_share)
    assert by_rows[2] is not None and by_rows[0] is not None and by_rows[2] < by_rows[0] / 2
    # With next to no changed rows more must change before anything shows.
    assert detectable_difference(100, 0.0) == detectable_difference(100, 0.01) == pytest.approx(0.0767, abs=5e-4)
    assert detectable_difference(3, 0.5) is None


def test_detectable_mean_gives_the_textbook_value() -> None:
    # Cohen 1988: d = 0.5 needs about 32 pairs at 80 % power (normal approximation 31.4).
    assert detectable_mean(32, 1.0) == pytest.approx(0.495, abs=0.001)


def test_flip_rate_counts_shared_examples() -> None:
    assert flip_rate({"a": 1.0, "b": 0.0, "c": 1.0, "d": None}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}) == pytest.approx(1 / 3)
    assert flip_rate({"a": 1.0}, {"b": 1.0}) is None
