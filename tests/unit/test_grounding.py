"""What MIPRO's proposer asks the LM, and what it keeps of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bt_ray.errors import PoolError, PromptTooLongError
from bt_ray.search import grounding
from bt_ray.search.grounding import clean_instruction, propose_instructions
from tests.support.planted_mipro import CODE, SUMMARY, StubLM, make_context


def test_prompts_hold_the_summary_the_code_the_signature_examples_and_the_tip() -> None:
    context = make_context(ask=(lm := StubLM()), num_instructions=20)
    instructions, notes = propose_instructions(context)
    assert not notes and all(len(options) == 20 for options in instructions.values())
    assert [options[0] for options in instructions.values()] == ["Do route.", "Do answer."]
    summary_prompt, *prompts = lm.prompts
    assert "text: t" in summary_prompt and "intent: gold" in summary_prompt
    wanted = grounding.requests(context, 19)
    assert len(prompts) == len(wanted) == 38
    for prompt, request in zip(prompts, wanted, strict=True):
        shown = [value for demo in request.demos for value in demo.values()]
        assert len(shown) == 2 * grounding.NUM_TASK_EXAMPLES
        assert all(value in prompt for value in (SUMMARY, CODE, f"`{request.predictor}` receives text", request.tip, *shown))
        assert f"Do {request.predictor}." in prompt
        assert ("area: area" in prompt) == (request.predictor == "route")
    assert {request.tip for request in wanted} == set(grounding.TIPS.values())
    assert len({str(request.demos) for request in wanted}) > 10


def test_prompts_say_the_types_and_descriptions_of_fields() -> None:
    notes = {"route": {"text": "what the customer wrote", "area": "one of card, loan"}}
    propose_instructions(replace(make_context(ask=(lm := StubLM())), field_notes=notes))
    expected = "`route` receives text (what the customer wrote) and answers with area (one of card, loan)."
    assert any(expected in prompt for prompt in lm.prompts)
    assert any("`answer` receives text" in prompt and "answers with intent." in prompt for prompt in lm.prompts)


def test_parts_that_are_not_there_are_left_out() -> None:
    propose_instructions(replace(make_context(passing=0, ask=(lm := StubLM())), program_code=""))
    assert "got right" not in lm.prompts[1] and "The program" not in lm.prompts[1] and SUMMARY in lm.prompts[1]


def test_the_same_search_asks_the_same() -> None:
    first, again, other = StubLM(), StubLM(), StubLM()
    for seed, lm in ((3, first), (3, again), (4, other)):
        propose_instructions(make_context(seed, lm))
    assert (first.prompts, first.seeds) == (again.prompts, again.seeds)
    assert first.prompts != other.prompts and first.seeds != other.seeds


def test_empty_and_repeated_answers_are_asked_for_again_with_another_seed() -> None:
    answers = [
        *("One.", "<instruction>  ONE. </instruction>", "", "'Do answer.'"),  # two for each predictor
        *("Two.", "Three.", "do\nANSWER."),
        *("Four.", "never asked for"),
    ]
    context = make_context(ask=(lm := StubLM(lambda number: answers[number - 2])), num_instructions=3)
    instructions, notes = propose_instructions(context)
    assert instructions == {"route": ["Do route.", "One.", "Two."], "answer": ["Do answer.", "Three.", "Four."]}
    assert len(lm.prompts) == 1 + 4 + 3 + 1 and len(set(lm.seeds)) == 1 + 3
    assert [note[-len("1; 2 of 2 new instructions are left.") :] for note in notes] == [
        "1; 2 of 2 new instructions are left.",
        "3; 2 of 2 new instructions are left.",
    ]


@pytest.mark.parametrize("answer", ["", "Do route.", f"<instruction>{grounding.PLACEHOLDER}</instruction>", "Do answer."])
def test_a_predictor_keeps_its_instruction_where_the_lm_writes_no_other(answer: str) -> None:
    lm = StubLM(lambda number: answer)
    instructions, notes = propose_instructions(make_context(ask=lm, num_instructions=3))
    kept = {name: options for name, options in instructions.items() if len(options) == 1}
    assert kept and all(options == [f"Do {name}."] for name, options in kept.items())
    for name in kept:
        assert any(note.startswith(f"{name}: ") and note.endswith("6; it keeps its original instruction.") for note in notes)
    assert len(set(lm.seeds)) == 1 + 3


def test_without_an_lm_or_a_wish_for_more_nothing_is_asked() -> None:
    instructions, notes = propose_instructions(make_context())
    assert instructions["route"] == ["Do route."] and "no LM" in notes[0]
    propose_instructions(make_context(ask=(lm := StubLM()), num_instructions=1))
    assert not lm.prompts


def test_a_data_summary_that_stays_empty_is_left_out_with_a_note() -> None:
    asked = []

    def silent(prompts: Sequence[str], seed: int = 0) -> list[str]:
        asked.append((seed, prompts[0]))
        return ["  "] if "instruction" not in prompts[0] else [f"Way {i}." for i, _ in enumerate(prompts)]

    _, notes = propose_instructions(make_context(ask=silent))
    assert "no summary" in notes[0] and "# The data\n" not in asked[-1][1]
    assert len({seed for seed, prompt in asked if "instruction" not in prompt}) == 3


def test_prompts_are_shortened_until_they_fit() -> None:
    sizes = []

    def narrow(prompts: Sequence[str], seed: int = 0) -> list[str]:
        sizes.append(max(map(len, prompts)))
        if sizes[-1] > 1500:
            raise PromptTooLongError("too long")
        return [f"Way {i}." for i, _ in enumerate(prompts)]

    instructions, _ = propose_instructions(replace(make_context(ask=narrow), program_code="x = 1\n" * 1000))
    assert len(instructions["route"]) == 6 and max(sizes) < 3500 and sizes[-1] <= 1500 < sizes[-2]


@pytest.mark.parametrize("error", [PoolError("no replica"), PromptTooLongError("too long")])
def test_an_error_of_the_lm_comes_out(error: Exception) -> None:
    def broken(prompts: Sequence[str], seed: int = 0) -> list[str]:
        raise error

    with pytest.raises(type(error), match=str(error)):
        propose_instructions(make_context(ask=broken))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<instruction>Name the intent.</instruction> Good luck!", "Name the intent."),
        ("<Instruction>\n'Name it.'\n\nIn one word.\n</INSTRUCTION>", "'Name it.'\n\nIn one word."),
        ("I write <instruction>Name the intent", "Name the intent"),
        (f"<instruction>{grounding.PLACEHOLDER}</instruction>\n<instruction>Name it.</instruction>", "Name it."),
        ("<instruction> </instruction>\n\nBut this is text.", ""),
        ('**New Instruction:** "Name the intent."\n\nThis is better because it is short.', "Name the intent."),
        ("Better instruction:\n\n“Name the intent.”", "Name the intent."),
        ("Sure, here it is:\n\n`Name the intent.`\n\nBye.", "Name the intent."),
        ("```text\nName the intent.\n```", "Name the intent."),
        ("Name the intent.\nOne word.\n\nSecond paragraph.", "Name the intent.\nOne word."),
        ("\"'Name it'\"", "Name it"),
        (" \n\n ", ""),
        ("...", ""),
        ('""', ""),
        ("Here it is:", "Here it is:"),  # the only paragraph: "Answer this question:" is an instruction too
    ],
)
def test_an_instruction_is_taken_out_of_a_messy_answer(answer: str, expected: str) -> None:
    assert clean_instruction(answer) == expected
