"""Are two methods' scores equal within a margin? Two one-sided tests (Schuirmann 1987). Pure; no script of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance
from typing import Any

ALPHA, POWER = 0.05, 0.80


def tost(differences: Sequence[Sequence[float]], margin: float) -> dict[str, Any]:
    """Test |mean difference| < margin at 5 %. `differences[seed][row]`: a minus b, the same rows in each seed.

    Seeds and rows are both samples: of runs that might have been, and of inputs. The squared error is the variance of
    the seeds' means over their number plus that of the rows' means over theirs, which counts what the two share twice
    and so errs on the safe side; t has one degree of freedom less than there are seeds. With one seed the test is on
    its winners alone, over rows. `rows_needed` and `seeds_needed`, together, would show methods that are truly equal
    to be so with 80 % power, each using half of the error that the margin leaves.
    """
    seeds, rows = len(differences), len(differences[0]) if differences else 0
    if rows < 2 or any(len(found) != rows for found in differences):
        raise ValueError("tost: every seed needs the same rows, and two of them at least")
    by_seed = [fmean(found) for found in differences]
    by_row = [fmean(found) for found in zip(*differences, strict=True)]
    of_seeds, of_rows = variance(by_seed) if seeds > 1 else 0.0, variance(by_row)
    mean, error = fmean(by_seed), math.sqrt(of_seeds / seeds + of_rows / rows)
    low, high, p = _tests(mean, error, margin, seeds - 1 if seeds > 1 else rows - 1)
    # Half of the squared error for which both tests reject with 80 % power where the true difference is 0.
    allowed = (margin / (NormalDist().inv_cdf(1 - ALPHA) + NormalDist().inv_cdf((1 + POWER) / 2))) ** 2 / 2
    return {
        "difference": round(mean, 4),
        "low_90": round(low, 4),
        "high_90": round(high, 4),
        "p": round(p, 4),
        "margin": margin,
        "equivalent": p < ALPHA,
        "seeds": seeds,
        "rows": rows,
        "rows_needed": math.ceil(of_rows / allowed),
        "seeds_needed": math.ceil(of_seeds / allowed) if seeds > 1 else None,
    }


def _tests(mean: float, error: float, margin: float, freedom: int) -> tuple[float, float, float]:
    """90 % interval, and the larger p of the two tests."""
    from scipy.stats import t

    if error == 0.0:
        return mean, mean, 0.0 if abs(mean) < margin else 1.0
    half = float(t.ppf(1 - ALPHA, freedom)) * error
    p = float(t.sf((margin - abs(mean)) / error, freedom))
    return mean - half, mean + half, p
