"""Intervals and tests against published values and against scipy. Coverage is in test_coverage.py."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats

from bt_ray.report import statistics
from bt_ray.report.score_interval import Z, difference_bounds, mean_bounds, t_quantile, tango_bounds
from bt_ray.report.statistics import (
    contrast,
    detectable_difference,
    detectable_mean,
    flip_rate,
    holm,
    interval,
    mcnemar,
    paired,
    sign_flip,
    skew_score,
    tango_paired,
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


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, n)


def test_skew_score_solves_its_equation() -> None:
    """The bounds, put into the inequality that defines them, with skewness and kurtosis taken from scipy."""
    scores = np.random.default_rng(3).beta(0.5, 2.0, size=40)
    found = skew_score(list(scores))
    n, mean, second = scores.size, scores.mean(), scores.var()
    skew, kurtosis = stats.skew(scores), stats.kurtosis(scores, fisher=False)
    t = stats.t.ppf(0.975, n - 1)
    for bound in (found.low, found.high):
        assert bound is not None
        off = bound - mean
        noise = (n * (kurtosis - 1 - skew**2) + 8 * 2) / (n + 8)
        spread = second * n / (n - 1) + skew * math.sqrt(second) * off + (noise - 1) * off**2
        assert off**2 == pytest.approx(t**2 * spread / n)
    # The skewness is what sets it apart: the upper arm is the longer one.
    assert found.low is not None and found.high is not None
    assert found.high - found.score > 1.2 * (found.score - found.low)


def test_skew_score_of_zeros_and_ones_is_nearly_wilson() -> None:
    """Nothing is left of the kurtosis, so only t and the n - 1 in the variance differ."""
    for successes in (2, 100, 298):
        low, high = mean_bounds([1.0] * successes + [0.0] * (300 - successes))
        known = wilson(successes, 300)
        assert known.low is not None and known.high is not None
        width = known.high - known.low
        assert (low, high) == pytest.approx((known.low, known.high), abs=0.01 * width)


def test_intervals_of_real_scores_follow_the_unit_and_the_sign() -> None:
    scores = np.random.default_rng(8).beta(0.4, 3.0, size=30)
    for bounds in (mean_bounds, difference_bounds):
        low, high = (float(bound) for bound in bounds(scores - 0.1))
        assert bounds(100 * scores - 10) == pytest.approx((100 * low, 100 * high))
        assert bounds(0.1 - scores) == pytest.approx((-high, -low))
        many_low, many_high = bounds([scores - 0.1, scores - 0.1])
        assert list(many_low) == pytest.approx([low, low]) and list(many_high) == pytest.approx([high, high])


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5], [0.3, 0.1 + 0.2]])
def test_real_scores_make_no_claim_without_spread(scores: list[float]) -> None:
    found = skew_score(scores)
    assert (found.score, found.low, found.high, found.n) == (pytest.approx(scores[0]), None, None, len(scores))
    moved = contrast(scores, [0.25] * len(scores))
    assert moved is not None and (moved.low, moved.high) == (None, None)


def test_skew_score_stays_where_scores_can_be() -> None:
    found, points = skew_score([0.9, 1.0, 0.2]), skew_score([90.0, 100.0, 20.0])
    assert (found.low, found.high) == (0.0, 1.0)
    assert points.low is not None and points.high is not None and points.low < 0 and points.high > 100
    apart = contrast([1.0, 0.99, 1.0], [0.0, 0.0, 0.01])
    assert apart is not None and apart.low is not None and (apart.low > -1, apart.high) == (True, 1.0)
    with pytest.raises(ValueError, match="no scores"):
        skew_score([])


def test_interval_chooses_by_the_scores_and_leaves_missing_ones_out() -> None:
    binary = interval([1.0, 0.0, None, 1.0, math.nan])
    real = interval([1.0, 0.5, 0.25])
    assert binary is not None and real is not None
    assert (binary.method, binary.n, binary.score) == ("wilson", 3, pytest.approx(2 / 3))
    assert real.method == "skew-score"
    assert real == skew_score([1.0, 0.5, 0.25])
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


def test_tango_gives_published_values() -> None:
    # Airway hyper-responsiveness in Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850-2875, table V.
    assert tango_paired(1, 1, 7, 12) == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)
    # Without a change the equation is n²δ² = z²nδ(1 - δ) for δ > 0, so the bounds are ±z²/(n + z²).
    assert tango_paired(30, 0, 0, 24) == pytest.approx((0, -(Z**2) / (54 + Z**2), Z**2 / (54 + Z**2)))
    # Every pair changes, all one way: (1 - δ)n² = z²n(1 + δ), and nothing is above 1.
    assert tango_paired(0, 30, 0, 0) == pytest.approx((1, (30 - Z**2) / (30 + Z**2), 1))
    with pytest.raises(ValueError, match="empty"):
        tango_paired(0, 0, 0, 0)


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (20, 14, 0, 16), (2, 97, 1, 0), (250, 3, 9, 38), (10, 8, 8, 6)])
def test_tango_bounds_are_where_the_score_test_rejects(table: tuple[int, int, int, int]) -> None:
    """The likelihood under the bound is maximised numerically, and the test statistic there is z."""
    both, a_only, b_only, neither = table
    n = sum(table)
    difference, low, high = tango_paired(*table)
    assert difference == pytest.approx((a_only - b_only) / n)
    for bound in (low, high):

        def loss(q: float, delta: float = bound) -> float:
            cells = ((a_only, q + delta), (b_only, q), (both + neither, 1 - 2 * q - delta))
            return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

        limits = (max(0.0, -bound), (1 - bound) / 2)
        q = optimize.minimize_scalar(loss, bounds=limits, method="bounded", options={"xatol": 1e-12}).x
        spread = math.sqrt((2 * q + bound - bound**2) / n)
        assert abs(difference - bound) / spread == pytest.approx(Z, abs=1e-3)
    _, other_low, other_high = tango_paired(both, b_only, a_only, neither)
    assert (-other_high, -other_low) == pytest.approx((low, high))


def test_interval_and_p_of_changes_agree_up_to_the_care_of_the_exact_test() -> None:
    doubtful = {}
    tables = [(a_only, b_only) for a_only in range(60) for b_only in range(a_only)]
    lows, _ = tango_bounds(*zip(*tables, strict=True), 200)
    for (a_only, b_only), low in zip(tables, lows, strict=True):
        p = mcnemar(a_only, b_only)
        assert (low > 0) == ((a_only - b_only) ** 2 > Z**2 * (a_only + b_only))
        assert low > 0 or p > 0.05
        if low > 0 and p > 0.05:
            doubtful[a_only, b_only] = p
    assert doubtful.pop((4, 0)) == 0.125
    assert max(doubtful.values()) < 0.08


def test_interval_and_p_of_real_differences_agree() -> None:
    generator = np.random.default_rng(6)
    clear = 0
    for _ in range(60):
        differences = generator.uniform(-0.2, 1.0, 40) * (generator.random(40) < 0.25) * generator.choice([0, 1, -1])
        if np.ptp(differences) == 0:
            continue
        low, high = difference_bounds(differences)
        p = sign_flip(list(differences), resamples=2000)
        assert p < 0.12 if low > 0 or high < 0 else p > 0.01
        clear += low > 0 or high < 0
    assert clear > 10


def test_differences_of_shares_have_nearly_tangos_interval() -> None:
    """What real differences get, on differences that are -1, 0 or 1: only t and n - 1 differ."""
    n, up, down = 300, 30, 12
    low, high = difference_bounds([1.0] * up + [-1.0] * down + [0.0] * (n - up - down))
    _, known_low, known_high = tango_paired(150, up, down, n - up - down - 150)
    assert (low, high) == pytest.approx((known_low, known_high), abs=0.01 * (known_high - known_low))
    assert low < known_low and high > known_high
    assert t_quantile(n) == pytest.approx(stats.t.ppf(0.975, n - 1))


def test_contrast_pairs_by_example() -> None:
    a, b = paired({"x": 1.0, "y": 0.0, "z": None, "only": 1.0}, {"z": 1.0, "y": 1.0, "x": 0.0})
    assert (a, b) == ([1.0, 0.0], [0.0, 1.0])
    found = contrast([1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0])
    assert found is not None
    assert (found.difference, found.p, found.n) == (0.75, pytest.approx(2 / 2**6), 8)
    assert (found.low, found.high) == pytest.approx(tango_paired(1, 6, 0, 1)[1:])
    assert contrast([], []) is None
    with pytest.raises(ValueError, match="paired"):
        contrast([1.0], [])


def test_contrast_of_real_scores_is_sharper_for_being_paired() -> None:
    draw = random.Random(2)
    b = [draw.random() for _ in range(40)]
    a = [value + draw.gauss(0.05, 0.02) for value in b]
    found = contrast(a, b)
    assert found is not None and found.low is not None and found.high is not None
    assert found.method == "effective tango, sign-flip"
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
