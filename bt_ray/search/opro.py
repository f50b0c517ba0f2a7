"""`opro`: an LM writes instructions from a history of instructions and their scores.

Source: OPRO (Yang et al., 2023, arXiv 2309.03409). The history is shown worst first, with a few
training examples; several instructions are written from one history and scored side by side, and
the next round sees their scores. A program of several predictors is searched by coordinate
ascent: a proposal changes one predictor, in turn, and the others stand as in the best candidate.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from bt_ray.errors import ConfigError
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search import instructions
from bt_ray.search.base import AskLM, Candidate, Proposal, SearchContext
from bt_ray.search.instructions import Scored, Shown

ASKED_AGAIN = 2  # times that a slot is asked again after an answer of no use


class Fault(Enum):
    """Why an answer is of no use."""

    EMPTY = "empty"
    NO_TEXT = "without a letter"
    REPEAT = "like a known instruction"
    TOO_FAR = "over the edit budget"


@dataclass
class Slot:
    """One instruction to be written."""

    index: int  # among all slots of the search, from 0
    predictor: str
    current: str  # instruction of the predictor in the best candidate
    round: int
    num_too_far: int = 0  # answers that were refused for the size of their change


def build(context: SearchContext) -> Opro:
    """The searcher. Raises ConfigError where no LM is lent."""
    return Opro(context)


class Opro:
    """Candidates, in this order: `incoming`, `student`, then `instruction 1`, `instruction 2`, ... in rounds.

    Demos are the student's throughout. Incoming prompts with other demos are a candidate, but no
    line of the history: their score says nothing of the instruction alone.
    """

    name = "opro"

    def __init__(self, context: SearchContext) -> None:
        if context.ask is None:
            raise ConfigError(
                f"optimizer: {self.name} needs an LM that writes instructions, and this search was lent none. "
                "Run it as a step of a strategy, give the step a `proposer`, or take random_fewshot."
            )
        self.context = context
        self._ask: AskLM = context.ask
        self._predictors = list(context.student["predictors"])
        self._num_slots = 0  # used so far, given up ones too
        self._queue: list[Proposal] = []
        self._waiting: dict[str, tuple[int, dict[str, str] | None]] = {}  # id -> place, instructions where comparable
        self._num_proposed = 0
        self._scored: list[Scored] = []
        self._known: dict[str, set[str]] = {predictor: set() for predictor in self._predictors}
        self._faults: Counter[Fault] = Counter()
        self._num_given_up = 0
        self._first()

    # The protocol

    def propose(self) -> Proposal | None:
        """The next candidate; asks the LM for a round of them when the scores of the last have come."""
        while not self._queue and not self._waiting and self._num_slots < self._max_slots:
            self._write_round()
        return self._queue.pop(0) if self._queue else None

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        order, texts = self._waiting.pop(candidate_id, (0, None))
        if texts is not None:
            self._scored.append(Scored(texts, score, complete, order))

    def finished(self) -> bool:
        return not self._queue and self._num_slots >= self._max_slots

    @property
    def notes(self) -> list[str]:
        """What became of the LM's answers, in sentences."""
        if not self._predictors:
            return ["The program has no predictor whose instruction may change, so none was written."]
        notes = [f"{self._num_slots - self._num_given_up} of {self._num_slots} instructions were written."]
        if self._faults:
            counts = ", ".join(f"{count} {fault.value}" for fault, count in sorted(self._faults.items(), key=str))
            notes.append(f"Answers of the LM that were dropped: {counts}.")
        if self._num_given_up:
            notes.append(f"{self._num_given_up} instructions were given up after {1 + ASKED_AGAIN} answers of no use each.")
        return notes

    # What a variant of the method changes

    def select(self, found: list[Shown], slot: Slot) -> list[Shown]:
        """The instructions to show, of all that the predictor had."""
        return instructions.by_score(found)[-self.context.step.history_length :]

    def request(self, slot: Slot) -> str:
        """What the meta-prompt asks for, after the history."""
        return "Write one new instruction that differs from all of these and gets a higher score."

    def fit(self, text: str, slot: Slot, last_chance: bool) -> str | Fault:
        """The instruction as it is proposed, or why it is refused. Unless `last_chance`, the LM is asked again."""
        return text

    # Rounds

    @property
    def _max_slots(self) -> int:
        return self.context.step.num_candidates if self._predictors else 0

    def _first(self) -> None:
        student = self.context.student
        incoming = self.context.incoming or student
        self._add("incoming", incoming, self._texts(incoming) if self._same_demos(incoming) else None)
        if candidate_id(student) != candidate_id(incoming):
            self._add("student", student, self._texts(student))

    def _write_round(self) -> None:
        per_round, first = self.context.step.proposals_per_round, self._num_slots
        current = instructions.best(self._scored).instructions
        slots = []
        for index in range(first, min(first + per_round, self._max_slots)):
            predictor = self._predictors[index % len(self._predictors)]
            slots.append(Slot(index, predictor, current[predictor], first // per_round))
        written = self._ask_for(slots)
        self._num_slots += len(slots)  # not before: a round that the budget does not pay for was not used
        self._num_given_up += len(slots) - len(written)
        for slot in slots:
            if slot.index in written:
                label = f"instruction {slot.index + 1}" + (f" ({slot.predictor})" if len(self._predictors) > 1 else "")
                texts = {**current, slot.predictor: written[slot.index]}
                self._add(label, self._candidate(texts), texts)

    def _ask_for(self, slots: list[Slot]) -> dict[int, str]:
        """The instructions by slot index; the LM is asked for all open slots at once."""
        # Slots of one round and predictor share their meta-prompt.
        prompts = {predictor: self._meta_prompt(slot) for predictor, slot in {slot.predictor: slot for slot in slots}.items()}
        written: dict[int, str] = {}
        pending = slots
        for attempt in range(1 + ASKED_AGAIN):
            if not pending:
                break
            seed = self._rng(f"{slots[0].round}/{attempt}").getrandbits(31)
            answers = self._ask([prompts[slot.predictor] for slot in pending], seed=seed)
            refused = []
            for slot, answer in zip(pending, answers, strict=True):
                text = self._judge(answer, slot, attempt == ASKED_AGAIN)
                if isinstance(text, Fault):
                    self._faults[text] += 1
                    refused.append(slot)
                else:
                    self._known[slot.predictor].add(instructions.same_text(text))
                    written[slot.index] = text
            pending = refused
        return written

    def _judge(self, answer: object, slot: Slot, last_chance: bool) -> str | Fault:
        text = instructions.clean(answer) if isinstance(answer, str) else ""
        if not text:
            return Fault.EMPTY
        if not instructions.is_text(text):
            return Fault.NO_TEXT
        if self._is_known(text, slot):
            return Fault.REPEAT
        fitted = self.fit(text, slot, last_chance)
        # A change that is cut back may be one that was tried before.
        return Fault.REPEAT if isinstance(fitted, str) and self._is_known(fitted, slot) else fitted

    def _is_known(self, text: str, slot: Slot) -> bool:
        return instructions.same_text(text) in self._known[slot.predictor]

    def _meta_prompt(self, slot: Slot) -> str:
        shown = instructions.fitting(self.select(instructions.history(self._scored, slot.predictor), slot))
        # One draw per round and predictor: equal prompts share their computation in the engine.
        cases = instructions.exemplars(self.context, slot.predictor, self._rng(f"{slot.round}/{slot.predictor}/exemplars"))
        parts = [
            instructions.task_text(self.context, slot.predictor),
            instructions.exemplar_text(cases),
            instructions.history_text(shown),
            self.request(slot) + " Write nothing but the instruction, between the same tags.",
        ]
        return "\n\n".join(part for part in parts if part)

    def _add(self, label: str, candidate: Candidate, texts: dict[str, str] | None) -> None:
        self._queue.append({"label": label, "candidate": candidate})
        self._waiting[candidate_id(candidate)] = (self._num_proposed, texts)
        self._num_proposed += 1
        for predictor, text in (texts or {}).items():
            self._known[predictor].add(instructions.same_text(text))

    def _texts(self, candidate: Candidate) -> dict[str, str]:
        """Instructions of the student's predictors; the student's own where the candidate has none."""
        predictors = {**self.context.student["predictors"], **candidate["predictors"]}
        return {name: predictors[name]["instructions"] for name in self._predictors}

    def _same_demos(self, candidate: Candidate) -> bool:
        predictors = candidate["predictors"]
        student = self.context.student["predictors"]
        return all(predictors[name]["demos"] == part["demos"] for name, part in student.items() if name in predictors)

    def _candidate(self, texts: dict[str, str]) -> Candidate:
        student = self.context.student["predictors"]
        return {
            "predictors": {
                name: {"instructions": texts[name], "demos": [dict(demo) for demo in part["demos"]]}
                for name, part in student.items()
            }
        }

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.context.seed}/{self.name}/{purpose}")
