"""A planted problem for `gepa`: a stub LM, rows without a program, and the package driven by itself. No Ray."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gepa
from gepa.core.adapter import EvaluationBatch

from bt_ray.config import PromptStep
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search.base import SearchContext, build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger
from bt_ray.search.racing import StopRule

VOCABULARY = [f"word{number:02d}" for number in range(40)]
NUM_TRAIN, NUM_SEARCH = 12, 8


def needed(number: int, planted: Sequence[str]) -> list[str]:
    """The two planted words that an example needs."""
    return [planted[number % len(planted)], planted[(number * 5 + 1) % len(planted)]]


def score_of(text: str, words: Sequence[str]) -> float:
    return sum(word in text.split() for word in words) / len(words)


@dataclass
class Planted:
    """Each predictor's best instruction holds all of its planted words; an example needs two of each.

    The metric's feedback names a missing word. The stub LM reads the feedback in its prompt and adds a
    word that it names; at times it adds a word at random, and at times it drops one.
    """

    parts: tuple[str, ...] = ("solve",)
    num_words: int = 6  # of each predictor's best instruction
    feedback: bool = True
    noise: float = 0.35
    calls: int = 0  # metric calls that were made, each (candidate, example) once
    asked: list[tuple[str, int]] = field(default_factory=list)
    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def words(self, part: str) -> list[str]:
        place = self.parts.index(part) * self.num_words
        return VOCABULARY[place : place + self.num_words]

    def score(self, texts: dict[str, str], number: int) -> tuple[float, str]:
        self.calls += 1
        each = [score_of(texts[part], needed(number, self.words(part))) for part in self.parts]
        missing = [
            f"{part} lacks {word}."
            for part in self.parts
            for word in needed(number, self.words(part))
            if word not in texts[part].split()
        ]
        return sum(each) / len(each), " ".join(missing) or "All is there."

    def run_rows(self, candidate: dict[str, Any], example_ids: Sequence[str]) -> list[dict[str, Any]]:
        texts = {part: candidate["predictors"][part]["instructions"] for part in self.parts}
        for name in example_ids:
            key = (candidate_id(candidate), name)
            if key not in self.rows:
                score, said = self.score(texts, int(name[1:]))
                calls = [
                    {"predictor": part, "inputs": {"question": name}, "outputs": {"answer": f"{part} of {name}"}, "text": ""}
                    for part in self.parts
                ]
                row = {"example_id": name, "calls": calls, "score": score, "error": None}
                self.rows[key] = {**row, "feedback": said if self.feedback else None}
        return [self.rows[candidate_id(candidate), name] for name in example_ids]

    def ask(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        assert len(prompts) == 1
        self.asked.append((prompts[0], seed))
        return [self.write(prompts[0], random.Random(f"{seed}/{prompts[0]}"))]

    def write(self, prompt: str, rng: random.Random) -> str:
        now = re.search(r"```\n(.*?)\n```", prompt, re.S)
        assert now is not None
        words = now.group(1).split()
        named = [word for word in re.findall(r"lacks (word\d\d)", prompt) if word not in words]
        # An LM adds what it was told, and what it was not told it guesses.
        words.append(rng.choice(named) if named and rng.random() > self.noise else rng.choice(VOCABULARY))
        if rng.random() < self.noise:
            words.remove(rng.choice(words))
        return f"Here it is:\n```\n{' '.join(words)}\n```"

    def context(self, seed: int = 0, **step: Any) -> SearchContext:
        student = {
            "predictors": {part: {"instructions": "Answer.", "demos": [{"question": "q", "answer": "a"}]} for part in self.parts}
        }
        examples = [{"id": f"t{i}", "inputs": {"question": f"t{i}"}, "labels": {}} for i in range(NUM_TRAIN)]
        return SearchContext(
            step=PromptStep.model_validate({"optimizer": "gepa", "num_candidates": 24, **step}),
            student=student,
            rollouts=[],
            examples=examples,
            labelled={},
            signatures={part: {"inputs": ["question"], "outputs": ["answer"]} for part in self.parts},
            seed=seed,
            ask=self.ask,
            run_rows=self.run_rows,
            search_ids=tuple(f"s{i}" for i in range(NUM_SEARCH)),
        )


SHORT = VOCABULARY[-1]


@dataclass
class Divided(Planted):
    """Two ways that cannot be joined, of which the quick one is a dead end; the best text is at the end of the slow one.

    The word SHORT solves the even examples at once and the odd ones never. Without it the odd
    examples are solved word by word, and the even ones when all planted words are there. So until
    then the text with SHORT scores highest, and nothing that is added to it raises its score.
    """

    num_words: int = 4
    noise: float = 0.15

    def score(self, texts: dict[str, str], number: int) -> tuple[float, str]:
        (text,) = texts.values()
        if SHORT in text.split():
            self.calls += 1
            return (0.0, "A short answer leaves the steps out.") if number % 2 else (1.0, "All is there.")
        score, said = super().score(texts, number)
        if number % 2:
            return 0.1 + 0.9 * score, said  # no word yet, but more than a short answer: the start is on the front
        whole = score_of(text, self.words(self.parts[0])) == 1.0
        return (1.0, "All is there.") if whole else (0.0, f"The answer lacks {SHORT}.")


def search(problem: Planted, context: SearchContext) -> tuple[Any, Ledger]:
    """Search as `run_search` does, without Ray: the searcher, and the ledger."""
    searcher = build_searcher("gepa", context)
    conduct = Conduct(searcher, Ledger(list(context.search_ids), (), StopRule(0.05)))
    give_up = time.monotonic() + 60
    while (entry := conduct.next()) is not Answer.END:
        assert time.monotonic() < give_up
        if isinstance(entry, Answer):
            continue
        texts = {name: predictor["instructions"] for name, predictor in entry.candidate["predictors"].items()}
        scores = [(name, problem.score(texts, int(name[1:]))[0]) for name in conduct.ledger.batches[0]]
        conduct.heard({"candidate_id": entry.candidate_id, "rung": 0, "scores": scores, "seconds": 0.0, "error": None})
    conduct.close()
    return searcher, conduct.ledger


class DirectAdapter:
    """The problem as a user of the package gives it to `gepa.optimize`."""

    propose_new_texts = None

    def __init__(self, problem: Planted) -> None:
        self.problem = problem

    def evaluate(self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        found = [self.problem.score(candidate, number) for number in batch]
        return EvaluationBatch(
            outputs=found, scores=[score for score, _ in found], trajectories=list(zip(batch, found, strict=True))
        )

    def make_reflective_dataset(self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]) -> Any:
        records = [
            {
                "Inputs": {"question": f"t{number}"},
                "Generated Outputs": {"answer": "a"},
                "Feedback": said if self.problem.feedback else f"Score: {score}",
            }
            for number, (score, said) in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)


class Quiet:
    def log(self, message: str) -> None: ...


def direct(problem: Planted, seed: int, max_metric_calls: int) -> float:
    """Best score of `gepa.optimize` as it is used by itself."""
    asked = iter(range(10**6))
    result = gepa.optimize(
        seed_candidate=dict.fromkeys(problem.parts, "Answer."),
        trainset=list(range(NUM_TRAIN)),
        valset=list(range(NUM_SEARCH)),
        adapter=DirectAdapter(problem),
        reflection_lm=lambda prompt: problem.ask([prompt], next(asked))[0],
        max_metric_calls=max_metric_calls,
        seed=seed,
        use_merge=len(problem.parts) > 1,  # as dspy.GEPA has it, and ours
        logger=Quiet(),
    )
    return max(result.val_aggregate_scores)


def best_score(ledger: Ledger) -> float:
    best = ledger.best()
    assert best is not None
    return best.score


def propose_all(context: SearchContext, score: float = 0.0) -> Any:
    """Propose until the end, every candidate scored alike."""
    searcher = build_searcher("gepa", context)
    while not searcher.finished():
        proposal = searcher.propose()
        if proposal is not None:
            key = candidate_id(proposal["candidate"])
            searcher.observe_examples(key, dict.fromkeys(context.search_ids, score))  # type: ignore[attr-defined]
            searcher.observe(key, score, True)
    return searcher
