"""That `labeled` finds what labels alone can teach, on a planted label set, beside DSPy's own; no Ray and no LM."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import dspy

from bt_ray.config import PromptStep
from bt_ray.search.base import Candidate, SearchContext, build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.racing import StopRule

SEEDS = range(200)  # with 50, luck is as large as the difference
NUM_KINDS, NUM_TRAIN, NUM_SEARCH, NUM_DEMOS, NUM_DRAWS = 3, 18, 60, 4, 12


class Planted:
    """A question is of one of three kinds, and is answered where a demo of its kind has the right label and none a wrong one."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"labels/{seed}")
        self.seed = seed
        self.kinds = [number % NUM_KINDS for number in rng.sample(range(NUM_TRAIN), NUM_TRAIN)]
        self.wrong = {number for number in range(NUM_TRAIN) if rng.random() < 0.4}
        self.calls = 0

    def label(self, number: int) -> str:
        return "wrong" if number in self.wrong else "gold"

    def score(self, shown: Iterable[tuple[str, str]], question: str) -> float:
        """`shown`: text and label of each demo."""
        self.calls += 1
        kind = int(question[1:]) % NUM_KINDS
        labels = {label for text, label in shown if self.kinds[int(text[1:])] == kind}
        return float(labels == {"gold"})

    def context(self, num_draws: int) -> SearchContext:
        sizes = {"num_candidates": num_draws, "max_labeled_demos": NUM_DEMOS}
        return SearchContext(
            step=PromptStep.model_validate({"optimizer": "labeled", **sizes}),
            student={"predictors": {"solve": {"instructions": "Solve it.", "demos": []}}},
            rollouts=[],
            examples=[{"id": f"t{i}", "inputs": {"text": f"t{i}"}, "labels": {"label": self.label(i)}} for i in range(NUM_TRAIN)],
            labelled={"solve": ["label"]},
            signatures={"solve": {"inputs": ["text"], "outputs": ["label"]}},
            seed=self.seed,
        )


QUESTIONS = [f"s{number}" for number in range(NUM_SEARCH)]


def demos_of(candidate: Candidate) -> list[tuple[str, str]]:
    return [(demo["text"], demo["label"]) for demo in candidate["predictors"]["solve"]["demos"]]


def best_of_ours(problem: Planted, num_draws: int = NUM_DRAWS) -> float:
    """Best score of the search, as `run_search` makes it, with racing and without Ray."""
    context = problem.context(num_draws)
    ledger = Ledger(list(QUESTIONS), context.step.rungs, StopRule.of(context.step))
    conduct = Conduct(build_searcher("labeled", context), ledger)
    while (entry := conduct.next()) is not Answer.END:
        if isinstance(entry, Answer):
            continue
        for rung, batch in enumerate(ledger.batches):
            scores = [(question, problem.score(demos_of(entry.candidate), question)) for question in batch]
            report = {"candidate_id": entry.candidate_id, "rung": rung, "scores": scores, "seconds": 0.0, "error": None}
            if conduct.heard(report) is not Verdict.CONTINUE:
                break
    conduct.close()
    best = ledger.best()
    assert best is not None
    return best.score


def best_of_dspy(problem: Planted, max_calls: int) -> float:
    """Best score among as many of DSPy's draws as these calls score. It always draws alike, so its examples are shuffled."""
    examples = [dspy.Example(text=f"t{i}", label=problem.label(i)).with_inputs("text") for i in range(NUM_TRAIN)]
    best = 0.0
    for number in range(max_calls // NUM_SEARCH):
        random.Random(f"{problem.seed}/{number}").shuffle(examples)
        compiled: Any = dspy.LabeledFewShot(k=NUM_DEMOS).compile(dspy.Predict("text -> label"), trainset=examples)
        shown = [(demo.text, demo.label) for demo in compiled.demos]
        best = max(best, sum(problem.score(shown, question) for question in QUESTIONS) / NUM_SEARCH)
    return best


def test_finds_planted_labels_at_least_as_often_as_dspy_with_the_same_number_of_calls() -> None:
    """91 against 77 of 200, because hopeless draws are stopped early; DSPy's one draw, which nothing scores, 11."""
    ours, theirs, alone = 0, 0, 0
    for seed in SEEDS:
        problem = Planted(seed)
        ours += best_of_ours(problem) == 1.0
        calls = problem.calls
        theirs += best_of_dspy(problem, calls) == 1.0
        alone += best_of_dspy(problem, NUM_SEARCH) == 1.0  # its one draw, which it does not score
    print("ours", ours, "dspy", theirs, "its one draw", alone)
    assert ours >= theirs and ours >= alone + 40


def test_one_draw_is_the_best_far_less_often() -> None:
    """91 and 12 of 200."""
    many, one = (sum(best_of_ours(Planted(seed), draws) == 1.0 for seed in SEEDS) for draws in (NUM_DRAWS, 1))
    print("draws", many, "one", one)
    assert many >= one + 40
