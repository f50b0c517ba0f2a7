"""`gpo`: OPRO with a relevant history and an edit budget that shrinks.

Source: GPO (Tang et al., 2024, arXiv 2402.17564), which reads prompt search as gradient descent:
the past prompts that are most like the current one take the part of momentum, and the number of
words that may change takes the part of a learning rate, with a cosine schedule. The paper finds
similar prompts with an embedding model; here it is the TF-IDF cosine of their words.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Sequence

from bt_ray.search import instructions
from bt_ray.search.base import SearchContext
from bt_ray.search.instructions import Shown
from bt_ray.search.opro import Fault, Opro, Slot

EDIT_WORDS_START = 20  # words that may change in the first round
EDIT_WORDS_END = 3  # and in the last


def build(context: SearchContext) -> Gpo:
    """The searcher. Raises ConfigError where no LM is lent."""
    return Gpo(context)


class Gpo(Opro):
    """As `opro`, but the LM sees the instructions that are most like the current best one and may
    change `edit_budget` words of it. An answer that changes more is refused once, then cut back."""

    name = "gpo"

    def __init__(self, context: SearchContext) -> None:
        super().__init__(context)
        self._num_cut = 0

    @property
    def notes(self) -> list[str]:
        notes = super().notes
        if self._num_cut:
            notes.append(f"{self._num_cut} answers were cut back to the edit budget.")
        return notes

    def select(self, found: list[Shown], slot: Slot) -> list[Shown]:
        return instructions.by_score(by_relevance(found, slot.current, self.context.step.history_length))

    def request(self, slot: Slot) -> str:
        return (
            "Improve the last of these instructions so that it gets a higher score. "
            f"Change at most {self._budget(slot)} words of it, and make it differ from all of them."
        )

    def fit(self, text: str, slot: Slot, last_chance: bool) -> str | Fault:
        budget = self._budget(slot)
        if edit_distance(slot.current.split(), text.split()) <= budget:
            return text
        slot.num_too_far += 1
        if slot.num_too_far == 1 and not last_chance:
            return Fault.TOO_FAR
        shorter = cut_back(slot.current, text, budget)
        if shorter == slot.current:
            return Fault.TOO_FAR
        self._num_cut += 1
        return shorter

    def _budget(self, slot: Slot) -> int:
        step = self.context.step
        return edit_budget(slot.round, math.ceil(step.num_candidates / step.proposals_per_round))


def edit_budget(round_index: int, num_rounds: int) -> int:
    """Words that may change in a round (from 0): from EDIT_WORDS_START to EDIT_WORDS_END along half a
    cosine, end + (start - end) (1 + cos(pi round / (rounds - 1))) / 2 (SGDR, arXiv 1608.03983)."""
    share = round_index / (num_rounds - 1) if num_rounds > 1 else 0.0
    return round(EDIT_WORDS_END + (EDIT_WORDS_START - EDIT_WORDS_END) * (1 + math.cos(math.pi * share)) / 2)


def by_relevance(found: Sequence[Shown], current: str, number: int) -> list[Shown]:
    """The `number` instructions most like `current`, most similar first; the better one in a tie."""
    scores = similarities([shown.text for shown in found], current)
    pairs = sorted(zip(scores, found, strict=True), key=lambda pair: (round(pair[0], 9), pair[1].rank), reverse=True)
    return [shown for _, shown in pairs[:number]]


def similarities(texts: Sequence[str], query: str) -> list[float]:
    """TF-IDF cosine of each text with the query, 0 to 1, over lower-case words.

    tf is the count of a word, idf is 1 + ln((1 + n) / (1 + df)) over the n texts.
    """
    counts = [Counter(re.findall(r"\w+", text.casefold())) for text in (*texts, query)]
    document_frequency = Counter(word for count in counts[:-1] for word in count)
    idf = {word: 1 + math.log((1 + len(texts)) / (1 + document_frequency[word])) for word in {*document_frequency, *counts[-1]}}
    vectors = [{word: tf * idf[word] for word, tf in count.items()} for count in counts]
    norms = [math.sqrt(math.fsum(value * value for value in vector.values())) for vector in vectors]
    target, target_norm = vectors.pop(), norms.pop()
    dots = [math.fsum(value * target[word] for word, value in vector.items() if word in target) for vector in vectors]
    return [dot / (norm * target_norm) if dot else 0.0 for dot, norm in zip(dots, norms, strict=True)]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two word lists: fewest insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def cut_back(current: str, proposed: str, budget: int) -> str:
    """`current` with those changes of `proposed`, from the left, that fit into `budget` words.

    A change is a run of words: half of one would be no sentence. So the result may be `current`
    itself, and its edit distance from it is at most `budget`.
    """
    old, new = re.findall(r"\S+\s*", current.strip()), re.findall(r"\S+\s*", proposed.strip())
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    pieces, left = [], budget
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        cost = 0 if kind == "equal" else max(i2 - i1, j2 - j1)
        taken = kind != "equal" and cost <= left
        pieces += new[j1:j2] if taken else old[i1:i2]
        left -= cost if taken else 0
    return "".join(piece if piece[-1].isspace() else piece + " " for piece in pieces).strip()
