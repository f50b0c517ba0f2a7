"""Searchers that let an LM write instructions: their rounds, and that the mechanism of each finds more; no Ray."""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bt_ray.errors import ConfigError
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search import gpo, instructions
from bt_ray.search.base import SearchContext, build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.instructions import Scored, Shown
from bt_ray.search.ledger import Ledger
from bt_ray.search.racing import StopRule
from tests.support.planted_instructions import (
    HISTORY_LENGTH,
    Run,
    Scribe,
    by_length,
    context,
    drive,
    last_reader,
    num_planted_found,
    num_reaching_nine,
    shown_in,
)


def test_opro_finds_more_because_the_best_stands_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same instructions in a random order are shown in the control, so the order alone differs."""
    by_score = instructions.by_score

    def shuffled(found: Sequence[Shown]) -> list[Shown]:
        ordered = by_score(found)
        tail = ordered[-HISTORY_LENGTH:]
        random.Random(len(ordered)).shuffle(tail)
        return ordered[:-HISTORY_LENGTH] + tail

    with_order = num_planted_found()
    monkeypatch.setattr(instructions, "by_score", shuffled)
    without = num_planted_found()
    assert with_order >= 30 and with_order - without >= 20  # 37 and 5 of 50


@functools.cache
def num_reached_by_gpo() -> int:
    return num_reaching_nine()


def test_gpo_reaches_more_because_the_edit_budget_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large change late destroys what was found, and small ones from the start do not leave a local best. Of the budgets
    that stay as they are: the first, the last, and the one between."""
    whole, without = num_reaching_nine(trap=6), {}
    for words in (gpo.EDIT_WORDS_START, (gpo.EDIT_WORDS_START + gpo.EDIT_WORDS_END) // 2, gpo.EDIT_WORDS_END):
        monkeypatch.setattr(gpo, "edit_budget", lambda round_index, num_rounds, words=words: words)
        without[words] = num_reaching_nine(trap=6)
    print("gpo", whole, "constant budgets", without)  # 29, and 4, 20 and 0 of 50
    assert whole >= 26 and whole - max(without.values()) >= 6


def test_gpo_reaches_more_because_like_instructions_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control shows the current best and random others."""
    whole = num_reached_by_gpo()

    def any_others(found: Sequence[Shown], current: str, number: int) -> list[Shown]:
        others = [shown for shown in found if shown.text != current]
        drawn = random.Random(f"{current}{len(found)}").sample(others, min(number - 1, len(others)))
        return [shown for shown in found if shown.text == current] + drawn

    monkeypatch.setattr(gpo, "by_relevance", any_others)
    without = num_reaching_nine()
    assert whole >= 26 and whole - without >= 10  # 31 and 15 of 50


# Rounds and prompts


def test_the_history_is_shown_worst_first_and_the_best_of_it_only() -> None:
    scribe = Scribe()
    run = drive(
        build_searcher("opro", context(scribe, num_candidates=12, proposals_per_round=3, history_length=4)),
        lambda predictors: int("".join(filter(str.isdigit, predictors["main"]["instructions"])) or 0) * 7 % 10 / 10,
    )
    assert run.labels() == ["incoming", *(f"instruction {n}" for n in range(1, 13))]
    scores = dict(zip(run.texts(), run.scores.values(), strict=True))
    for number, (prompts, _) in enumerate(scribe.calls):
        known = sorted(list(scores.values())[: 1 + 3 * number])
        for prompt in prompts:
            shown = [score for _, score in shown_in(prompt)]
            assert shown == [pytest.approx(100 * score) for score in known[-4:]]


def test_the_prompt_shows_training_examples_and_fields() -> None:
    scribe = Scribe()
    drive(build_searcher("opro", context(scribe, num_candidates=1)), by_length)
    (prompt,) = scribe.calls[0][0]
    cases = re.findall(r"text: t(\d)\nlabel: gold(\d)", prompt)
    assert len(cases) == instructions.NUM_EXEMPLARS and all(a == b for a, b in cases)
    assert "to get label from text" in prompt


@pytest.mark.parametrize("name", ["opro", "gpo"])
def test_a_round_is_proposed_at_once_and_the_next_waits_for_all_its_scores(name: str) -> None:
    scribe = Scribe()
    searcher = build_searcher(name, context(scribe, num_candidates=7, proposals_per_round=4))
    first = searcher.propose()
    assert first is not None and searcher.propose() is None and not scribe.calls  # nothing to learn from yet
    searcher.observe(candidate_id(first["candidate"]), 0.5, True)
    batch = [searcher.propose() for _ in range(4)]
    assert len(scribe.calls) == 1 and len(scribe.calls[0][0]) == 4 and len(set(scribe.calls[0][0])) == 1
    for number, proposal in enumerate(batch):
        assert proposal is not None and searcher.propose() is None and not searcher.finished()
        searcher.observe(candidate_id(proposal["candidate"]), number / 4, number % 2 == 0)
    rest = [searcher.propose() for _ in range(3)]
    assert all(rest) and searcher.finished() and searcher.propose() is None  # 7 and no more
    assert len(shown_in(scribe.calls[1][0][0])) == 5


@pytest.mark.parametrize("name", ["opro", "gpo"])
def test_a_search_that_is_run_again_proposes_the_same(name: str) -> None:
    def run(seed: int = 3, backwards: bool = False) -> Run:
        lent = context(last_reader, "w1 w2 w3 w4 w5 w6", seed, num_candidates=20, proposals_per_round=4)
        return drive(build_searcher(name, lent), lambda predictors: predictors["main"]["instructions"].count("1") / 9, backwards)

    assert run().rounds == run().rounds
    assert run().rounds == run(backwards=True).rounds  # whoever is scored first
    assert run().rounds != run(seed=4).rounds


def test_the_incoming_prompts_come_first_and_the_student_with_its_demos() -> None:
    lent = context(Scribe(), num_candidates=2)
    lent.student["predictors"]["main"]["demos"] = [{"text": "a", "label": "b"}]
    incoming = {"main": {"instructions": "Other.", "demos": []}, "frozen": {"instructions": "Stays.", "demos": []}}
    lent = SearchContext(**{**vars(lent), "incoming": {"predictors": incoming}})
    run = drive(build_searcher("opro", lent), by_length)
    assert run.labels() == ["incoming", "student", "instruction 1", "instruction 2"]
    candidates = [found["candidate"] for batch in run.rounds for found in batch]
    assert candidates[0] == {"predictors": incoming} and candidates[1] == lent.student
    for candidate in candidates[2:]:
        assert set(candidate["predictors"]) == {"main"}
        assert candidate["predictors"]["main"]["demos"] == [{"text": "a", "label": "b"}]
    # Its score is one of other demos, so the LM is not told of it.
    assert [text for text, _ in shown_in(lent.ask.calls[0][0][0])] == ["Do it."]  # type: ignore[union-attr]


def test_incoming_instructions_with_the_same_demos_are_part_of_the_history() -> None:
    lent = context(Scribe(), num_candidates=1)
    incoming = {"main": {"instructions": "Other, better.", "demos": []}}
    lent = SearchContext(**{**vars(lent), "incoming": {"predictors": incoming}})
    drive(build_searcher("opro", lent), by_length)
    assert {text for text, _ in shown_in(lent.ask.calls[0][0][0])} == {"Do it.", "Other, better."}  # type: ignore[union-attr]


def test_predictors_take_turns_and_the_others_stand_as_in_the_best() -> None:
    start = {"first": "A", "second": "B", "third": "C"}

    def score(predictors: dict[str, Any]) -> float:
        values = [int("".join(filter(str.isdigit, part["instructions"])) or 0) for part in predictors.values()]
        return sum(value % 5 for value in values) / 15

    scribe = Scribe()
    run = drive(build_searcher("opro", context(scribe, start, num_candidates=12, proposals_per_round=4)), score)
    best, best_score, index = dict(start), score({name: {"instructions": text} for name, text in start.items()}), 0
    changed_best = set()
    for batch in run.rounds[1:]:
        base = dict(best)
        for found in batch:
            texts = {name: part["instructions"] for name, part in found["candidate"]["predictors"].items()}
            (changed,) = [name for name in start if texts[name] != base[name]]
            assert changed == list(start)[index % 3]
            assert found["label"] == f"instruction {index + 1} ({changed})"
            index += 1
            value = score(found["candidate"]["predictors"])
            if value > best_score:
                best, best_score = texts, value
                changed_best.add(changed)
    assert index == 12 and len(changed_best) > 1  # else the others never had a best to stand at
    assert len(set(scribe.calls[0][0])) == 3 and scribe.calls[0][0][0] == scribe.calls[0][0][3]


def test_a_program_without_open_predictors_gets_its_first_candidate_only() -> None:
    searcher = build_searcher("opro", context(Scribe(), {}))
    assert drive(searcher, by_length).labels() == ["incoming"]
    assert any("no predictor" in note for note in searcher.notes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["opro", "gpo"])
def test_without_an_lm_the_searcher_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs an LM"):
        build_searcher(name, context(None))


# Answers of no use


def test_empty_repeated_and_odd_answers_are_asked_again_with_another_seed_and_then_given_up() -> None:
    # The second and third slot get nothing in three tries; the fourth gets what the first had, then a new one.
    scribe = Scribe(["Good one.", "", None, "good  ONE.", "...", "Do it.", "Fine.", "", "12 - 3"])
    searcher = build_searcher("opro", context(scribe, num_candidates=4, proposals_per_round=4))
    run = drive(searcher, by_length)
    assert run.labels() == ["incoming", "instruction 1", "instruction 4"]
    assert run.texts() == ["Do it.", "Good one.", "Fine."]
    assert [len(prompts) for prompts, _ in scribe.calls] == [4, 3, 2]
    assert len({seed for _, seed in scribe.calls}) == 3
    assert searcher.notes == [  # type: ignore[attr-defined]
        "2 of 4 instructions were written.",
        "Answers of the LM that were dropped: 3 empty, 2 without a letter, 2 like a known instruction.",
        "2 instructions were given up after 3 answers of no use each.",
    ]


def test_an_lm_that_says_nothing_ends_the_search() -> None:
    searcher = build_searcher("opro", context(lambda prompts, seed=0: [""] * len(prompts), num_candidates=9))
    assert drive(searcher, by_length).labels() == ["incoming"]


# The edit budget


def test_no_proposal_of_gpo_changes_more_of_the_best_than_the_budget() -> None:
    words = [f"{place}v0" for place in range(40)]

    def rewriter(prompts: Sequence[str], seed: int = 0) -> list[str]:
        """Takes no notice of the budget: changes 1 to 30 words, in runs."""
        answers = []
        for number, prompt in enumerate(prompts):
            rng = random.Random(f"{prompt}/{seed}/{number}")
            text = [f"{word}x" if rng.random() < rng.choice((0.05, 0.4, 0.8)) else word for word in words]
            answers.append(" ".join(text[: rng.randint(15, 40)]))
        return answers

    searcher = build_searcher("gpo", context(rewriter, " ".join(words), num_candidates=40, proposals_per_round=4))
    run = drive(searcher, by_length)
    best, best_rank = run.texts()[0], (0.0, 0)
    for number, batch in enumerate(run.rounds):
        texts = [found["candidate"]["predictors"]["main"]["instructions"] for found in batch]
        if number:
            budget = gpo.edit_budget(number - 1, 10)
            assert all(0 < gpo.edit_distance(best.split(), text.split()) <= budget for text in texts)
        for text in texts:
            rank = (round(by_length({"main": {"instructions": text}}), 9), -len(text))
            if rank >= best_rank:
                best, best_rank = text, rank
    assert number == 10
    assert any("cut back" in note for note in searcher.notes)  # type: ignore[attr-defined]
    assert any("over the edit budget" in note for note in searcher.notes)  # type: ignore[attr-defined]


def test_a_proposal_over_the_budget_is_refused_once_and_then_cut_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpo, "EDIT_WORDS_START", 2)
    scribe = Scribe(["A whole new text of more words.", "Now do it carefully. Twice, or thrice, or more."])
    searcher = build_searcher("gpo", context(scribe, "Do it carefully.", num_candidates=1, proposals_per_round=1))
    run = drive(searcher, by_length)
    assert len(scribe.calls) == 2 and "at most 2 words" in scribe.calls[0][0][0]
    assert run.texts()[1:] == ["Now do it carefully."]
    hopeless = build_searcher("gpo", context(Scribe(["Nothing here stays the same."] * 3), "Do it carefully.", num_candidates=1))
    assert drive(hopeless, by_length).labels() == ["incoming"]
    assert "Answers of the LM that were dropped: 3 over the edit budget." in hopeless.notes  # type: ignore[attr-defined]


def test_gpo_shows_the_like_ones_with_the_best_last() -> None:
    scribe = Scribe()
    searcher = build_searcher("gpo", context(scribe, num_candidates=1, history_length=3))
    searcher.propose()
    texts = ["alpha beta", "alpha beta gamma", "delta epsilon", "alpha beta zeta", "eta theta"]
    searcher._scored = [Scored({"main": text}, 0.1 * i, True, i) for i, text in enumerate(texts[:1] + texts[2:] + texts[1:2])]  # type: ignore[attr-defined]
    searcher._waiting.clear()  # type: ignore[attr-defined]
    searcher.propose()
    assert [text for text, _ in shown_in(scribe.calls[0][0][0])] == ["alpha beta", "alpha beta zeta", "alpha beta gamma"]


# With the ledger that decides


def test_the_searcher_works_in_its_thread_with_the_ledger() -> None:
    lent = context(last_reader, "w1 w2 w3 w4", num_candidates=12, proposals_per_round=3)
    book = Conduct(build_searcher("opro", lent), Ledger(["a", "b"], (), StopRule(0.05)))
    give_up = time.monotonic() + 30
    while (entry := book.next()) is not Answer.END:
        if isinstance(entry, Answer):
            assert time.monotonic() < give_up
            continue
        value = by_length(entry.candidate["predictors"])
        scores = [("a", value), ("b", value)]
        book.heard({"candidate_id": entry.candidate_id, "rung": 0, "scores": scores, "seconds": 0.0, "error": None})
    book.close()
    assert len(book.ledger.entries) == 13 and book.ledger.num_duplicates == 0
