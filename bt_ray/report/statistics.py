"""Intervals and tests for scores per example. Pure; numpy is loaded inside the functions that draw.

A score list holds one real number per example. Paired functions take two lists in the same order
of examples. Everything random follows from `seed`, so a report can be made again, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
POWER = 0.80
RESAMPLES = 10_000
_DRAWS = 8_000_000  # per bootstrap: long lists get fewer resamples, but never under 2000
_EXACT_FLIPS = 16  # up to 2**16 sign patterns are enumerated; more are drawn
_CHUNK = 200_000  # random numbers held at once: few enough for the processor's cache
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


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
    """The scores that exist: without None (the metric failed) and without NaN or infinity."""
    return {key: float(value) for key, value in (scores or {}).items() if value is not None and math.isfinite(value)}


def paired(a: Mapping[str, float | None] | None, b: Mapping[str, float | None] | None) -> tuple[list[float], list[float]]:
    """Scores of a and b on the examples that both have, in the order of the example ids."""
    left, right = present(a), present(b)
    shared = sorted(left.keys() & right.keys())
    return [left[key] for key in shared], [right[key] for key in shared]


def wilson(successes: int, n: int) -> Interval:
    """95 % score interval of a share (Wilson 1927, JASA 22:209-212).

    centre = (p + z²/2n) / (1 + z²/n); half width = z/(1 + z²/n) · sqrt(p(1-p)/n + z²/4n²).
    Raises ValueError for n < 1 or successes outside 0..n.
    """
    low, high = _wilson_bounds(successes, n)
    return Interval(successes / n, low, high, n, "wilson")


def _wilson_bounds(successes: int, n: int) -> tuple[float, float]:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n} is no share; n must be 1 or more.")
    p, shrink = successes / n, 1 + _Z * _Z / n
    centre = (p + _Z * _Z / (2 * n)) / shrink
    half = _Z / shrink * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # At the ends the formula gives 0 and 1 exactly; floating point does not.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bca(scores: Sequence[float], seed: int = 0, resamples: int | None = None) -> Interval:
    """95 % bias-corrected and accelerated bootstrap interval of the mean (Efron 1987, JASA 82:171-185).

    z0 from the share of resampled means below the mean (ties count half), the acceleration from the
    jackknife. Fewer than two scores, or scores that are all the same, say nothing about the spread:
    `low` and `high` are then None. `resamples` is 10 000 by default, fewer for more than 800 scores
    (2000 at least). Raises ValueError for no scores.
    """
    import numpy as np

    values = np.asarray(scores, dtype=float)
    n = int(values.size)
    if n == 0:
        raise ValueError("bca: there are no scores to resample.")
    mean = float(values.mean())
    if n < 2 or np.ptp(values) == 0:
        return Interval(mean, None, None, n, "bca")
    resamples = resamples or max(2000, min(RESAMPLES, _DRAWS // n))
    means = _resampled_means(values, resamples, np.random.default_rng(seed))
    normal = NormalDist()
    # Rounding splits equal means into neighbours, so equality is taken with a tolerance.
    tie = np.isclose(means, mean, rtol=1e-12, atol=1e-12)
    below = float(np.mean(np.where(tie, 0.5, means < mean)))
    z0 = normal.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    left_out = (values.sum() - values) / (n - 1)
    deviation = left_out.mean() - left_out
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    shares = []
    for z in (-_Z, _Z):
        shares.append(normal.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z))))
    low, high = np.quantile(means, shares)
    return Interval(mean, float(low), float(high), n, "bca")


def _resampled_means(values: Any, resamples: int, generator: Any) -> Any:
    """Means of `resamples` draws with replacement, in chunks of bounded memory."""
    import numpy as np

    n = values.size
    rows = max(1, _CHUNK // n)
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        parts.append(values[generator.integers(0, n, size=(count, n), dtype=np.int32)].mean(axis=1))
    return np.concatenate(parts)


def interval(scores: Iterable[float | None], seed: int = 0) -> Interval | None:
    """Mean with its 95 % interval: Wilson if every score is 0 or 1, else BCa. None without scores.

    Missing scores (None, NaN) are left out; `n` counts what is left.
    """
    kept = [float(score) for score in scores if score is not None and math.isfinite(score)]
    if not kept:
        return None
    if is_binary(kept):
        return wilson(int(sum(kept)), len(kept))
    return bca(kept, seed)


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


def newcombe_paired(both: int, a_only: int, b_only: int, neither: int) -> tuple[float, float, float]:
    """Difference of two paired shares (a - b) with its 95 % interval: (difference, low, high).

    Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10: the two Wilson intervals are squared
    and added, with the correlation φ of the pair, continuity-corrected when it is positive.
    Raises ValueError for an empty table.
    """
    n = both + a_only + b_only + neither
    p_1, p_2 = (both + a_only) / max(n, 1), (both + b_only) / max(n, 1)
    (low_1, high_1), (low_2, high_2) = _wilson_bounds(both + a_only, n), _wilson_bounds(both + b_only, n)
    difference = (a_only - b_only) / n
    product = float(both * neither - a_only * b_only)
    if product > 0:
        product = max(product - n / 2, 0.0)
    margins = (both + a_only) * (b_only + neither) * (both + b_only) * (a_only + neither)
    phi = product / math.sqrt(margins) if margins else 0.0
    below_1, above_1, below_2, above_2 = p_1 - low_1, high_1 - p_1, p_2 - low_2, high_2 - p_2
    down = math.sqrt(max(0.0, below_1**2 - 2 * phi * below_1 * above_2 + above_2**2))
    up = math.sqrt(max(0.0, above_1**2 - 2 * phi * above_1 * below_2 + below_2**2))
    return difference, max(-1.0, difference - down), min(1.0, difference + up)


def contrast(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Contrast | None:
    """Mean of a minus mean of b, paired by position. None without examples.

    Scores of 0 and 1: Newcombe's interval and McNemar's exact p. Real scores: BCa interval of the
    differences and the sign-flip p. Raises ValueError for lists of different length.
    """
    if len(a) != len(b):
        raise ValueError(f"contrast: {len(a)} and {len(b)} scores cannot be paired.")
    if not a:
        return None
    if is_binary(a) and is_binary(b):
        pairs = list(zip(a, b, strict=True))
        counts = [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
        difference, low, high = newcombe_paired(*counts)
        return Contrast(difference, low, high, mcnemar(counts[1], counts[2]), len(a), "newcombe, mcnemar")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    found = bca(differences, seed)
    p = sign_flip(differences, seed)
    return Contrast(found.score, found.low, found.high, p, len(a), "bca, sign-flip")


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
        return (_Z * math.sqrt(share) + z_b * math.sqrt(max(0.0, share - difference**2))) ** 2 / difference**2

    if discordant > 0 and needed(discordant, discordant) <= n:
        return _smallest(lambda difference: needed(difference, discordant) <= n, discordant)
    if needed(1.0, 1.0) > n:
        return None
    return _smallest(lambda difference: needed(difference, difference) <= n, 1.0)


def detectable_mean(n: int, deviation: float) -> float:
    """As `detectable_difference`, for real scores: (z_a + z_b) · deviation / √n.

    `deviation` is the standard deviation of the paired differences (Cohen 1988, ch. 2).
    """
    return (_Z + NormalDist().inv_cdf(POWER)) * deviation / math.sqrt(n)


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
