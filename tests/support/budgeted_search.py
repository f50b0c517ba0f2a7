"""A search step without Ray: stub rows and a writing stub LM, for what a search pays and what it reads of earlier ones.

A run of the program makes two calls, a candidate 8 on the search examples and 10 on select.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.lm.types import LMAnswer, LMCall
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.rows import SegmentWriter
from bt_ray.rollout.tasks import RolloutRow, RolloutTask
from bt_ray.runs.commit import Step, StepKey
from bt_ray.search import experiment
from bt_ray.search.base import build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.racing import StopRule
from bt_ray.stages import searching
from bt_ray.stages.allowance import Allowance
from bt_ray.stages.beside import AskedLM
from bt_ray.stages.context import Row
from tests.support.compiling import SEARCH, STUDENT, TRAIN, write
from tests.support.plans import config
from tests.support.spending import spend
from tests.support.stub_pool import BASE, StubPool

SPLITS = {"train": TRAIN, "search": SEARCH, "select": SEARCH}
SIGNATURES = {
    "route": {"inputs": ["message"], "outputs": ["department"]},
    "classify": {"inputs": ["message", "department"], "outputs": ["intent"]},
}
STEPS: dict[str, dict[str, Any]] = {
    "opro": {"num_candidates": 6, "proposals_per_round": 2},
    "gpo": {"num_candidates": 6, "proposals_per_round": 2},
    "mipro": {"num_candidates": 4, "num_instructions": 3, "max_bootstrapped_demos": 0, "max_labeled_demos": 0},
    "gepa": {"num_candidates": 3},
    "dspy.BootstrapFewShot": {"options": {"max_labeled_demos": 0}},
    "dspy.COPRO": {"options": {"breadth": 3, "depth": 2}, "proposer": {"model": "openai/other"}},
}


class Writer(StubPool):
    """Writes numbered instructions where it is asked as a proposer, and runs the program as a small model does."""

    async def generate(self, call: LMCall) -> LMAnswer:
        answer = await super().generate(call)
        text = f"<instruction>Way {len(self.calls)}.</instruction>" if len(call.messages) == 1 else write(call)
        return replace(answer, text=text)


def run_rows(tasks: list[RolloutTask], workers: Any, folder: str, timeout_s: float) -> dict[Any, RolloutRow]:
    """Writes a row of two calls for each task; only every other example is answered well."""
    writer, rows = SegmentWriter(f"{folder}/stub.jsonl"), {}
    for task in tasks:
        calls = [
            {"predictor": name, "inputs": {}, "outputs": {}, "text": "", "prompt_token_ids": [1], "token_ids": [2]}
            for name in SIGNATURES
        ]
        row = {"example_id": task.example["id"], "sample": 0, "calls": calls, "error": None, "feedback": "Mend it."}
        rows[task.example["id"], 0] = row | {
            "score": float(int(task.example["inputs"]["message"].split()[2]) % 2),
            "accept": True,
        }
        writer.write(rows[task.example["id"], 0])
    writer.close()
    return rows


class Search:
    """A search of `optimizer` in `folder`, whose run has spent 10 calls before. `keys`: further keys of the step."""

    def __init__(self, folder: Path, optimizer: str, calls: int | None, **keys: Any) -> None:
        spend(folder, 10)
        self.checked_on: list[Row] | None = None  # examples on which candidates must fit the context
        self.program, self.proposer = Writer(lambda _: ""), Writer(lambda _: "")
        own = bool(STEPS[optimizer].get("proposer"))
        spec = ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact", adapter="compact")
        own_step = {"p": {"optimizer": optimizer, **STEPS[optimizer], **keys}}
        settings = config(budget={"max_lm_calls": calls}, steps=own_step, strategy="p")
        self.ctx: Any = SimpleNamespace(
            config=settings, examples=SPLITS.get, run=SimpleNamespace(root=folder), workers=[],
            pool=self.program, node=SimpleNamespace(steps=("p",)), spec=spec, identity={"signatures": SIGNATURES, "code": ""},
            labelled_outputs=lambda: {"classify": ["intent"]},
        )  # fmt: skip
        committed = Step(folder, StepKey("search", {"optimizer": optimizer}))
        asked = AskedLM(self.proposer if own else self.program, replace(BASE, id="other") if own else BASE)
        step: Any = settings.steps["p"]
        paid = Allowance(self.ctx, step, 2.0, lambda candidate: searching.num_scored(committed, candidate))
        self.parts = searching._Parts(paid, committed, BASE, asked)
        self.teacher: Any = SimpleNamespace(rows=[])
        self.searcher = build_searcher(optimizer, self.parts.context((STUDENT, STUDENT), self.teacher))
        self.book = Conduct(
            self.searcher, Ledger([row["id"] for row in SEARCH], (), StopRule(0.05)), None, self.parts.purse.unaffordable
        )
        self.parts.purse.watch(self.book.ledger.owed)

    @property
    def num_asked(self) -> int:
        return len(self.program.calls) + len(self.proposer.calls)

    def run(self) -> Search:
        score_all(self.book, self.parts.scored)
        return self


def score_all(book: Conduct, scored: Any, *_: Any) -> None:
    """What Tune does: scores one candidate after another, until the searcher or the budget ends the search."""
    while (entry := book.next()) is not Answer.END:
        if isinstance(entry, Answer):
            continue
        for rung, batch in enumerate(book.ledger.batches):
            report = {"candidate_id": entry.candidate_id, "rung": rung, "seconds": 0.0, "error": None}
            if book.heard({**report, "scores": scored.evaluate(entry.candidate, list(batch))}) is not Verdict.CONTINUE:
                break
    book.close()


def search_step(lent: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Any) -> Any:
    """The record of a whole search step; `refuse` stands in for the check of the context."""
    monkeypatch.setattr(experiment, "_run_tune", score_all)

    def context_check(ctx: Any, teacher: Any, examples: Any) -> Any:
        lent.checked_on = examples
        return SimpleNamespace(refuse=refuse)

    monkeypatch.setattr(searching, "context_check", context_check)
    ctx, step = lent.ctx, lent.ctx.config.steps["p"]
    ctx.stage_id, ctx.run.scratch, ctx.base = "p", tmp_path / "scratch", BASE
    ctx.key = lambda kind, **inputs: StepKey(kind, dict.fromkeys(searching.GREEDY, 0) | inputs)
    ctx.step = functools.partial(Step, tmp_path)
    ctx.check_budget = ctx.progress = ctx.begin_workers = ctx.ensure = lambda *_: None
    row = {"example_id": "e0", "sample": 0, "calls": [{}, {}], "accept": False, "score": 0.0, "error": None}
    teacher: Any = SimpleNamespace(rows=[row], record=SimpleNamespace(result={"rows_hash": "h"}))
    return searching.search(ctx, step, (STUDENT, STUDENT), teacher, BASE)
