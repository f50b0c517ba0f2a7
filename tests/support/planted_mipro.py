"""A planted problem for MIPRO, the stub LM that it asks, and a loop that scores candidates without Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bt_ray.config import PromptStep
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search import grounding
from bt_ray.search.base import AskLM, Candidate, SearchContext, Searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.mipro import make_demo_sets
from bt_ray.search.racing import StopRule

SIGNATURES = {"route": {"inputs": ["text"], "outputs": ["area"]}, "answer": {"inputs": ["text"], "outputs": ["intent"]}}
CODE = "class Desk:\n    def forward(self, text): ..."
SUMMARY = "Messages of customers."
NUM_TRIALS = 50  # of a grid of 6 ** 4 = 1296
NUM_EXAMPLES = 100
NOISE = 0.15  # half the width of what moves a candidate up or down on one example


class StubLM:
    """Numbers its answers, so that all differ; keeps what it was asked."""

    def __init__(self, answer: Callable[[int], str] = "<instruction>Way {}.</instruction>".format) -> None:
        self.answer = answer
        self.prompts: list[str] = []
        self.seeds: list[int] = []

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        answers = []
        for prompt in prompts:
            self.prompts.append(prompt)
            self.seeds.append(seed)
            answers.append(self.answer(len(self.prompts)) if "instruction" in prompt else SUMMARY)
        return answers


def make_context(seed: int = 0, ask: AskLM | None = None, passing: int = 12, **step: Any) -> SearchContext:
    """A pipeline of two predictors, of which the last is labelled; the first `passing` of 12 rollouts pass."""
    examples = [{"id": f"e{i}", "inputs": {"text": f"t{i}"}, "labels": {"intent": f"gold{i}"}} for i in range(12)]
    rollouts = []
    for i in range(12):
        calls = [
            {"predictor": "route", "inputs": {"text": f"t{i}"}, "outputs": {"area": f"area{i}"}},
            {"predictor": "answer", "inputs": {"text": f"t{i}"}, "outputs": {"intent": f"intent{i}"}},
        ]
        row = {"example_id": f"e{i}", "sample": 0, "calls": calls, "score": 1.0, "error": None}
        rollouts.append({**row, "accept": i < passing})
    return SearchContext(
        step=PromptStep.model_validate({"optimizer": "mipro", "num_candidates": 8, "max_parallel": 1, **step}),
        student={"predictors": {name: {"instructions": f"Do {name}.", "demos": []} for name in SIGNATURES}},
        rollouts=rollouts,
        examples=examples,
        labelled={"answer": ["intent"]},
        signatures=SIGNATURES,
        seed=seed,
        incoming={"predictors": {name: {"instructions": f"Really do {name}.", "demos": []} for name in SIGNATURES}},
        ask=ask,
        program_code=CODE,
    )


def drive(searcher: Searcher, score: Callable[[Candidate, str], float], rungs: tuple[float, ...] = (0.25, 0.5)) -> Ledger:
    """Score one candidate after another through Conduct and the ledger, with racing."""
    book = Conduct(searcher, Ledger([str(i) for i in range(NUM_EXAMPLES)], rungs, StopRule(0.05)))
    while (entry := book.next()) is not Answer.END:
        if isinstance(entry, Answer):
            continue
        for rung, batch in enumerate(book.ledger.batches):
            scores = [(example, score(entry.candidate, example)) for example in batch]
            report = {"candidate_id": entry.candidate_id, "rung": rung, "scores": scores, "seconds": 0.0, "error": None}
            if book.heard(report) is not Verdict.CONTINUE:
                break
    book.close()
    return book.ledger


class Planted:
    """Every predictor has one best instruction and one best demo set of six each, the rest falls off evenly.

    The mean of a candidate rises smoothly in the four qualities, with interactions within and
    between predictors, to 0.9 for the planted one alone. An example is solved (score 1) when the
    mean, moved by noise of this candidate on this example, is above the example's difficulty.
    """

    def __init__(self, seed: int) -> None:
        self.context = replace(make_context(seed, StubLM(), num_candidates=NUM_TRIALS), incoming=None)
        self.instructions, _ = grounding.propose_instructions(self.context)
        self.demo_sets, _ = make_demo_sets(self.context)
        self.context = replace(self.context, ask=StubLM())  # to give the same answers once more
        rng = random.Random(f"planted/{seed}")
        self.quality: dict[str, float] = {}
        for name in SIGNATURES:
            for options in (self.instructions[name], self.demo_sets[name]):
                ranks = rng.sample(range(6), 6)
                self.quality |= {name + json.dumps(option): rank / 5 for option, rank in zip(options, ranks, strict=True)}
        self.difficulty = [rng.random() for _ in range(NUM_EXAMPLES)]
        self.noise: dict[str, list[float]] = {}

    def mean(self, candidate: Candidate) -> float:
        steps = []
        for name, predictor in candidate["predictors"].items():
            instruction = self.quality[name + json.dumps(predictor["instructions"])]
            demos = self.quality[name + json.dumps(predictor["demos"])]
            steps.append(0.35 * instruction + 0.35 * demos + 0.3 * instruction * demos)
        return 0.1 + 0.8 * (0.25 * sum(steps) + 0.5 * steps[0] * steps[1])

    def score(self, candidate: Candidate, example: str) -> float:
        key = candidate_id(candidate)
        if key not in self.noise:
            rng = random.Random(f"{key}/noise")
            self.noise[key] = [rng.uniform(-NOISE, NOISE) for _ in range(NUM_EXAMPLES)]
        return float(self.mean(candidate) + self.noise[key][int(example)] > self.difficulty[int(example)])
