"""A planted problem for `random_fewshot`: few demo sets teach a stub LM everything. With DSPy's own search on it; no Ray."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Iterable
from typing import Any

import dspy
from dspy.lm15 import Message, Response, TextPart, Usage

from bt_ray.config import PromptStep
from bt_ray.search.base import Candidate, SearchContext, build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.racing import StopRule

NUM_KINDS = 3
NUM_KEYS, NUM_PLAIN, NUM_HARD = 9, 3, 9  # of the training examples
NUM_TRAIN = NUM_KEYS + NUM_PLAIN + NUM_HARD
NUM_SEARCH = 9
MAX_DEMOS = 4


class Planted:
    """A search question is of one of three kinds; the stub LM answers it when a demo shows it how that kind is done.

    How it is done stands in the reasoning of the traces of key examples, three of each kind. Plain
    examples are answered too, but teach nothing. At hard ones the LM guesses wrong, and a demo of
    such a guess spoils its kind. So the best demo sets have a key of each kind and no guess.
    """

    def __init__(self, seed: int) -> None:
        order = random.Random(f"planted/{seed}").sample(range(NUM_TRAIN), NUM_TRAIN)
        self.seed = seed
        self.keys = {number: place % NUM_KINDS for place, number in enumerate(order[:NUM_KEYS])}
        self.hard = {number: place % NUM_KINDS for place, number in enumerate(order[-NUM_HARD:])}
        self.calls = 0  # of the stub LM

    def answer(self, question: str, shown: Iterable[str]) -> tuple[str, str]:
        """Reasoning and label, for a prompt whose demos have these reasonings."""
        self.calls += 1
        number = int(question[1:])
        if question.startswith("t"):
            return (f"guess at {question}", "wrong") if number in self.hard else (f"steps of {question}", "gold")
        known, spoilt = set(), set()
        for reasoning in shown:
            if found := re.fullmatch(r"(steps of|guess at) t(\d+)", reasoning):
                (known if found[1] == "steps of" else spoilt).add((self.keys | self.hard).get(int(found[2])))
        kind = number % NUM_KINDS
        return f"thoughts on {question}", "gold" if kind in known - spoilt else "wrong"

    def context(self, num_draws: int) -> SearchContext:
        """One rollout of each training example, without demos."""
        rollouts = []
        for number in range(NUM_TRAIN):
            reasoning, label = self.answer(f"t{number}", ())
            call = {"predictor": "solve", "inputs": {"text": f"t{number}"}, "outputs": {"reasoning": reasoning, "label": label}}
            row = {"example_id": f"t{number}", "sample": 0, "calls": [call], "score": float(label == "gold"), "error": None}
            rollouts.append({**row, "accept": label == "gold"})
        demos = {"max_bootstrapped_demos": MAX_DEMOS, "max_labeled_demos": MAX_DEMOS}
        return SearchContext(
            step=PromptStep.model_validate({"optimizer": "random_fewshot", "num_candidates": num_draws, **demos}),
            student={"predictors": {"solve": {"instructions": "Solve it.", "demos": []}}},
            rollouts=rollouts,
            examples=[{"id": f"t{i}", "inputs": {"text": f"t{i}"}, "labels": {"label": "gold"}} for i in range(NUM_TRAIN)],
            labelled={"solve": ["label"]},
            signatures={"solve": {"inputs": ["text"], "outputs": ["reasoning", "label"]}},
            seed=self.seed,
        )

    def score(self, candidate: Candidate, question: str) -> float:
        shown = [demo.get("reasoning", "") for demo in candidate["predictors"]["solve"]["demos"]]
        return float(self.answer(question, shown)[1] == "gold")


def search(problem: Planted, context: SearchContext) -> Ledger:
    """Search as `run_search` does, with racing and without Ray, one candidate after another."""
    ledger = Ledger([f"s{i}" for i in range(NUM_SEARCH)], context.step.rungs, StopRule.of(context.step))
    conduct = Conduct(build_searcher("random_fewshot", context), ledger)
    while (entry := conduct.next()) is not Answer.END:
        if isinstance(entry, Answer):
            continue
        for rung, batch in enumerate(ledger.batches):
            scores = [(question, problem.score(entry.candidate, question)) for question in batch]
            report = {"candidate_id": entry.candidate_id, "rung": rung, "scores": scores, "seconds": 0.0, "error": None}
            if conduct.heard(report) is not Verdict.CONTINUE:
                break
    conduct.close()
    return ledger


class Engine:
    """The stub LM behind DSPy's own prompts: it reads the demos and the question there."""

    def __init__(self, problem: Planted) -> None:
        self.problem = problem

    def complete(self, request: Any) -> Response:
        *demos, question = [message.text or "" for message in request.messages]
        shown = re.findall(r"## reasoning ## \]\]\n(.*)", "\n".join(demos))
        asked = re.search(r"## text ## \]\]\n(\w+)", question)
        assert asked is not None
        reasoning, label = self.problem.answer(asked[1], shown)
        text = f"[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
        usage = Usage(input_tokens=0, output_tokens=0, total_tokens=0)
        return Response(id=None, model="stub", message=Message.assistant([TextPart(text)]), finish_reason="stop", usage=usage)

    def close(self) -> None: ...


def dspy_search(problem: Planted, max_calls: int) -> float:
    """Best score of DSPy's BFRS, from 0 to 1, among the candidates that it had begun within this many calls of the LM."""
    examples, questions = (
        [dspy.Example(text=f"{letter}{i}", label="gold").with_inputs("text") for i in range(num)]
        for letter, num in (("t", NUM_TRAIN), ("s", NUM_SEARCH))
    )
    with (
        dspy.context(lm=dspy.LM("stub/stub", engine=Engine(problem), cache=False), disable_history=True),
        contextlib.redirect_stdout(io.StringIO()),  # it prints, and draws bars
        contextlib.redirect_stderr(io.StringIO()),
    ):
        optimiser = dspy.BootstrapFewShotWithRandomSearch(
            metric=lambda example, answer, trace=None: answer.label == example.label,
            max_bootstrapped_demos=MAX_DEMOS,
            max_labeled_demos=MAX_DEMOS,
            # More than the calls allow: each costs the search questions and one trace at least.
            num_candidate_programs=max_calls // (NUM_SEARCH + 1),
            num_threads=1,
            # It ends at a perfect score, so the calls until then tell whether that was in time.
            stop_at_score=100,
        )
        best = optimiser.compile(dspy.Predict("text -> reasoning, label"), trainset=examples, valset=questions)
    in_time = problem.calls - NUM_SEARCH < max_calls
    return best.candidate_programs[0]["score"] / 100 if in_time else 0.0
