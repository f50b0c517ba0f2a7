"""What a search may still spend of budget.max_lm_calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from bt_ray.config import PromptStep
from bt_ray.errors import BudgetError
from bt_ray.planning import CandidateCost, candidate_cost
from bt_ray.runs.commit import spent_cost
from bt_ray.stages.context import Candidate, Row, StageContext

LOOK_AGAIN = 50  # calls; what stages beside this one spend is seen then


@dataclass(frozen=True)
class Allowance:
    """Says no to a candidate of a step that the budget does not pay for, its evaluation on `select` included.

    `calls_per_run`: as the teacher's rollouts made them. `spent`: LM calls of this search so far, which no record has
    yet; by default none. `done`: search examples of a candidate whose rows are there.
    """

    ctx: StageContext
    step: PromptStep
    calls_per_run: float
    done: Callable[[Candidate], int]
    spent: Callable[[], int] = int

    @classmethod
    def of(cls, ctx: StageContext, step: PromptStep, teacher: Sequence[Row], done: Callable[[Candidate], int]) -> Allowance:
        """Of a search whose demos come from the teacher's rows."""
        return cls(ctx, step, sum(len(row["calls"]) for row in teacher) / max(1, len(teacher)), done)

    def unaffordable(self, candidate: Candidate, owed: int) -> str | None:
        """Why the candidate cannot be scored, with the numbers; None where it can. `owed`: examples that others lack."""
        budget = self.ctx.config.budget.max_lm_calls
        if budget is None:  # the common case, in Tune's loop: nothing is read
            return None
        examples = self._num_examples()
        missing = examples - self.done(candidate)
        if not missing:
            return None
        cost, left = self.cost_of_one(), self.left(budget, owed)
        if left >= cost.search * missing / examples + cost.select:
            return None
        return (
            f"budget.max_lm_calls {budget} has {max(0, left)} calls left, and one more candidate takes about {cost.search} on "
            f"the {examples} search examples and {cost.select} on select"
        )

    def left(self, budget: int, owed: int) -> int:
        """LM calls of the budget that are neither made nor due: `owed` search examples are."""
        return budget - spent_cost(self.ctx.run.root).lm_calls - self.spent() - round(owed * self.calls_per_run)

    def cost_of_one(self) -> CandidateCost:
        """LM calls of one candidate that has no row yet."""
        return candidate_cost(self._num_examples(), len(self.ctx.examples("select")), self.calls_per_run)

    def _num_examples(self) -> int:
        """Search examples that a candidate is scored on."""
        return self.step.num_search(len(self.ctx.examples("search")))


class Purse:
    """What all of a search pays from: its candidates, and the LM calls that look for them.

    Those are the calls of a proposer and of a compile, and runs on training examples. They may go out where the budget
    then still pays for what is being scored and for one more candidate, without which they would be of no use. What was
    paid for before a search went on (rows, journals) is in the allowance's `spent`.

    Looking at what is left reads every row of the search, so a look is remembered: the calls that it allows, LOOK_AGAIN at
    most, are counted down until they are used up or a candidate comes in. A refusal follows from a new look. Safe in threads.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = replace(allowance, spent=lambda: allowance.spent() + self._num_out)
        self._lock = threading.Lock()
        self._num_out = 0  # calls that are allowed and have not ended: no journal and no row has them yet
        self._credit = 0  # calls that the last look allows still
        self._owed: Callable[[], int] = int

    def watch(self, owed: Callable[[], int]) -> None:
        """Take from `owed` how many search examples the candidates that are being scored still lack."""
        self._owed = owed

    def unaffordable(self, candidate: Candidate, owed: int) -> str | None:
        """As of Allowance."""
        with self._lock:
            self._credit = 0
            return self._allowance.unaffordable(candidate, owed)

    @contextmanager
    def paying(self, num_calls: int) -> Iterator[None]:
        """Around `num_calls` LM calls that go out. Raises BudgetError, before the first, where it does not pay for all."""
        budget = self._allowance.ctx.config.budget.max_lm_calls
        if budget is None or not num_calls:
            yield
            return
        with self._lock:
            if self._credit < num_calls:
                self._look(budget, num_calls)
            self._credit -= num_calls
            self._num_out += num_calls
        try:
            yield
        finally:
            with self._lock:
                self._num_out -= num_calls

    def for_runs(self, num_runs: int) -> int:
        """LM calls of so many runs of the program."""
        return math.ceil(num_runs * self._allowance.calls_per_run)

    def _look(self, budget: int, num_calls: int) -> None:
        cost, left = self._allowance.cost_of_one(), self._allowance.left(budget, self._owed())
        needed = num_calls + cost.search + cost.select
        if left < needed:
            raise BudgetError(
                f"budget.max_lm_calls {budget} has {max(0, left)} calls left, and the next {num_calls} of the optimiser with one "
                f"more candidate take about {needed}."
            )
        self._credit = num_calls + min(left - needed, LOOK_AGAIN)
