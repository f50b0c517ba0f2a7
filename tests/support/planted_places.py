"""A small planted problem for searchers whose LM writes instructions, and DSPy's own searches on it; no Ray.

The best instruction has the right word of four in each of three places. The stub LM takes an
instruction from its prompt (the last one where several are shown) and changes one word or more to
any other: what is shown last decides what comes of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.lm15 import Message, Response, TextPart, Usage

from bt_ray.search.base import build_searcher
from tests.support.planted_instructions import context, drive

NUM_PLACES, NUM_WORDS = 3, 4
BREADTH, DEPTH = 4, 5
NUM_SCORED = BREADTH * DEPTH  # of 64 possible instructions, the first one included


class Planted:
    """Scores and the stub LM of one seed. An instruction is scored on all examples at once."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"places/{seed}")
        # The start has none of the right words.
        values = [rng.sample(range(NUM_WORDS), 2) for _ in range(NUM_PLACES)]
        self.right, self.start = ([f"{place}v{pair[i]}" for place, pair in enumerate(values)] for i in (0, 1))
        self.seed = seed
        self.num_scored = 0
        self.best = 0.0
        self._rng = random.Random(f"places/{seed}/writer")

    def score(self, text: str) -> float:
        self.num_scored += 1
        share = sum(a == b for a, b in zip(self.right, text.split(), strict=True)) / NUM_PLACES
        self.best = max(self.best, share)
        return share

    def write(self, text: str) -> str:
        words = text.split()
        for place in self._rng.sample(range(NUM_PLACES), self._rng.randint(1, NUM_PLACES)):
            others = [f"{place}v{i}" for i in range(NUM_WORDS) if f"{place}v{i}" != words[place]]
            words[place] = self._rng.choice(others)
        return " ".join(words)

    def ask(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        shown = [re.findall(r"<instruction>(.*?)</instruction>", prompt)[-1] for prompt in prompts]
        return [f"<instruction>{self.write(text)}</instruction>" for text in shown]

    def complete(self, request: Any) -> Response:
        """The same LM behind DSPy's own prompts."""
        prompt = request.messages[-1].text or ""
        shown = re.findall(r"(?:## basic_instruction ## \]\]\n|Instruction #\d+: )((?:\dv\d ?)+)", prompt)
        answers = {"proposed_instruction": self.write(shown[-1]), "proposed_prefix_for_output_field": "Label:"}
        text = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in answers.items())
        usage = Usage(input_tokens=0, output_tokens=0, total_tokens=0)
        return Response(id=None, model="stub", message=Message.assistant([TextPart(text)]), finish_reason="stop", usage=usage)

    def close(self) -> None: ...

    def lm(self) -> dspy.LM:
        return dspy.LM("stub/stub", engine=self, cache=False)

    def evaluate(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of DSPy's evaluation."""
        return SimpleNamespace(score=100 * self.score(program.signature.instructions), results=[])


def search(problem: Planted, optimizer: str) -> None:
    """Search with a searcher of ours: the start, and the instructions that the LM writes."""
    sizes = {"num_candidates": NUM_SCORED - 1, "proposals_per_round": BREADTH, "history_length": 8}
    lent = context(problem.ask, " ".join(problem.start), problem.seed, **sizes)
    drive(build_searcher(optimizer, lent), lambda predictors: problem.score(predictors["main"]["instructions"]))


def _program(problem: Planted) -> dspy.Predict:
    return dspy.Predict(dspy.Signature("text -> label", " ".join(problem.start)))


def mipro_search(problem: Planted) -> None:
    """DSPy's MIPROv2 over instructions alone: as many are written and scored, each on all examples."""
    program, examples = _program(problem), [dspy.Example(text="t", label="gold").with_inputs("text")]
    with dspy.context(lm=problem.lm(), disable_history=True):
        optimiser = dspy.MIPROv2(metric=max, auto=None, num_candidates=NUM_SCORED, track_stats=False)
        optimiser.rng = random.Random(problem.seed)
        written = optimiser._propose_instructions(program, examples, None, 1, False, False, False, False, NUM_SCORED)
        args = (program, written, None, problem.evaluate, examples, NUM_SCORED - 1, False, 1, 1, problem.seed)
        optimiser._optimize_prompt_parameters(*args)


def copro_search(problem: Planted) -> None:
    """DSPy's COPRO, which shows the LM earlier instructions with scores, as `opro` does."""
    with dspy.context(lm=problem.lm(), disable_history=True):
        optimiser = dspy.COPRO(metric=problem.evaluate, breadth=BREADTH, depth=DEPTH)
        optimiser.compile(_program(problem), trainset=[dspy.Example(text="t", label="gold").with_inputs("text")])
