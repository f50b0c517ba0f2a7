"""What a search may still spend of budget.max_lm_calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bt_ray.planning import candidate_cost
from bt_ray.runs.commit import spent_cost
from bt_ray.stages.context import Candidate, Row, StageContext


@dataclass(frozen=True)
class Allowance:
    """Says no to a candidate that the budget does not pay for, its evaluation on `select` included.

    `calls_per_run`: as the teacher's rollouts made them. `spent`: LM calls of this search so far, which no record has
    yet; by default none. `done`: search examples of a candidate whose rows are there.
    """

    ctx: StageContext
    calls_per_run: float
    done: Callable[[Candidate], int]
    spent: Callable[[], int] = int

    @classmethod
    def of(cls, ctx: StageContext, teacher: Sequence[Row], done: Callable[[Candidate], int]) -> Allowance:
        """Of a search whose demos come from the teacher's rows."""
        return cls(ctx, sum(len(row["calls"]) for row in teacher) / max(1, len(teacher)), done)

    def unaffordable(self, candidate: Candidate, owed: int) -> str | None:
        """Why the candidate cannot be scored, with the numbers; None where it can. `owed`: examples that others lack."""
        budget = self.ctx.config.budget.max_lm_calls
        if budget is None:  # the common case, in Tune's loop: nothing is read
            return None
        examples = len(self.ctx.examples("search"))
        missing = examples - self.done(candidate)
        if not missing:
            return None
        cost = candidate_cost(examples, len(self.ctx.examples("select")), self.calls_per_run)
        left = budget - spent_cost(self.ctx.run.root).lm_calls - self.spent() - round(owed * self.calls_per_run)
        if left >= cost.search * missing / examples + cost.select:
            return None
        return (
            f"budget.max_lm_calls {budget} has {max(0, left)} calls left, and one more candidate takes about {cost.search} on "
            f"the {examples} search examples and {cost.select} on select"
        )
