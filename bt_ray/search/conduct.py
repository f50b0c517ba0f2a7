"""Carries proposals and verdicts between a searcher, the ledger and Ray Tune's loop. Needs no Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from typing import Any

from bt_ray.errors import BudgetError, ConfigError
from bt_ray.search.base import Candidate, Proposal, Searcher
from bt_ray.search.ledger import Entry, Ledger, Verdict

MAX_DUPLICATES = 100  # proposals in a row, equal to earlier ones or refused, after which a searcher counts as finished
PROPOSAL_WAIT_S = 0.05  # an instant searcher answers within the same turn of Tune's loop


Refuse = Callable[[Candidate], str | None]  # why a candidate must not be run, or None
# Why the budget does not pay for one more candidate, or None. Given: the candidate, and the examples that those
# which are being scored still lack.
Unaffordable = Callable[[Candidate, int], str | None]


class Answer(Enum):
    """What a searcher says when it proposes nothing."""

    WAIT = "wait"  # no more now
    END = "end"  # no more


class Conduct:
    """Carries proposals and verdicts between one searcher, the ledger and Tune's loop.

    The searcher is called from one thread of its own, one call at a time in the order of the
    events, so Tune's loop never waits for it. Everything else happens in Tune's loop.
    """

    def __init__(
        self, searcher: Searcher, ledger: Ledger, refuse: Refuse | None = None, unaffordable: Unaffordable | None = None
    ) -> None:
        self.ledger = ledger
        self.over_budget: str | None = None  # why the search ended before its searcher did
        self.notes: list[str] = []  # what the ledger does not say
        self._refuse, self._unaffordable = refuse, unaffordable
        self.failure: Exception | None = None
        self._searcher = searcher
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="searcher")
        self._asked: Future[Proposal | Answer] | None = None
        self._told: list[Future[None]] = []
        self._idle = False  # the searcher said "no more now" and has heard nothing since
        self._repeats = 0

    def next(self) -> Entry | Answer:
        """The next candidate, or WAIT, or END. Raises what the searcher raised, but for BudgetError, which ends the search."""
        self._check_told()
        while self._repeats < MAX_DUPLICATES and self.over_budget is None:
            if self._idle:
                return self._stalled()
            self._asked = self._asked or self._thread.submit(self._ask)
            wait([self._asked], timeout=PROPOSAL_WAIT_S)
            if not self._asked.done():
                return Answer.WAIT
            answer, self._asked = self._result(self._asked), None
            if answer is Answer.END:
                return answer
            if isinstance(answer, Answer):
                self._idle = True
                continue
            entry = self.ledger.add(answer)
            if entry is not None:
                entry.refused = self._refuse(entry.candidate) if self._refuse else None
                if entry.refused is None and self._pays(entry):
                    self._repeats = 0
                    return entry
                if self.over_budget:
                    break
            self._repeats += 1
            self._tell(self.ledger.find(answer["candidate"]))
        return Answer.END

    def _pays(self, entry: Entry) -> bool:
        """Whether the budget pays for the candidate; if not it is refused, and the search ends."""
        if self._unaffordable:
            self.over_budget = entry.refused = self._unaffordable(entry.candidate, self.ledger.owed(entry))
        return self.over_budget is None

    def heard(self, report: dict[str, Any]) -> Verdict:
        """Take a rung's report. Raises the evaluator's exception."""
        if self.failure is not None:
            raise self.failure
        if report["error"] is not None:
            raise pickle.loads(report["error"])
        verdict = self.ledger.record(report["candidate_id"], report["rung"], dict(report["scores"]), report["seconds"])
        if verdict is not Verdict.CONTINUE:
            self._tell(self.ledger.entries[report["candidate_id"]])
        return verdict

    def close(self, wait: bool = True) -> None:
        """End the searcher and its thread; `wait` until it has heard all, and raise what it raised then."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)
        if hasattr(self._searcher, "close"):
            self._searcher.close()
        if wait:
            self._check_told()

    def _ask(self) -> Proposal | Answer:
        proposal = self._searcher.propose()
        if proposal is not None:
            return proposal
        return Answer.END if self._searcher.finished() else Answer.WAIT

    def _tell(self, entry: Entry) -> None:
        if not entry.live:
            self._idle = False
            self._told.append(self._thread.submit(self._observe, entry))

    def _observe(self, entry: Entry) -> None:
        observe_examples = getattr(self._searcher, "observe_examples", None)
        if observe_examples is not None:
            observe_examples(entry.candidate_id, dict(entry.scores))
        self._searcher.observe(entry.candidate_id, entry.score, entry.complete)

    def _check_told(self) -> None:
        for future in [future for future in self._told if future.done()]:
            self._told.remove(future)
            self._result(future)

    def _result(self, future: Future[Any]) -> Any:
        """What the searcher's thread came to; END where the budget does not pay for an LM call of the searcher."""
        try:
            return future.result()
        except BudgetError as error:
            self.over_budget = str(error).rstrip(".")
            note = f"The search ended before its optimiser did: {error}"
            self.notes += [] if note in self.notes else [note]
            return Answer.END

    def _stalled(self) -> Answer:
        if self.ledger.num_live:
            return Answer.WAIT
        raise ConfigError(
            f"search: {type(self._searcher).__name__} proposes nothing and is not finished, but no candidate is being scored. "
            "Let `finished` return True, or `propose` a candidate."
        )
