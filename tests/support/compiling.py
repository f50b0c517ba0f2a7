"""A stub pool whose answers follow from the whole call, and what a search lends to an optimiser of DSPy. No Ray."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bt_ray.config import PromptStep
from bt_ray.errors import PoolError
from bt_ray.lm.journal import JournalPool
from bt_ray.lm.types import LMAnswer, LMCall
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.session import ProgramSession
from bt_ray.search.base import SearchContext, build_searcher
from tests.support import programs
from tests.support.stub_pool import BASE, StubPool

STUDENT = extract(programs.TwoModules())
TRAIN = [programs.example(number) for number in range(8)]
SEARCH = [programs.example(number) for number in range(20, 24)]


def write(call: LMCall) -> str:
    """A model that errs on odd messages (sampled: by its seed), unless it is told to take care or shown a demo."""
    messages, seed = call.messages, call.sampling.seed
    system, last = messages[0]["content"], messages[-1]["content"]
    if "instruction optimizer" in system:
        return f"proposed_instruction: Take care, way {(seed or 0) % 1000}.\nproposed_prefix_for_output_field: So"
    if "two trajectories" in system:
        return 'discussion: It erred.\nmodule_advice: {"route": "Take care.", "classify": "Take care."}'
    luck = seed if seed is not None else int(last.split()[3]) + 1
    if "Take care" in system or len(messages) > 2 or luck % 2:
        return programs.answer(messages)
    return "transfers" if "\ndepartment: " not in last else "card_late"


@dataclass
class SeededPool(StubPool):
    """Answers by the whole call, its seed too. With `jitter` calls end in another order each time."""

    jitter: bool = False
    fails_after: int | None = None  # answers that it gives

    async def generate(self, call: LMCall) -> LMAnswer:
        if self.jitter:
            self.delay_s = random.uniform(0.0, 0.004)
        if len(self.calls) == self.fails_after:
            raise PoolError("the replica died")
        answer = await super().generate(call)
        return replace(answer, text=write(call))


def pool(tmp_path: Path, **fields: Any) -> tuple[SeededPool, JournalPool]:
    inner = SeededPool(lambda messages: "", **fields)
    return inner, JournalPool(inner, tmp_path / "calls.jsonl")


def session(journal: Any, **fields: Any) -> ProgramSession:
    spec = ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact", adapter="compact")
    return ProgramSession(spec, journal, BASE, **{"max_tokens": 32, "seed": 4, **fields})


def context(journal: Any, optimizer: str, seed: int = 0, **step: Any) -> SearchContext:
    run = session(journal)
    return SearchContext(
        step=PromptStep.model_validate({"optimizer": optimizer, **step}),
        student=STUDENT,
        rollouts=[],
        examples=TRAIN,
        labelled={"classify": ["intent"]},
        signatures={},
        seed=seed,
        compile=functools.partial(run.compile, STUDENT, TRAIN, SEARCH),
    )


def proposals(context: SearchContext, base_dir: str = ".") -> dict[str, dict[str, Any]]:
    """All proposals by label, down to the predictors."""
    searcher = build_searcher(context.step.optimizer, context, base_dir)
    found = {}
    while (proposal := searcher.propose()) is not None:
        assert not searcher.finished() or proposal["label"] == context.step.optimizer
        found[proposal["label"]] = proposal["candidate"]["predictors"]
    assert searcher.finished()
    return found
