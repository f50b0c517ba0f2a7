"""When to stop scoring a candidate: pure functions, no Ray.

Candidates are scored on growing, nested pieces of one fixed random order of the examples. After
each piece the candidate is compared with the incumbent, the best candidate that is scored on all
examples, on the examples that both have. Two questions are asked, and either answer stops it:

- Is it worse on *these* examples? The differences are a fixed finite population, and a piece is a
  random sample from it without replacement, so that a sequential test keeps a stated error.
- Is it worth the calls? Few examples prove nothing about two candidates that are nearly alike, and
  then little is lost with either: what more calls could still gain is weighed, and not what they could prove.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, fmean

from bt_ray.config import PromptStep

NUM_BETS = 20  # size of the grid of stakes; the power hardly changes between 10 and 100
ROUNDING = 1e-9  # scores are sums of floats: a difference below this is none
PRIOR_SQUARES = 0.5  # squared deviations that are taken for seen: differences that are all alike so far are no certainty
NORMAL = NormalDist()


@dataclass(frozen=True)
class StopRule:
    """`error`: chance, per comparison, of stopping a candidate that is no worse, by the test. `regret`: the gain over the
    incumbent, in score, below which more calls are not worth it; 0 leaves the test alone to decide."""

    error: float
    regret: float = 0.0

    @classmethod
    def of(cls, step: PromptStep) -> StopRule:
        """The rule that a prompt step's config asks for."""
        return cls(step.racing_error, step.racing_regret)


def rung_batches(example_ids: Sequence[str], shares: Sequence[float]) -> list[list[str]]:
    """Cut ordered ids into consecutive batches that end at the given shares and at the whole.

    Batch r holds the ids that rung r adds; rung r as a whole is batches 0..r, so rungs are
    nested and keep the order. Shares that round to the same count give one batch.

    >>> rung_batches(["a", "b", "c", "d"], (0.25, 0.5))
    [['a'], ['b'], ['c', 'd']]
    """
    total = len(example_ids)
    # Fraction of the printed share: 0.7 * 10 must be 7 examples, not 8.
    ends = sorted({min(total, math.ceil(Fraction(str(share)) * total)) for share in shares} | {total})
    starts = [0, *ends[:-1]]
    return [list(example_ids[start:end]) for start, end in zip(starts, ends, strict=True) if end > start]


def should_stop(candidate_scores: Sequence[float], incumbent_scores: Sequence[float], n_total: int, rule: StopRule) -> bool:
    """Whether the candidate may be stopped after its first len(candidate_scores) examples.

    Both are scores in the one fixed order; the longer one is cut to the common beginning.
    True when either
    - it can no longer reach the incumbent's sum even if every remaining example scores 1, which
      needs an incumbent with all `n_total` scores and scores within [0, 1] (never wrong); or
    - the test by betting (`beaten`) rejects "its mean over all `n_total` examples is at least the
      incumbent's" at level `rule.error`. The test may be looked at after every example, so the error
      holds for all rungs of one comparison together and needs no correction for their number; or
    - what it is still expected to gain (`expected_gain`) is below `rule.regret`.

    Scores outside [0, 1] are scaled by the range of those seen, so that the error is approximate for
    them; the first rule is then left out.
    """
    common = min(len(candidate_scores), len(incumbent_scores))
    if common == 0:
        return False
    seen = [*candidate_scores, *incumbent_scores]
    low, high = min(0.0, *seen), max(1.0, *seen)
    if low == 0.0 and high == 1.0 and len(incumbent_scores) == n_total:
        reachable = sum(candidate_scores) + (n_total - len(candidate_scores))
        if reachable < sum(incumbent_scores) - ROUNDING:
            return True
    span = high - low
    differences = [(c - i) / span for c, i in zip(candidate_scores[:common], incumbent_scores[:common], strict=True)]
    return beaten(differences, n_total, rule.error) or span * expected_gain(differences) < rule.regret


def beaten(differences: Sequence[float], n_total: int, error: float) -> bool:
    """Sequential test of "the mean difference over all `n_total` examples is at least 0".

    `differences` (candidate minus incumbent, each in [-1, 1]) are drawn one after another, without
    replacement, from the `n_total`. True when the hypothesis is rejected; if it holds, that
    happens with probability `error` at most, however often one looks.

    Source: the capital process for sampling without replacement of Waudby-Smith and Ramdas,
    "Estimating means of bounded random variables by betting" (JRSS B 86(1), 2024, section 5),
    one-sided, with the mixture over a grid of constant stakes in place of a tuned one. With
    x = (d + 1) / 2, the mean of what is left under the hypothesis is
    mu_i = (n_total / 2 - sum of earlier x) / (n_total - i), and a stake of share t of the largest
    safe bet, 1 / (1 - mu_i), multiplies the capital by 1 + t * (mu_i - x_i) / (1 - mu_i). Under the
    hypothesis no stake gains in expectation, so by Ville's inequality the capital ever reaches
    1 / error with probability `error` at most. Against a fixed-sample exact (hypergeometric) test
    with Bonferroni over two rungs it saves as many calls on 0/1 scores, and it holds for real scores too.
    """
    stakes = [(k + 0.5) / NUM_BETS for k in range(NUM_BETS)]
    capital = [1.0] * NUM_BETS
    drawn = 0.0
    for index, difference in enumerate(differences):
        value = (difference + 1.0) / 2.0
        rest_mean = (n_total / 2.0 - drawn) / (n_total - index)
        if rest_mean > 1.0 + ROUNDING:
            return True  # no values in [0, 1] could lift the mean to 1/2 any more
        if 0.0 < rest_mean < 1.0 - ROUNDING:
            edge = (rest_mean - value) / (1.0 - rest_mean)
            capital = [c * (1.0 + t * edge) for c, t in zip(capital, stakes, strict=True)]
        if sum(capital) / NUM_BETS >= 1.0 / error:
            return True
        drawn += value
    return False


def expected_gain(differences: Sequence[float]) -> float:
    """What a candidate is expected to gain over the incumbent on unseen examples, if it were known which is better.

    `differences`: candidate minus incumbent by example, each in [-1, 1], at least one. With their mean m, and s the
    standard error of it, the true difference is taken to be normal around m with spread s, and its positive part has
    the mean s * phi(m / s) + m * Phi(m / s). That is the loss, in score, which is expected of stopping here.

    Source: expected improvement, as in Chick, Branke and Schmidt, "Sequential sampling to myopically maximize the
    expected value of information" (INFORMS Journal on Computing 22(1), 2010), with the normal in place of Student's t.
    What it costs over a whole search is measured (`benchmarks/racing.py`), not proved.
    """
    count, mean = len(differences), fmean(differences)
    squares = math.fsum((difference - mean) ** 2 for difference in differences) + PRIOR_SQUARES
    error = math.sqrt(squares) / count
    return error * NORMAL.pdf(mean / error) + mean * NORMAL.cdf(mean / error)
