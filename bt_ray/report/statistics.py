"""Intervals and tests for scores per example. Pure; numpy is loaded inside the functions that need it.

A score list holds one real number per example. Paired functions take two lists in the same order
of examples. Intervals draw nothing, and the one test that draws follows from `seed`, so a report can be
made again, number for number. The formulas of the intervals are in score_interval.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from bt_ray.report.score_interval import Z, difference_bounds, mean_bounds, tango_bounds, wilson_bounds

POWER = 0.80
RESAMPLES = 10_000
_EXACT_FLIPS = 16  # up to 2**16 sign patterns are enumerated; more are drawn
_CHUNK = 200_000  # random numbers held at once: few enough for the processor's cache


@dataclass(frozen=True)
class Interval:
    """A mean score with its 95 % interval. `low` and `high` are None where the data cannot say."""

    score: float
    low: float | None
    high: float | None
    n: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        return {"score": self.score, "low": self.low, "high": self.high, "n": self.n, "method": self.method}


@dataclass(frozen=True)
class Contrast:
    """Mean of a minus mean of b over the same examples, its 95 % interval and two-sided p."""

    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    method: str


def is_binary(scores: Iterable[float]) -> bool:
    """True if every score is 0 or 1."""
    return all(score in (0, 1) for score in scores)


def present(scores: Mapping[str, float | None] | None) -> dict[str, float]:
    """The scores that exist: without None (the metric failed, or the process died) and without NaN or infinity."""
    return {key: float(value) for key, value in (scores or {}).items() if value is not None and math.isfinite(value)}


def paired(a: Mapping[str, float | None] | None, b: Mapping[str, float | None] | None) -> tuple[list[float], list[float]]:
    """Scores of a and b on the examples that both have, in the order of the example ids."""
    left, right = present(a), present(b)
    shared = sorted(left.keys() & right.keys())
    return [left[key] for key in shared], [right[key] for key in shared]


def wilson(successes: int, n: int) -> Interval:
    """95 % score interval of a share (Wilson 1927, JASA 22:209-212).

    Raises ValueError for n < 1 or successes outside 0..n.
    """
    low, high = wilson_bounds(successes, n)
    return Interval(successes / n, low, high, n, "wilson")


def skew_score(scores: Sequence[float]) -> Interval:
    """95 % score interval of the mean of real scores, with their skewness (`score_interval.mean_bounds`).

    Fewer than two scores, or scores that are all the same, say nothing about the spread: `low` and `high`
    are then None. Where every score is in [0, 1] the mean is taken to be there too, and the bounds are cut
    off at 0 and 1. Raises ValueError for no scores.
    """
    if not scores:
        raise ValueError("skew_score: there are no scores.")
    n = len(scores)
    mean = math.fsum(scores) / n
    if n < 2 or _flat(scores):
        return Interval(mean, None, None, n, "skew-score")
    low, high = (float(bound) for bound in mean_bounds(scores))
    if min(scores) >= 0 and max(scores) <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(mean, low, high, n, "skew-score")


def _flat(values: Sequence[float]) -> bool:
    """True if the values differ by no more than rounding does (0.9 - 0.8 and 0.2 - 0.1 are the same)."""
    return max(values) - min(values) <= 1e-12 * max(1.0, *map(abs, values))


def interval(scores: Iterable[float | None]) -> Interval | None:
    """Mean with its 95 % interval: Wilson if every score is 0 or 1, else `skew_score`. None without scores.

    Missing scores (None, NaN) are left out; `n` counts what is left.
    """
    kept = [float(score) for score in scores if score is not None and math.isfinite(score)]
    if not kept:
        return None
    if is_binary(kept):
        return wilson(int(sum(kept)), len(kept))
    return skew_score(kept)


def mcnemar(a_only: int, b_only: int) -> float:
    """Exact two-sided p of McNemar's test: a binomial(a_only + b_only, 1/2) on the changed examples.

    McNemar 1947, Psychometrika 12:153-157; exact form in Fagerland, Lydersen, Laake 2013. 1 if none changed.
    """
    changed = a_only + b_only
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(a_only, b_only) + 1))
    return min(1.0, 2 * tail / 2**changed)


def sign_flip(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p that paired differences have mean 0, by flipping their signs (Fisher 1935, ch. 3).

    Up to 16 non-zero differences: every sign pattern. More: `resamples` draws, p = (hits + 1)/(draws + 1)
    (Phipson and Smyth 2010), so p is never 0.
    """
    import numpy as np

    values = np.asarray([value for value in differences if value != 0], dtype=float)
    n = int(values.size)
    if n == 0:
        return 1.0
    total = float(values.sum())
    # Sums that are equal on paper differ in their last digits.
    bound = abs(total) - 1e-9 * float(np.abs(values).sum())
    if n <= _EXACT_FLIPS:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ values) >= bound))
    generator, hits = np.random.default_rng(seed), 0
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), -(-n // 8))
        # One random bit per sign; flipping a set of values takes twice their sum off the total.
        flipped = np.unpackbits(generator.integers(0, 256, size=size, dtype=np.uint8), axis=1, count=n)
        hits += int(np.sum(np.abs(total - 2 * (flipped.astype(float) @ values)) >= bound))
    return (hits + 1) / (resamples + 1)


def tango_paired(both: int, a_only: int, b_only: int, neither: int) -> tuple[float, float, float]:
    """Difference of two paired shares (a - b) with its 95 % interval: (difference, low, high).

    Tango 1998, Statistics in Medicine 17:891-908 (`score_interval.tango_bounds`). Raises ValueError for an
    empty table.
    """
    n = both + a_only + b_only + neither
    if n < 1:
        raise ValueError("tango_paired: the table is empty.")
    low, high = tango_bounds(a_only, b_only, n)
    return (a_only - b_only) / n, float(low), float(high)


def contrast(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Contrast | None:
    """Mean of a minus mean of b, paired by position. None without examples.

    Scores of 0 and 1: Tango's interval and McNemar's exact p. The interval leaves 0 out if and only if
    (a_only - b_only)² > z² (a_only + b_only). The exact p is the more careful of the two: p ≤ 0.05 implies
    an interval without 0; the other way round p can still be up to 0.08, and 0.125 at 4 changes to 0.
    Real scores: Tango's interval at the effective size (`score_interval.difference_bounds`) and the
    sign-flip p. Fewer than two differences, or all the same, have no interval. Raises ValueError for lists
    of different length.
    """
    if len(a) != len(b):
        raise ValueError(f"contrast: {len(a)} and {len(b)} scores cannot be paired.")
    if not a:
        return None
    if is_binary(a) and is_binary(b):
        pairs = list(zip(a, b, strict=True))
        counts = [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
        difference, low, high = tango_paired(*counts)
        return Contrast(difference, low, high, mcnemar(counts[1], counts[2]), len(a), "tango, mcnemar")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, p, method = math.fsum(differences) / len(a), sign_flip(differences, seed), "effective tango, sign-flip"
    if len(a) < 2 or _flat(differences):
        return Contrast(mean, None, None, p, len(a), method)
    low, high = (float(bound) for bound in difference_bounds(differences))
    if min(*a, *b) >= 0 and max(*a, *b) <= 1:
        low, high = max(-1.0, low), min(1.0, high)
    return Contrast(mean, low, high, p, len(a), method)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the given order (Holm 1979, Scand. J. Statist. 6:65-70)."""
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted


def detectable_difference(n: int, discordant: float) -> float | None:
    """The smallest difference of paired shares that n examples show with 80 % power at two-sided 5 %.

    `discordant` is the share of examples on which the two differ. Solves the sample size of McNemar's
    test (Miettinen 1968; Connor 1987, Biometrics 43:207-211) n = (z_a √d + z_b √(d - δ²))² / δ² for δ.
    If so few examples change that none would do, the share must be larger too: then every change goes
    one way (δ = d), the least that can be seen. None if n is too small even for that.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(f"detectable_difference: n={n}, discordant={discordant} are no sample.")
    z_b = NormalDist().inv_cdf(POWER)

    def needed(difference: float, share: float) -> float:
        return (Z * math.sqrt(share) + z_b * math.sqrt(max(0.0, share - difference**2))) ** 2 / difference**2

    if discordant > 0 and needed(discordant, discordant) <= n:
        return _smallest(lambda difference: needed(difference, discordant) <= n, discordant)
    if needed(1.0, 1.0) > n:
        return None
    return _smallest(lambda difference: needed(difference, difference) <= n, 1.0)


def detectable_mean(n: int, deviation: float) -> float:
    """As `detectable_difference`, for real scores: (z_a + z_b) · deviation / √n.

    `deviation` is the standard deviation of the paired differences (Cohen 1988, ch. 2).
    """
    return (Z + NormalDist().inv_cdf(POWER)) * deviation / math.sqrt(n)


def _smallest(enough: Callable[[float], bool], top: float) -> float:
    """The smallest value in (0, top] that is enough; `enough` holds at `top` and is monotone."""
    low, high = 0.0, top
    for _ in range(60):
        middle = (low + high) / 2
        if middle > 0 and enough(middle):
            high = middle
        else:
            low = middle
    return high


def flip_rate(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> float | None:
    """Share of examples whose score differs between two greedy runs of the same candidate and weights.

    None if the two share no scored example.
    """
    left, right = paired(a, b)
    if not left:
        return None
    return sum(x != y for x, y in zip(left, right, strict=True)) / len(left)
