"""What MIPRO asks the LM: a summary of the data, then instructions for each predictor.

Source: the grounded proposals of Opsahl-Ong et al. (2024, arXiv 2406.11695): who writes an
instruction should know the data, the program, examples that went well, and a tip for the style.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bt_ray.errors import PromptTooLongError
from bt_ray.search.base import SearchContext
from bt_ray.search.demos import Demo, passed, trace_demos
from bt_ray.search.instructions import clean, is_text, same_text

TIPS = MappingProxyType(
    {
        "none": "",
        "creative": "Try an angle that nobody has tried yet.",
        "simple": "Use one or two short, plain sentences.",
        "descriptive": "Be thorough: name what comes in, what must come out, and what to watch for.",
        "high stakes": "Say that much depends on this answer and that a mistake would be costly.",
        "persona": "Begin by telling the model who it is: an expert in exactly this kind of work.",
    }
)
PLACEHOLDER = "your instruction here"  # shown in the prompt; an answer that only repeats it is empty
NUM_RETRIES = 2  # more requests for an answer that was empty or repeated
# Sizes that leave room for the answer in a context of 2048 tokens.
NUM_SUMMARY_EXAMPLES = 8
NUM_TASK_EXAMPLES = 3
FIELD_CHARACTERS = 240  # of one value of an example
CODE_CHARACTERS = 1800
SUMMARY_CHARACTERS = 600
NOTE_CHARACTERS = 200  # of what the signature says of a field
SCALES = (1.0, 0.5, 0.25)  # shares of these sizes, tried in turn where a prompt does not fit

_ECHO = re.compile(rf"<instruction>\s*{PLACEHOLDER}\s*</instruction>", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """One instruction to be written."""

    predictor: str
    tip: str  # a sentence of TIPS, or ""
    demos: tuple[Demo, ...]  # passing examples of the predictor


def propose_instructions(context: SearchContext) -> tuple[dict[str, list[str]], list[str]]:
    """Instructions by predictor, and notes for the report.

    Index 0 is the student's own instruction; up to `step.num_instructions` in all. An answer that is
    empty, or equal to another one up to case and white space, is dropped and asked for again, at
    most NUM_RETRIES times. Raises what `context.ask` raises.
    """
    instructions = {name: [predictor["instructions"]] for name, predictor in context.student["predictors"].items()}
    wanted = context.step.num_instructions - 1
    if context.ask is None:
        return instructions, ["There is no LM to write instructions, so the search is over demos alone."]
    if not wanted:
        return instructions, []
    summary, notes = summarise_data(context)
    dropped: Counter[str] = Counter()
    waiting = requests(context, wanted)
    for attempt in range(1 + NUM_RETRIES):
        answers = _ask(context, _prompts(context, waiting, summary), f"instructions/{attempt}") if waiting else []
        failed = []
        for request, answer in zip(waiting, answers, strict=True):
            text, known = clean_instruction(answer), instructions[request.predictor]
            if text and same_text(text) not in map(same_text, known):
                known.append(text)
            else:
                dropped[request.predictor] += 1
                failed.append(request)
        waiting = failed
    return instructions, notes + _notes(instructions, dropped, wanted)


def requests(context: SearchContext, num_per_predictor: int) -> list[Request]:
    """What is to be written: for each predictor as many, each with a tip and examples of its own draw."""
    pool, found = passed(context), []
    for predictor in context.student["predictors"]:
        for number in range(num_per_predictor):
            rng = random.Random(f"{context.seed}/mipro/request/{predictor}/{number}")
            tip = TIPS[rng.choice(list(TIPS))]
            # All traces in a random order: one that did not call the predictor gives no example.
            rows = [rng.choice(pool[example_id]) for example_id in rng.sample(list(pool), len(pool))]
            demos = trace_demos(context, rows, rng)[predictor][:NUM_TASK_EXAMPLES]
            found.append(Request(predictor, tip, tuple(demos)))
    return found


def summarise_data(context: SearchContext) -> tuple[str, list[str]]:
    """What the LM says about some training examples, and notes; "" when it says nothing."""
    rng = random.Random(f"{context.seed}/mipro/summary")
    examples = rng.sample(context.examples, min(NUM_SUMMARY_EXAMPLES, len(context.examples)))
    for attempt in range(1 + NUM_RETRIES) if examples else ():
        (answer,) = _ask(context, lambda scale: [summary_prompt(examples, scale)], f"summary/{attempt}")
        if answer.strip():
            return _clip(answer.strip(), SUMMARY_CHARACTERS), []
    return "", ["The LM wrote no summary of the data; instructions were proposed without one."]


def summary_prompt(examples: Sequence[dict[str, Any]], scale: float = 1.0) -> str:
    """Asks for a few sentences about the data."""
    shown = [_fields({**example["inputs"], **example["labels"]}, scale) for example in examples]
    return _sections(
        ("Some examples of a data set", "\n\n".join(shown)),
        ("What to do", "Say in two or three sentences what this data is about, what the task seems to be and what is typical."),
    )


def proposal_prompt(context: SearchContext, request: Request, summary: str, scale: float = 1.0) -> str:
    """Asks for one instruction. Parts that are not known are left out; `scale` shortens the long ones."""
    signature, notes = context.signatures[request.predictor], context.field_notes.get(request.predictor, {})
    inputs, outputs = (
        ", ".join(f"{name} ({_clip(notes[name], NOTE_CHARACTERS)})" if name in notes else name for name in signature[side])
        for side in ("inputs", "outputs")
    )
    fields = f"`{request.predictor}` receives {inputs} and answers with {outputs}."
    examples = "\n\n".join(_fields(demo, scale) for demo in request.demos)
    return _sections(
        ("The data", _clip(summary, int(SUMMARY_CHARACTERS * scale))),
        ("The program, whose steps call a language model", _clip(context.program_code, int(CODE_CHARACTERS * scale))),
        ("The step that needs an instruction", fields),
        ("Examples that this step got right", examples),
        ("Its instruction today", context.student["predictors"][request.predictor]["instructions"]),
        (
            "What to do",
            f"Write a better instruction for this step. The language model reads it before every input. {request.tip}".rstrip()
            + f"\nAnswer in this form: <instruction>{PLACEHOLDER}</instruction>",
        ),
    )


def clean_instruction(answer: str) -> str:
    """The instruction within an LM's answer; "" where there is no word in it, or only the placeholder of the prompt."""
    text = clean(_ECHO.sub("", answer))
    return text if is_text(text) and same_text(text) != PLACEHOLDER else ""


