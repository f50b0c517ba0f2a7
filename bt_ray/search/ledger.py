"""The book of one search: who was proposed, what is scored, who leads. Pure, no Ray.

Everything that decides stands here, so that it is tested without a cluster; `experiment` only
carries scores from Ray Tune to this book and its verdicts back.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bt_ray.rollout.tasks import candidate_id as identify
from bt_ray.search import racing
from bt_ray.search.base import Candidate, Proposal


class Verdict(Enum):
    """What follows for a candidate after a rung."""

    CONTINUE = "continue"
    STOP = "stop"  # racing: it has no chance
    COMPLETE = "complete"  # every example is scored


@dataclass
class Entry:
    """One candidate's line in the book."""

    index: int  # place among the proposals, from 0
    label: str
    candidate: Candidate
    candidate_id: str
    scores: dict[str, float] = field(default_factory=dict)  # by example, in the order of the rungs
    missing: int = 0  # examples without a score: the metric itself failed
    seconds: dict[int, float] = field(default_factory=dict)  # by rung
    complete: bool = False
    stopped_at: int | None = None  # examples after which racing stopped it
    refused: str | None = None  # why it was never run

    @property
    def live(self) -> bool:
        return not self.complete and self.stopped_at is None and self.refused is None

    @property
    def score(self) -> float:
        """Mean over the examples asked so far; one without a score counts as 0."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else 0.0

    def rank(self) -> tuple[float, int, int, int]:
        """Sort key, best first: score, then the cheaper prompt, then the earlier proposal."""
        num_demos, num_characters = prompt_size(self.candidate)
        return (-round(self.score, 9), num_demos, num_characters, self.index)

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate_id": self.candidate_id,
            "label": self.label,
            "num_examples": len(self.scores),
            "score": self.score,
            "complete": self.complete,
            "stopped_at": self.stopped_at,
            "seconds": sum(self.seconds.values()),
            "missing": self.missing,
            "refused": self.refused,
            "num_demos": prompt_size(self.candidate)[0],
        }


class Ledger:
    """Book of one search over `example_ids`, in their order, with racing at the rungs."""

    def __init__(self, example_ids: list[str], rungs: tuple[float, ...], rule: racing.StopRule) -> None:
        self.batches = racing.rung_batches(example_ids, rungs)
        self.num_examples = len(example_ids)
        self.entries: dict[str, Entry] = {}
        self.num_duplicates = 0
        self._rule = rule

    def add(self, proposal: Proposal) -> Entry | None:
        """Take a proposal into the book; None when an equal candidate is in it already."""
        key = identify(proposal["candidate"])
        if key in self.entries:
            self.num_duplicates += 1
            return None
        entry = Entry(len(self.entries), proposal["label"], proposal["candidate"], key)
        self.entries[key] = entry
        return entry

    def find(self, candidate: Candidate) -> Entry:
        """The entry of a candidate that is in the book."""
        return self.entries[identify(candidate)]

    def record(self, candidate_id: str, rung: int, scores: dict[str, float], seconds: float) -> Verdict:
        """Write down a rung's scores and decide. The same rung again (a lost process) changes nothing."""
        entry = self.entries[candidate_id]
        if rung not in entry.seconds:
            for example_id in self.batches[rung]:
                score = scores.get(example_id)
                usable = score is not None and math.isfinite(score)
                entry.missing += not usable
                entry.scores[example_id] = float(score) if usable and score is not None else 0.0
            entry.seconds[rung] = seconds
        if len(entry.scores) == self.num_examples:
            entry.complete = True
            return Verdict.COMPLETE
        incumbent = self.best()
        if incumbent is None:
            return Verdict.CONTINUE
        mine, theirs = list(entry.scores.values()), list(incumbent.scores.values())
        if racing.should_stop(mine, theirs, self.num_examples, self._rule):
            entry.stopped_at = len(mine)
            return Verdict.STOP
        return Verdict.CONTINUE

    def best(self) -> Entry | None:
        """The best candidate that is scored on every example, or None so far."""
        complete = [entry for entry in self.entries.values() if entry.complete]
        return min(complete, key=Entry.rank) if complete else None

    def why_none(self) -> str:
        """Why nobody is the best, after the name of the searcher."""
        reasons = list(dict.fromkeys(entry.refused for entry in self.entries.values() if entry.refused))
        if not reasons:
            return "proposed no candidate. Let `propose` return one before `finished` is True."
        more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        return f"proposed nothing that can be run: all {len(self.entries)} refused: {reasons[0]}{more}. Mend what it names."

    def owed(self, but: Entry | None = None) -> int:
        """Examples that the candidates which are being scored still lack; `but` is left out. Safe in another thread."""
        return sum(
            self.num_examples - len(entry.scores) for entry in list(self.entries.values()) if entry.live and entry is not but
        )

    @property
    def num_live(self) -> int:
        return sum(entry.live for entry in self.entries.values())

    def trials(self) -> list[dict[str, Any]]:
        """The book as plain rows, in the order of the proposals."""
        return [entry.to_json() for entry in self.entries.values()]

    def notes(self) -> list[str]:
        """What a reader of the result should know, in sentences."""
        notes = []
        if self.num_duplicates:
            notes.append(f"{self.num_duplicates} proposals equal to an earlier candidate were scored once.")
        missing = sum(entry.missing for entry in self.entries.values())
        if missing:
            notes.append(f"{missing} runs got no score (the metric failed, or the process died); the search counts them as 0.")
        refused = [entry for entry in self.entries.values() if entry.refused]
        if refused:
            notes.append(f"{len(refused)} candidates were not run, the first ({refused[0].label}) because {refused[0].refused}.")
        run = [entry for entry in self.entries.values() if not entry.refused]
        stopped = sum(entry.stopped_at is not None for entry in run)
        if stopped:
            asked = sum(len(entry.scores) for entry in run)
            share = 1 - asked / (len(run) * self.num_examples)
            notes.append(f"racing stopped {stopped} of {len(run)} candidates and saved {share:.0%} of the runs.")
        return notes


def prompt_size(candidate: Candidate) -> tuple[int, int]:
    """Number of demos, and characters of demos and instructions: what a candidate costs per call."""
    predictors = candidate["predictors"].values()
    num_demos = sum(len(predictor["demos"]) for predictor in predictors)
    return num_demos, sum(len(json.dumps(predictor, ensure_ascii=False, default=str)) for predictor in predictors)
