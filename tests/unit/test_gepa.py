"""The searcher `gepa`, on a planted problem with a stub LM; no Ray."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bt_ray.errors import PoolError, PromptTooLongError
from bt_ray.search.base import build_searcher
from tests.support.gepa_problem import NUM_SEARCH, Divided, Planted, best_score, direct, propose_all, search


def found_best(problems: Sequence[tuple[Planted, float]]) -> int:
    return sum(score == 1.0 for _, score in problems)


def searches(parts: tuple[str, ...], num_words: int, num_candidates: int, feedback: bool = True) -> list[tuple[Planted, float]]:
    """(problem, best score) of 50 seeds."""
    found = []
    for seed in range(50):
        problem = Planted(parts=parts, num_words=num_words, feedback=feedback)
        _, ledger = search(problem, problem.context(seed, num_candidates=num_candidates))
        found.append((problem, best_score(ledger)))
    return found


@pytest.mark.parametrize(("parts", "num_words", "num_candidates"), [(("solve",), 6, 16), (("solve", "check"), 3, 24)])
def test_the_planted_best_is_found_more_often_than_by_gepa_alone_and_only_with_feedback(
    parts: tuple[str, ...], num_words: int, num_candidates: int
) -> None:
    """Over 50 seeds: 42 against 31 for `gepa.optimize` by itself with as many metric calls (two predictors: 32
    against 18), because rows that were run once are read. Without the metric's words 0."""
    found = searches(parts, num_words, num_candidates)
    alone = 0
    for seed, (problem, _) in enumerate(found):
        alone += direct(Planted(parts=parts, num_words=num_words), seed, problem.calls) == 1.0
    silent = found_best(searches(parts, num_words, num_candidates, feedback=False))
    assert found_best(found) >= alone + 5
    assert found_best(found) >= silent + 25


def divided(num_candidates: int, **options: str) -> list[tuple[Planted, float]]:
    """(problem, best score) of 50 seeds of the problem with a dead end."""
    found = []
    for seed in range(50):
        problem = Divided()
        _, ledger = search(problem, problem.context(seed, num_candidates=num_candidates, options=options))
        found.append((problem, best_score(ledger)))
    return found


def test_the_front_gets_past_a_dead_end_where_the_best_alone_does_not() -> None:
    """Over 50 seeds: 42, against 18 for `gepa.optimize` by itself with as many metric calls, and 4 where only the
    candidate with the highest score is rewritten, with more proposals and no fewer calls."""
    front = divided(24)
    greedy = divided(44, candidate_selection_strategy="current_best")
    alone = sum(direct(Divided(), seed, problem.calls) == 1.0 for seed, (problem, _) in enumerate(front))
    calls, greedy_calls = (sum(problem.calls for problem, _ in found) for found in (front, greedy))
    print("front", found_best(front), calls, "greedy", found_best(greedy), greedy_calls, "alone", alone)
    assert greedy_calls >= calls
    assert found_best(front) >= alone + 10
    assert found_best(front) >= found_best(greedy) + 25


# What is proposed


def test_incoming_and_student_come_first_and_only_instructions_change() -> None:
    problem = Planted()
    context = problem.context()
    other = {"predictors": {"solve": {"instructions": "Other.", "demos": []}}}
    searcher, ledger = search(problem, replace(context, incoming=other))
    entries = list(ledger.entries.values())
    assert [entry.label for entry in entries[:2]] == ["incoming", "student"]
    assert entries[0].candidate == other and entries[1].candidate == context.student
    assert len(entries) > 3
    for entry in entries[1:]:
        assert entry.candidate["predictors"]["solve"]["demos"] == [{"question": "q", "answer": "a"}]
        assert entry.complete and len(entry.scores) == NUM_SEARCH
    assert searcher.racing is False


def test_the_lineage_says_who_came_from_whom() -> None:
    problem = Planted()
    searcher, ledger = search(problem, problem.context())
    lineage = json.loads(json.dumps(searcher.lineage))
    assert lineage[0] == {"candidate_id": next(iter(ledger.entries)), "label": "student", "parents": [], "score": 0.0}
    assert [entry["candidate_id"] for entry in lineage] == list(ledger.entries)
    for place, entry in enumerate(lineage[1:], start=1):
        assert entry["parents"] and set(entry["parents"]) <= {earlier["candidate_id"] for earlier in lineage[:place]}
        assert entry["score"] == pytest.approx(ledger.entries[entry["candidate_id"]].score)


def test_a_search_that_is_run_again_proposes_and_asks_the_same() -> None:
    runs = []
    for _ in range(2):
        problem = Planted(parts=("solve", "check"), num_words=3)
        _, ledger = search(problem, problem.context(5))
        runs.append((list(ledger.entries), problem.asked, list(problem.rows)))
    assert runs[0] == runs[1]
    assert [seed for _, seed in runs[0][1]] == list(range(len(runs[0][1])))
    other = Planted(parts=("solve", "check"), num_words=3)
    assert list(search(other, other.context(6))[1].entries) != runs[0][0]


