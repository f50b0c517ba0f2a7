"""The pure parts of the searchers that let an LM write: cleaning, histories, exemplars, relevance, the edit budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.search import gpo, instructions
from bt_ray.search.instructions import Scored, Shown
from tests.support.planted_instructions import Scribe, context

# An LM's answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Sure!\n<instruction>\nRead it.\n</instruction>\nScore: 99", "Read it."),
        ("<instruction></instruction><instruction>Read it.</instruction> <instruction>No.</instruction>", "Read it."),
        ("<instruction>Read it, but this was cut o", "Read it, but this was cut o"),
        ("<think>The best <instruction>old</instruction></think>\n<instruction>Read it.</instruction>", "Read it."),
        ("<think>It never ends <instruction>old</instruction>", ""),
        ('**Instruction:** "Read it."\n\nThis works because ...', "Read it."),
        ("Here is an improved instruction:\n\n1. Read it.", "Read it."),
        ("Instruction: Read it.\nScore: 80", "Read it."),
        ("Of course, here you go:\n\n- “Read it.”\n\nGood luck", "Read it."),
        ("Read it\nline by line.\n\nMore text.", "Read it\nline by line."),
        ('Say "yes" or "no"', 'Say "yes" or "no"'),
        ('"yes" or "no"', '"yes" or "no"'),
        ("'Read the user's text.'", "Read the user's text."),
        ('"Say "yes" or "no"."', 'Say "yes" or "no".'),
        ("```\nRead it.\n```", "Read it."),
        ("<instruction>1. Read it.\n2. Answer.</instruction>", "1. Read it.\n2. Answer."),
        ("  \n ", ""),
    ],
)
def test_an_instruction_is_found_in_a_messy_answer(answer: str, text: str) -> None:
    assert instructions.clean(answer) == text


def test_a_long_instruction_is_cut_at_a_sentence_end() -> None:
    sentence = "Read the whole text with care. "
    text = instructions.clean("<instruction>" + sentence * 200 + "</instruction>")
    assert text.endswith("care.") and 2000 - len(sentence) < len(text) <= 2000
    words = instructions.clean("word " * 900)
    assert words.endswith("word") and 1990 < len(words) <= 2000
    assert len(instructions.clean("x" * 5000)) == 2000


@given(st.text(alphabet="a \n\"'`*-1.:<>/instructionscore", max_size=80))
def test_cleaning_never_fails_and_leaves_no_outer_space(answer: str) -> None:
    text = instructions.clean(answer)
    assert text == text.strip() and len(text) <= instructions.MAX_CHARACTERS


# The history


def test_a_stopped_candidate_never_stands_above_the_best_complete_one() -> None:
    found = [
        Scored({"main": "whole"}, 0.5, True, 0),
        Scored({"main": "lucky start"}, 0.9, False, 1),
        Scored({"main": "bad"}, 0.1, False, 2),
    ]
    assert [(shown.text, shown.score) for shown in instructions.by_score(instructions.history(found, "main"))] == [
        ("bad", 0.1),
        ("lucky start", 0.5),
        ("whole", 0.5),
    ]
    assert instructions.best(found).instructions == {"main": "whole"}


def test_ties_go_to_the_shorter_then_the_later_and_an_instruction_stands_at_its_best() -> None:
    found = [
        Scored({"a": "x", "b": "other"}, 0.3, True, 0),
        Scored({"a": "x", "b": "text"}, 0.5, True, 1),
        Scored({"a": "y", "b": "text"}, 0.5, True, 2),
        Scored({"a": "x", "b": "zzzz"}, 0.2, True, 3),
    ]
    assert instructions.best(found).order == 2
    shown_a = instructions.by_score(instructions.history(found, "a"))
    assert [(shown.text, shown.score) for shown in shown_a] == [("x", 0.5), ("y", 0.5)]
    assert [shown.text for shown in instructions.by_score(instructions.history(found, "b"))] == ["zzzz", "other", "text"]
    longer = Scored({"a": "y", "b": "more text"}, 0.5, True, 4)
    assert instructions.best([*found, longer]).order == 2


def test_the_worst_give_way_when_the_history_is_too_long() -> None:
    found = [Shown(letter * 1500, 0.0, (0.0, True, 0, 0)) for letter in "abcd"]
    assert [shown.text[0] for shown in instructions.fitting(found)] == ["c", "d"]
    assert instructions.fitting(found, 10) == found[-1:]


# Exemplars


def test_exemplars_of_an_unlabelled_predictor_come_from_passing_runs() -> None:
    lent = context(Scribe(), {"first": "A.", "main": "B."})
    lent.labelled.pop("first")
    call = {"predictor": "first", "inputs": {"text": "seen"}, "outputs": {"label": "traced"}}
    row = {"example_id": "e0", "sample": 0, "calls": [call], "score": 1.0, "error": None, "accept": True}
    lent.rollouts.extend([row, {**row, "example_id": "e1", "accept": False}])
    assert instructions.exemplars(lent, "first", random.Random(0)) == [{"text": "seen", "label": "traced"}]
    assert instructions.exemplar_text([{"text": "x" * 999, "label": " a\n b"}]) == (
        f"Cases with the right outputs:\n\ntext: {'x' * 197}...\nlabel: a b"
    )
    assert instructions.exemplar_text([dict.fromkeys("abcdef", "y" * 200)] * 3).count("a: ") == 1  # no room for more
    assert instructions.exemplar_text([]) == ""
    lent.rollouts.clear()
    assert {"text", "label"} == set(instructions.exemplars(lent, "first", random.Random(0))[0])


# The edit budget and relevance


def test_the_edit_budget_falls_along_half_a_cosine() -> None:
    budgets = [gpo.edit_budget(number, 9) for number in range(9)]
    assert budgets == [20, 19, 18, 15, 12, 8, 5, 4, 3]
    assert gpo.edit_budget(0, 1) == gpo.EDIT_WORDS_START == 20 and gpo.EDIT_WORDS_END == 3


@given(st.lists(st.sampled_from("abcde"), max_size=12), st.lists(st.sampled_from("abcde"), max_size=12), st.integers(0, 12))
def test_what_is_cut_back_is_within_the_budget(old: list[str], new: list[str], budget: int) -> None:
    result = gpo.cut_back(" ".join(old), " ".join(new), budget)
    assert gpo.edit_distance(old, result.split()) <= budget
    if budget >= len(old) + len(new):
        assert result.split() == new


def test_edit_distance_counts_words() -> None:
    assert gpo.edit_distance(["do", "it", "now"], ["do", "it", "now"]) == 0
    assert gpo.edit_distance(["do", "it", "now"], ["please", "do", "it", "later"]) == 2
    assert gpo.edit_distance([], ["a", "b"]) == 2


def test_relevant_is_what_shares_rare_words() -> None:
    texts = ["Name the intent of the message.", "Name the colour of the sky.", "Which intent has this message?", "Sort."]
    found = [Shown(text, index / 10, (index / 10, True, 0, index)) for index, text in enumerate(texts)]
    chosen = gpo.by_relevance(found, "Find the intent behind a message.", 2)
    assert {shown.text for shown in chosen} == {texts[0], texts[2]}
    # Every text has the words of the first part, so they say little.
    frequent = ["the task is this, sort", "the task is this, read", "the task is this, add", "read mail"]
    assert max(zip(gpo.similarities(frequent, "the task is this: mail, read"), frequent, strict=True))[1] == frequent[1]
    by_rare = gpo.similarities(frequent, "the task is this, mail")
    assert by_rare[3] > by_rare[0] * 0.6  # by counts alone: 0.35 against 0.8
    equal, *_, other = gpo.similarities(["Same words.", "x", "Quite unlike."], "same WORDS")
    assert equal == pytest.approx(1.0) and other == 0.0
