"""LM calls of proposers and compiles are held back by the budget as scores are; stub pools and rows, no Ray.

A run makes two calls, a candidate 8 on the search examples and 10 on select: 18 must be left after a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.errors import BudgetError
from bt_ray.lm.journal import JournalPool
from bt_ray.lm.types import LMCall, Sampling
from bt_ray.rollout import evaluator
from bt_ray.search.base import ListSearcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger
from bt_ray.search.racing import StopRule
from bt_ray.stages import allowance
from bt_ray.stages.allowance import Allowance, Purse
from tests.support.budgeted_search import SPLITS, STEPS, Search, run_rows, search_step
from tests.support.compiling import STUDENT
from tests.support.plans import config
from tests.support.stub_pool import BASE, StubPool


@pytest.fixture(autouse=True)
def _rows_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "run_direct", run_rows)


@pytest.mark.parametrize(
    ("optimizer", "left", "asked", "runs"),
    [  # the student is scored first, with 8 calls
        ("opro", 8 + 2 + 18, 2, 0),  # a round of two instructions
        ("opro", 8 + 1 + 18, 0, 0),
        ("gpo", 8 + 2 + 18, 2, 0),
        ("gpo", 8 + 1 + 18, 0, 0),
        ("mipro", 8 + 1 + 4 + 17, 1, 0),  # the summary; one call more and all four instructions would be asked for
        ("mipro", 8 + 1 + 4 + 18, 5, 0),
        ("gepa", 8 + 6 + 18, 0, 3),  # a mini-batch of three runs, and nothing left to reflect on it with
        ("gepa", 8 + 5 + 18, 0, 0),
        ("gepa", 8 + 6 + 1 + 18, 1, 3),
        ("dspy.BootstrapFewShot", 8 + 5 + 18, 5, 0),  # calls of the program, in a compile
        ("dspy.COPRO", 8 + 5 + 18, 5, 0),  # calls of the program's LM and of the proposer's
    ],
)
def test_an_optimiser_asks_as_much_as_leaves_enough_for_a_candidate(
    optimizer: str, left: int, asked: int, runs: int, tmp_path: Path
) -> None:
    found = Search(tmp_path, optimizer, 10 + left).run()
    assert (found.num_asked, len(found.parts.trained.all_rows())) == (asked, runs)
    assert bool(found.proposer.calls) == (optimizer == "dspy.COPRO")
    best = found.book.ledger.best()
    assert best is not None and best.complete, "what was scored stays"
    assert found.parts.num_calls() <= left - 10, "select is paid for"
    assert found.book.over_budget and found.book.over_budget.startswith(f"budget.max_lm_calls {10 + left} has ")


@pytest.mark.parametrize("optimizer", STEPS)
def test_a_search_that_goes_on_counts_what_its_journals_hold_and_asks_for_none_of_it_again(
    optimizer: str, tmp_path: Path
) -> None:
    left = {"gepa": 8 + 6 + 1 + 18, "mipro": 8 + 1 + 4 + 18}.get(optimizer, 8 + 2 + 18)
    first = Search(tmp_path, optimizer, 10 + left).run()
    again = Search(tmp_path, optimizer, 10 + left).run()
    assert first.num_asked and not again.num_asked
    assert again.parts.num_calls() == first.parts.num_calls()
    assert [entry.label for entry in again.book.ledger.entries.values() if not entry.refused] == [
        entry.label for entry in first.book.ledger.entries.values() if not entry.refused
    ]
    more = Search(tmp_path, optimizer, 10 + 1000).run()
    free = Search(tmp_path / "free", optimizer, None).run()
    assert more.book.over_budget is None is free.book.over_budget
    if optimizer.startswith("dspy"):  # here answers follow from the whole call, and not from their number
        assert more.num_asked == free.num_asked - first.num_asked
    assert more.num_asked, "with another budget it goes on"


def test_notes_say_that_the_optimiser_was_cut_short_and_what_it_had_done(tmp_path: Path) -> None:
    found = Search(tmp_path, "opro", 10 + 8 + 1 + 18).run()
    assert not found.num_asked
    assert found.book.notes == [
        "The search ended before its optimiser did: budget.max_lm_calls 37 has 19 calls left, and the next 2 of the optimiser "
        "with one more candidate take about 20."
    ]
    assert found.searcher.notes == ["0 of 0 instructions were written."]  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["propose", "observe"])
def test_a_searcher_that_is_refused_ends_and_what_is_being_scored_goes_on(where: str) -> None:
    class Asks(ListSearcher):
        def propose(self) -> Any:
            if where == "propose" and not self._left:
                raise BudgetError("1 call left.")
            return super().propose()

        def observe(self, candidate_id: str, score: float, complete: bool) -> None:
            if where == "observe":
                raise BudgetError("1 call left.")

        def finished(self) -> bool:
            return False

    book = Conduct(Asks([{"label": "student", "candidate": STUDENT}]), Ledger(["a", "b"], (0.5,), StopRule(0.05)))
    entry = book.next()
    assert not isinstance(entry, Answer) and book.ledger.owed() == 2 and book.ledger.owed(entry) == 0
    while where == "propose" and book.next() is not Answer.END:
        pass
    for rung, name in enumerate("ab"):
        report = {"candidate_id": entry.candidate_id, "rung": rung, "scores": [(name, 1.0)], "seconds": 0.0, "error": None}
        book.heard(report)
    book.close()
    assert book.next() is Answer.END
    best = book.ledger.best()
    assert book.over_budget == "1 call left" and len(book.notes) == 1
    assert best is not None and best.label == "student"


def test_the_search_step_runs_no_candidate_whose_prompt_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lent = Search(tmp_path, "opro", 1000)
    record = search_step(lent, tmp_path, monkeypatch, lambda candidate: None if candidate == STUDENT else "it is long")
    refused = {trial["label"]: trial["refused"] for trial in record.result["trials"]}
    assert refused.pop("incoming") is None and set(refused.values()) == {"it is long"}
    assert any("were not run" in note and "it is long" in note for note in record.result["notes"])


@pytest.mark.parametrize("optimizer", ["opro", "dspy.BootstrapFewShot"])
def test_the_search_step_commits_the_best_so_far_with_a_note(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = Search(tmp_path, optimizer, 10 + 8 + 1 + 18)
    record = search_step(lent, tmp_path, monkeypatch, None)
    asked = 1 if optimizer.startswith("dspy") else 0  # a compile asks call by call, a round of instructions is two
    assert (len(lent.program.calls), record.cost.lm_calls) == (asked, 8 + asked)
    assert record.result["best"] == STUDENT and record.result["label"] == "incoming"
    assert "The search ended before its optimiser did: budget.max_lm_calls 37 has" in record.result["notes"][-1]


def purse(tmp_path: Path, left: int | None, spent: Callable[[], int] = int) -> Purse:
    ctx: Any = SimpleNamespace(
        config=config(budget={"max_lm_calls": left}), examples=SPLITS.get, run=SimpleNamespace(root=tmp_path)
    )
    return Purse(Allowance(ctx, ctx.config.steps["p"], 2.0, lambda _: 0, spent))


def test_calls_in_flight_and_rows_that_are_due_are_kept_back(tmp_path: Path) -> None:
    one = purse(tmp_path, 18 + 10)
    with one.paying(6), one.paying(4):
        with (
            pytest.raises(BudgetError, match=r"max_lm_calls 28 has 18 calls left, and the next 1 of the optimiser"),
            one.paying(1),
        ):
            raise AssertionError("it went out")
        assert one.unaffordable(STUDENT, 0) is None and one.unaffordable(STUDENT, 1)
    one.watch(lambda: 3)
    with pytest.raises(BudgetError), one.paying(5):
        pass
    with one.paying(4):
        pass


def test_a_look_is_remembered_for_some_calls_and_until_a_candidate_comes(tmp_path: Path) -> None:
    looks: list[int] = []
    one = purse(tmp_path, 1000, lambda: looks.append(1) or 0)  # type: ignore[func-returns-value]
    for _ in range(2 * (1 + allowance.LOOK_AGAIN)):
        with one.paying(1):
            pass
    assert len(looks) == 2
    assert one.unaffordable(STUDENT, 0) is None
    with one.paying(1):
        assert len(looks) == 4


def test_without_a_budget_no_call_is_counted(tmp_path: Path) -> None:
    def untouched() -> int:
        raise AssertionError("read for no budget")

    with purse(tmp_path, None, untouched).paying(10**9):
        pass


def test_a_journal_lets_all_calls_of_a_batch_go_out_or_none_and_its_own_answers_always(tmp_path: Path) -> None:
    def call(text: str) -> LMCall:
        return LMCall(BASE, Sampling(), ({"role": "user", "content": text},))

    inner = StubPool(lambda messages: messages[0]["content"].upper())
    journal = JournalPool(inner, tmp_path / "calls.jsonl", purse(tmp_path, 18 + 2, lambda: len(inner.calls)).paying)
    assert [answer.text for answer in asyncio.run(journal.generate_all([call("a"), call("a")]))] == ["A", "A"]
    with pytest.raises(BudgetError):
        asyncio.run(journal.generate_all([call("a"), call("b"), call("c")]))
    assert len(inner.calls) == 1
    assert asyncio.run(journal.generate(call("b"))).text == "B"
    with pytest.raises(BudgetError):
        asyncio.run(journal.generate(call("c")))
    assert [answer.text for answer in asyncio.run(journal.generate_all([call("b"), call("a")]))] == ["B", "A"]
    assert len(inner.calls) == 2