def _ask(context: SearchContext, prompts: Callable[[float], list[str]], place: str) -> list[str]:
    """One answer per prompt, with a seed for this place; the prompts are cut where they do not fit."""
    assert context.ask is not None
    seed = random.Random(f"{context.seed}/mipro/{place}").getrandbits(31)
    for scale in SCALES[:-1]:
        try:
            return context.ask(prompts(scale), seed)
        except PromptTooLongError:
            continue
    return context.ask(prompts(SCALES[-1]), seed)


def _prompts(context: SearchContext, waiting: list[Request], summary: str) -> Callable[[float], list[str]]:
    return lambda scale: [proposal_prompt(context, request, summary, scale) for request in waiting]


def _notes(instructions: dict[str, list[str]], dropped: Counter[str], wanted: int) -> list[str]:
    notes = []
    for predictor, num_dropped in dropped.items():
        num_new = len(instructions[predictor]) - 1
        left = f"{num_new} of {wanted} new instructions are left" if num_new else "it keeps its original instruction"
        notes.append(f"{predictor}: answers of the LM dropped because empty or repeated: {num_dropped}; {left}.")
    return notes


def _fields(values: dict[str, Any], scale: float) -> str:
    return "\n".join(f"{name}: {_clip(str(value), int(FIELD_CHARACTERS * scale))}" for name, value in values.items())


def _sections(*parts: tuple[str, str]) -> str:
    return "\n\n".join(f"# {title}\n{text}" for title, text in parts if text.strip())


def _clip(text: str, num_characters: int) -> str:
    return text if len(text) <= num_characters else text[:num_characters].rstrip() + " …"
