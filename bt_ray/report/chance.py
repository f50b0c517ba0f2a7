"""What a plan cannot know, drawn at random: how many rollouts pass, where racing stops, which prompts win. Pure.

One `Chance` is one imagined run. A plan is the middle of many of them; how far they lie apart says whether it is an
estimate at all.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bt_ray.config import PromptStep
from bt_ray.search.racing import StopRule, rung_batches, should_stop

NUM_RACES = 40  # imagined searches of one shape
MAX_ROWS = 250  # of an imagined search; with more rows the test decides at the same shares of them, only more sharply
UNMEASURED_SHARE = 0.18  # rollouts that pass: 34 and 60 of 256 in a run of the helpdesk task
UNMEASURED_SPREAD = 0.7  # in log: without a probe the share may as well be a half or twice of that
SKILLS = (0.2, 1.0)  # standard deviation of the candidates' skills in logits, of one search: from alike to far apart
KEPT = 0.5  # chance that a search keeps what an earlier step had found best, or what the weights were tuned on

T = TypeVar("T")


@dataclass(frozen=True)
class PassRate:
    """What is known of the share of runs that pass: a probe's counts, or (0, 0)."""

    passed: int = 0
    runs: int = 0

    def draw(self, rng: random.Random, tuned: bool) -> float:
        """A share that this allows. `tuned`: after a fine-tune on passing runs, between that share and all."""
        if self.runs:
            share = rng.betavariate(self.passed + 1, self.runs - self.passed + 1)
        else:
            share = min(1.0, UNMEASURED_SHARE * math.exp(rng.gauss(0.0, UNMEASURED_SPREAD)))
        return rng.uniform(share, 1.0) if tuned else share


@dataclass(frozen=True)
class Race:
    """A search by its shape: what decides how many of its runs racing saves."""

    candidates: int
    rows: int
    rungs: tuple[float, ...]
    rule: StopRule
    parallel: int
    rate: PassRate
    tuned: bool


class Chance:
    """The draws of one imagined run. Equal seeds draw alike."""

    def __init__(self, rate: PassRate, seed: int) -> None:
        self._rate, self._rng = rate, random.Random(f"plan/{seed}")
        self.pass_share = rate.draw(self._rng, tuned=False)
        self.tuned_share = self._rng.uniform(self.pass_share, 1.0)

    def kept(self) -> bool:
        """Whether a step ends with the prompts that it began with, where these have proved themselves."""
        return self._rng.random() < KEPT

    def one_of(self, items: Sequence[T]) -> T:
        return self._rng.choice(items)

    def runs(self, step: PromptStep, candidates: int, rows: int, tuned: bool) -> int:
        """Program runs of a search on `rows` examples with so many different candidates."""
        race = Race(candidates, rows, tuple(step.rungs), StopRule.of(step), step.max_parallel, self._rate, tuned)
        return self._rng.choice(races(race))


@functools.lru_cache(maxsize=256)
def races(race: Race) -> tuple[int, ...]:
    """Program runs of NUM_RACES imagined searches of this shape."""
    rng = random.Random(repr(race))
    return tuple(_race(race, rng) for _ in range(NUM_RACES))


def _race(race: Race, rng: random.Random) -> int:
    """Candidates differ in skill, examples in difficulty: a run passes with probability sigmoid(skill - difficulty).

    The rungs and the test are the search's own; `parallel` candidates are scored side by side at one pace.
    """
    rows = min(race.rows, MAX_ROWS)
    ends, done = [], 0
    for batch in rung_batches([str(index) for index in range(rows)], race.rungs):
        done += len(batch)
        ends.append(done)
    # What a candidate may gain shrinks with the root of the rows.
    rule = replace(race.rule, regret=race.rule.regret * math.sqrt(race.rows / rows))
    share = min(0.98, max(0.02, race.rate.draw(rng, race.tuned)))
    middle, spread = math.log(share / (1 - share)), rng.uniform(*SKILLS)
    hard = [rng.gauss(0.0, 1.0) for _ in range(rows)]
    scores: list[list[float]] = []
    asked, waiting = 0, list(range(race.candidates))
    best: list[float] = []
    running = [(ends[0], number, 0) for number in waiting[: race.parallel]]  # end of the rung, candidate, rung
    del waiting[: race.parallel]
    for _ in range(race.candidates):
        skill = middle + rng.gauss(0.0, spread)
        scores.append([float(rng.random() < 1 / (1 + math.exp(difficulty - skill))) for difficulty in hard])
    while running:
        now, number, rung = heapq.heappop(running)
        seen = scores[number][: ends[rung]]
        whole = ends[rung] == rows
        if whole and (not best or sum(seen) > sum(best)):
            best = seen
        if whole or (best and should_stop(seen, best, rows, rule)):
            asked += ends[rung]
            if waiting:
                heapq.heappush(running, (now + ends[0], waiting.pop(0), 0))
        else:
            heapq.heappush(running, (now + ends[rung + 1] - ends[rung], number, rung + 1))
    return round(asked * race.rows / rows)