def test_the_budget_counts_proposals_and_rows_are_run_in_mini_batches() -> None:
    problem = Planted(feedback=False)
    batches: list[int] = []

    def run_rows(candidate: dict[str, Any], example_ids: Sequence[str]) -> list[dict[str, Any]]:
        batches.append(len(example_ids))
        return problem.run_rows(candidate, example_ids)

    context = problem.context(num_candidates=7, options={"reflection_minibatch_size": 4, "use_merge": False})
    search(problem, replace(context, run_rows=run_rows))
    assert len(problem.asked) == 7
    assert batches == [4] * 14  # the parent and the child of each proposal


def test_a_short_training_set_fills_a_mini_batch_without_running_a_row_twice() -> None:
    problem = Planted()
    context = problem.context(num_candidates=2)
    asked: list[list[str]] = []

    def run_rows(candidate: dict[str, Any], example_ids: Sequence[str]) -> list[dict[str, Any]]:
        asked.append(list(example_ids))
        return problem.run_rows(candidate, example_ids)

    search(problem, replace(context, examples=context.examples[:2], run_rows=run_rows))
    assert asked and all(len(set(ids)) == len(ids) <= 2 for ids in asked)


def test_a_program_without_faults_ends_the_search_with_a_note() -> None:
    problem = Planted()
    context = problem.context(num_candidates=3)
    context.student["predictors"]["solve"]["instructions"] = " ".join(problem.words("solve"))
    searcher, ledger = search(problem, context)
    assert len(ledger.entries) == 1 and not problem.asked
    assert any("0 of 3 proposals" in note for note in searcher.notes)


def test_nothing_is_printed_or_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problem = Planted()
    search(problem, problem.context())
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# Failures, and answers that are no instruction


@pytest.mark.parametrize("lent", ["run_rows", "ask"])
@pytest.mark.parametrize("error", [PoolError("no replica answers"), KeyError("text")])
def test_what_rows_or_the_lm_raise_comes_out_as_itself(lent: str, error: Exception) -> None:
    def fail(*args: Any) -> Any:
        raise error

    problem = Planted()
    with pytest.raises(type(error)) as raised:
        propose_all(replace(problem.context(), **{lent: fail}))
    assert raised.value is error
    assert not problem.asked


def test_a_fault_of_gepa_itself_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("selection broke")

    monkeypatch.setattr("gepa.strategies.candidate_selector.ParetoCandidateSelector.select_candidate_idx", fail)
    with pytest.raises(RuntimeError, match="selection broke"):
        propose_all(Planted().context())


def test_an_answer_without_an_instruction_is_asked_for_once_more_and_then_given_up() -> None:
    problem = Planted()
    seeds: list[int] = []

    def ask(prompts: Sequence[str], seed: int = 0) -> list[str]:
        seeds.append(seed)
        return ["```\n```"] if len(seeds) in (1, 3, 4) else problem.ask(prompts, seed)

    context = problem.context(num_candidates=4)
    searcher, _ = search(problem, replace(context, ask=ask))
    assert seeds == [0, 1, 2, 3, 4, 5, 6]  # 4 proposals, and 3 answers without one
    assert "3 reflections had no instruction in them." in searcher.notes


def test_an_instruction_that_was_there_before_is_a_proposal_of_no_use_and_a_note_says_so() -> None:
    problem = Planted()
    context = replace(problem.context(num_candidates=5), ask=lambda prompts, seed=0: ["```\nAnswer.\n```"])
    searcher, ledger = search(problem, context)
    assert len(ledger.entries) == 1
    assert "5 of 5 proposals repeat an instruction that was there before." in searcher.notes
    new = iter(range(99))
    context = replace(problem.context(num_candidates=5), ask=lambda prompts, seed=0: [f"```\nAnswer {next(new)}.\n```"])
    searcher, _ = search(problem, context)
    assert not any("proposals repeat" in note for note in searcher.notes)


def test_prompts_that_do_not_fit_end_in_a_note_and_not_in_an_error() -> None:
    def ask(prompts: Sequence[str], seed: int = 0) -> list[str]:
        raise PromptTooLongError("900 tokens, 512 fit")

    problem = Planted()
    searcher, ledger = search(problem, replace(problem.context(num_candidates=2), ask=ask))
    assert len(ledger.entries) == 1
    assert any("did not fit" in note and "reflection_minibatch_size" in note for note in searcher.notes)


def gepa_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bt_ray-gepa"]


def waits_until(reached: Any) -> None:
    give_up = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_the_thread_ends_with_the_search_and_with_a_dropped_searcher() -> None:
    problem = Planted()
    search(problem, problem.context())
    waits_until(lambda: not gepa_threads())
    searcher = build_searcher("gepa", problem.context())
    assert searcher.propose() is not None
    assert searcher.propose() is None  # it waits for the student's scores
    assert gepa_threads() and all(thread.daemon for thread in gepa_threads())
    del searcher
    waits_until(lambda: not gepa_threads())
    closed = build_searcher("gepa", problem.context())
    closed.propose()
    closed.close()  # type: ignore[attr-defined]
    waits_until(lambda: not gepa_threads())
    assert closed.propose() is None and closed.finished()
