"""What the searchers that let an LM write instructions share: histories, pieces of a meta-prompt, cleaning. Pure.

A meta-prompt is the text that asks the LM for a new instruction (the term of OPRO, arXiv 2309.03409).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bt_ray.search.base import Row, SearchContext
from bt_ray.search.demos import draw_labelled, labelled_demos, labelled_predictors, passed, trace_demos

MAX_CHARACTERS = 2000  # of an instruction; what is longer is cut at a sentence end
HISTORY_CHARACTERS = 4000  # of all shown instructions: about 1000 tokens, half of a small model's context
NUM_EXEMPLARS = 3
VALUE_CHARACTERS = 200  # of a field in an exemplar
EXEMPLAR_CHARACTERS = 1500  # of all exemplars

Rank = tuple[float, bool, int, int]


@dataclass(frozen=True)
class Scored:
    """A scored candidate: the instructions of all predictors, with the demos of the student."""

    instructions: dict[str, str]  # by predictor
    score: float  # mean; over the first examples only where not complete
    complete: bool
    order: int  # place among the proposals, from 0


@dataclass(frozen=True)
class Shown:
    """An instruction of one predictor, and the score of the best candidate that has it."""

    text: str
    score: float
    rank: Rank


def rank_of(scored: Scored, best_complete: float) -> Rank:
    """Sort key, best last: score, completeness, the shorter prompts, the later proposal.

    A candidate that racing stopped has its score from the first examples only, which may be easy
    ones: it never stands above `best_complete`, the best mean over all examples.
    """
    num_characters = sum(len(text) for text in scored.instructions.values())
    score = scored.score if scored.complete else min(scored.score, best_complete)
    return (round(score, 9), scored.complete, -num_characters, scored.order)


def ranks(candidates: Sequence[Scored]) -> list[Rank]:
    """The rank of every candidate, in their order."""
    best_complete = max((scored.score for scored in candidates if scored.complete), default=float("inf"))
    return [rank_of(scored, best_complete) for scored in candidates]


def best(candidates: Sequence[Scored]) -> Scored:
    """The candidate of the highest rank. Raises ValueError without one."""
    return max(zip(ranks(candidates), candidates, strict=True), key=lambda pair: pair[0])[1]


def history(candidates: Sequence[Scored], predictor: str) -> list[Shown]:
    """Every instruction that the predictor had, once, under its best candidate's rank; unordered.

    So the instruction of the best candidate has the highest rank for every predictor.
    """
    found: dict[str, Shown] = {}
    for rank, scored in zip(ranks(candidates), candidates, strict=True):
        text = scored.instructions[predictor]
        if text not in found or rank > found[text].rank:
            found[text] = Shown(text, rank[0], rank)
    return list(found.values())


def by_score(instructions: Sequence[Shown]) -> list[Shown]:
    """Worst first: an LM attends most to what stands last (OPRO, arXiv 2309.03409)."""
    return sorted(instructions, key=lambda shown: shown.rank)


def fitting(instructions: Sequence[Shown], max_characters: int = HISTORY_CHARACTERS) -> list[Shown]:
    """The last ones that fit into so many characters together, at least one."""
    kept = list(instructions)
    while len(kept) > 1 and sum(len(shown.text) for shown in kept) > max_characters:
        kept.pop(0)
    return kept


# Pieces of a meta-prompt


def task_text(context: SearchContext, predictor: str) -> str:
    """One sentence: what the instruction is for."""
    signature = context.signatures.get(predictor, {"inputs": [], "outputs": []})
    inputs, outputs = ", ".join(signature["inputs"]), ", ".join(signature["outputs"])
    made = f" to get {outputs} from {inputs}" if inputs and outputs else ""
    return f"A language model is given an instruction{made}. Your job is to find the instruction that works best."


def history_text(instructions: Sequence[Shown]) -> str:
    """The instructions in their order, each in tags, with its score in percent."""
    lines = [f"<instruction>{shown.text}</instruction>\nScore: {100 * shown.score:.1f}" for shown in instructions]
    return "Instructions that were tried, the worst first, with scores from 0 to 100:\n\n" + "\n\n".join(lines)


def exemplars(context: SearchContext, predictor: str, rng: random.Random) -> list[Row]:
    """Up to NUM_EXEMPLARS cases of the predictor as {field: value}, from training examples.

    With its labels where the examples label its outputs, else from the program's passing runs;
    where it has neither, the inputs and labels of whole examples.
    """
    if predictor in labelled_predictors(context):
        chosen = draw_labelled(context, context.examples, rng, NUM_EXEMPLARS, [predictor])
        return labelled_demos(context, chosen)[predictor]
    rows = [found[0] for found in passed(context).values()]
    traced = trace_demos(context, rng.sample(rows, min(NUM_EXEMPLARS, len(rows))), rng).get(predictor, [])
    if traced:
        return traced
    chosen = rng.sample(context.examples, min(NUM_EXEMPLARS, len(context.examples)))
    return [{**example["inputs"], **example["labels"]} for example in chosen]


def exemplar_text(rows: Sequence[Row]) -> str:
    """The cases, a field per line, as many as fit into EXEMPLAR_CHARACTERS; "" where none does."""
    cases = ["\n".join(f"{name}: {_short(value)}" for name, value in row.items()) for row in rows]
    while sum(len(case) for case in cases) > EXEMPLAR_CHARACTERS:
        cases.pop()
    return "Cases with the right outputs:\n\n" + "\n\n".join(cases) if cases else ""


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 3] + "..."


# An LM's answer

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S | re.I)
_TAGGED = re.compile(r"<instruction>(.*?)(?:</?instruction>|\Z)", re.S | re.I)
_PREFIX = re.compile(r"\binstruction\b[*_\"'\s]*:[*_]*", re.I)
_SCORE_LINE = re.compile(r"^\W*score\W*:.*", re.S | re.I | re.M)
_MARK = re.compile(r"^(?:[-*•]|\d{1,2}[.)])\s+")
_FENCED = re.compile(r"^```\w*\n(.*)\n```$", re.S)
_QUOTES = ('""', "''", "“”", "‘’", "«»", "``")


def clean(answer: str) -> str:
    """The instruction in an LM's answer, at most MAX_CHARACTERS long; "" where there is none.

    It stands between <instruction> tags (the first pair with something in it), or after
    "Instruction:", or is the first paragraph. Quotes around it and a list mark before it go.
    """
    text = _THOUGHT.sub("", answer)
    tagged = [found.strip() for found in _TAGGED.findall(text)]
    if tagged:
        return cut(_bare(next(filter(None, tagged), "")))
    prefix = _PREFIX.search(text)
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", _SCORE_LINE.sub("", text[prefix.end() if prefix else 0 :]))]
    paragraphs = [part for part in paragraphs if part]
    # "Sure, here it is:" announces the paragraph that is meant.
    if len(paragraphs) > 1 and paragraphs[0].endswith(":"):
        paragraphs.pop(0)
    return cut(_bare(paragraphs[0])) if paragraphs else ""


def _bare(text: str) -> str:
    """Without the fence, quotes, bold marks and list mark around the whole of it."""
    before = None
    while text != before:
        before, text = text, _FENCED.sub(r"\1", text.strip())
        marks = [line for line in text.splitlines() if _MARK.match(line.strip())]
        if len(marks) == 1:  # several are a list that the instruction means
            text = _MARK.sub("", text)
        if text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = text[2:-2]
        if len(text) > 1 and text[0] + text[-1] in _QUOTES and _is_pair(text):
            text = text[1:-1]
    return text


def _is_pair(text: str) -> bool:
    """Whether the first and the last quote of the text belong together: not so in '"yes" or "no"'."""
    inner, marks = text[1:-1].strip("`"), f"[{text[0]}{text[-1]}]"
    first = re.search(rf"(?<!\w){marks}|{marks}(?!\w)", inner)  # an apostrophe stands within a word
    return first is None or inner[: first.start()][-1:].isspace()


def cut(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """At most so many characters: up to the last sentence end within them, else to the last word's."""
    if len(text) <= max_characters:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?。](?=\s)", text[: max_characters + 1])]
    if ends:
        return text[: ends[-1]]
    return (text[: max_characters + 1].rsplit(None, 1) or [""])[0][:max_characters]


def same_text(text: str) -> str:
    """What two instructions share that differ in case and white space only."""
    return " ".join(text.casefold().split())


def is_text(text: str) -> bool:
    """Whether there is a letter of any alphabet in it."""
    return any(character.isalpha() for character in text)
