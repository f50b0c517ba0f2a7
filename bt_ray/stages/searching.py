"""The search step: prompts for the incoming weights, with every score and LM answer committed as it comes."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bt_ray.config import PromptStep
from bt_ray.data import step_examples
from bt_ray.errors import BudgetError
from bt_ray.lm.types import Weights
from bt_ray.rollout.candidates import candidate_id
from bt_ray.runs.commit import Cost, Record, Step, first_attempt
from bt_ray.runs.identity import derive_seed
from bt_ray.stages.allowance import Allowance, Purse
from bt_ray.stages.beside import AskedLM, proposer, proposer_key
from bt_ray.stages.context import Candidate, Row, StageContext
from bt_ray.stages.lent import TRAIN
from bt_ray.stages.steps import Rollouts, cost_of, split_hash

# Of a step, what its result does not follow from.
WHERE_IT_RUNS: Any = {
    "max_parallel": True,
    "proposer": {"engine": {"resources"}, "api_key_file": True},
    "teacher": {"engine": {"resources"}},
}
# Of a step, what its result follows from by the examples that are drawn, which have hashes of their own.
DRAWS = ("max_train_examples", "max_search_examples")
PROPOSALS = "proposer_calls.jsonl"  # in the step's folder: what the LM that writes instructions answered
COMPILES = "compile_calls.jsonl"  # what the program's LM answered to an optimiser that runs the program itself


def search(
    ctx: StageContext, step_config: PromptStep, prompts: tuple[Candidate, Candidate], teacher: Rollouts, weights: Weights
) -> Record:
    """Search prompts with Ray Tune; every scored row is committed as it ends.

    `prompts`: the student's, which the search starts from, and the incoming ones, a candidate too.
    """
    from bt_ray.search.base import source_id
    from bt_ray.search.experiment import SearchPlan, run_search
    from bt_ray.search.racing import StopRule

    examples, train = examples_of(ctx, step_config, "search"), examples_of(ctx, step_config, "train")
    key = ctx.key(
        "search",
        step=step_config.model_dump(mode="json", exclude={**WHERE_IT_RUNS, **dict.fromkeys(DRAWS, True)}),
        student=candidate_id(prompts[0]),
        incoming=candidate_id(prompts[1]),
        teacher=teacher.record.result["rows_hash"],
        weights=weights.id,
        examples=split_hash(examples),
        place=list(ctx.node.steps),
        seed=ctx.config.seed,
        **({TRAIN: split_hash(train)} if len(train) < len(ctx.examples("train")) else {}),
        **proposer_key(ctx, step_config),
        **({"searcher": source} if (source := source_id(step_config.optimizer, ctx.config.base_dir)) else {}),
    )
    step = ctx.step(key)
    record = step.record()
    if record is not None:
        return record
    ctx.check_budget()
    allowance = Allowance.of(ctx, step_config, teacher.rows, functools.partial(num_scored, step))
    if not list(step.rows.glob("*")) and (why := allowance.unaffordable(prompts[1], 0)):
        raise BudgetError(f"{why}.")  # before an engine takes the weights
    step.begin(**{TRAIN: split_hash(train)})
    started = time.monotonic()
    plan = SearchPlan(
        example_ids=[row["id"] for row in examples],
        rungs=step_config.rungs,
        stop_rule=StopRule.of(step_config),
        max_parallel=step_config.max_parallel,
        scratch_dir=str(ctx.run.scratch / key.name),
        base_dir=ctx.config.base_dir,
        refuse=context_check(ctx, teacher, examples).refuse,
    )
    ctx.progress(step, "search", (step_config.num_candidates + 4) * len(examples))
    ctx.begin_workers()
    ctx.ensure(weights)
    with proposer(ctx, step_config, weights) as asked:
        parts = _Parts(allowance, step, weights, asked)
        plan = replace(plan, unaffordable=parts.purse.unaffordable, watch=parts.purse.watch)
        found = run_search(step_config.optimizer, parts.context(prompts, teacher), parts.scored, plan)
    return step.commit(ctx.stage_id, parts.result(found), parts.cost(time.monotonic() - started))


def examples_of(ctx: StageContext, step_config: PromptStep, split: Literal["train", "search"]) -> list[Row]:
    """Those of a split's examples that the step uses."""
    return step_examples(step_config, split, ctx.examples(split), ctx.config.seed)


def context_check(ctx: StageContext, teacher: Rollouts, examples: list[Row]) -> Any:
    """Refuses candidates whose prompts do not fit on what the teacher was given and on `examples`, before they cost a call."""
    from bt_ray.lm.routed import context_of
    from bt_ray.rollout.render import ContextCheck

    place = functools.partial(context_of, ctx.config, ctx.base)
    return ContextCheck(ctx.spec, teacher.rows, place, ctx.config.rollout.max_tokens, examples)


# What a greedy row follows from, beside its candidate and its example.
GREEDY = ("program", "metric", "adapter", "max_tokens", "constrain", "timeout_s", "threshold", "weights", "examples")


def earlier_rows(step: Step, train: str | None = None) -> tuple[str, ...]:
    """Folders of rows of the committed searches of this run over the same examples with the same weights.

    `train`: hash of the training examples; then the folders of the rows on these, of searches that had the same.
    """
    found = []
    for record in sorted(step.folder.parent.glob(f"{step.key.kind}-*/record.json")):
        begun = first_attempt(record.parent)
        if train not in (None, begun.get(TRAIN)):
            continue
        if all(begun["inputs"].get(name) == step.key.inputs[name] for name in GREEDY):
            rows = record.parent / "rows"
            found.append(str(rows if train is None else rows / "train"))
    return tuple(found)


def num_scored(step: Step, candidate: Candidate) -> int:
    """Search examples that the candidate has a row of, from this search or one whose rows it may use."""
    from bt_ray.rollout.rows import read_rows

    own = read_rows(step.rows / candidate_id(candidate)).values()
    lent = [row for folder in earlier_rows(step) for row in read_rows(Path(folder) / candidate_id(candidate)).values()]
    return len({row["example_id"] for row in [*own, *(row for row in lent if not row["error"])]})  # an error is run again


class _Parts:
    """What a search runs on: candidates on `search` and on training examples, and the proposer; and what it pays from."""

    def __init__(self, allowance: Allowance, step: Step, weights: Weights, asked: AskedLM) -> None:
        from bt_ray.lm.journal import JournalPool

        ctx, step_config = allowance.ctx, allowance.step
        self._ctx, self._step_config, self._weights, self._asked = ctx, step_config, weights, asked
        self._train, self._search = examples_of(ctx, step_config, "train"), examples_of(ctx, step_config, "search")
        self.purse = Purse(replace(allowance, spent=self.num_calls))
        self.scored = self._evaluator(self._search, step.rows, earlier_rows(step))
        lent = earlier_rows(step, split_hash(self._train))
        # These rows are read by an optimiser that reflects on them.
        self.trained = replace(self._evaluator(self._train, step.rows / "train", lent), by_predictor=True)
        self.proposals = JournalPool(asked.pool, step.folder / PROPOSALS, self.purse.paying)
        self.compiles = JournalPool(ctx.pool, step.folder / COMPILES, self.purse.paying)

    def context(self, prompts: tuple[Candidate, Candidate], teacher: Rollouts) -> Any:
        """What the searcher may look at."""
        from bt_ray.search.base import SearchContext

        ctx, seed = self._ctx, derive_seed(self._ctx.config.seed, "search", list(self._ctx.node.steps))
        return SearchContext(
            step=self._step_config,
            student=prompts[0],
            incoming=prompts[1],
            rollouts=teacher.rows,
            examples=self._train,
            labelled=ctx.labelled_outputs(),
            signatures=ctx.identity["signatures"],
            field_notes=ctx.identity.get("field_notes", {}),
            seed=seed,
            ask=self._ask(seed),
            run_rows=self.train_rows,
            program_code=ctx.identity["code"],
            search_ids=tuple(row["id"] for row in self._search),
            compile=functools.partial(self._session(seed).compile, prompts[0], self._train, self._search),
        )

    def train_rows(self, candidate: Candidate, example_ids: Sequence[str]) -> list[Row]:
        """Rows of a candidate on training examples. Raises BudgetError before the first where it does not pay for all."""
        missing = self.trained.lacking(candidate, example_ids)
        with self.purse.paying(self.purse.for_runs(len(missing))):
            return self.trained.run(candidate, example_ids)

    def result(self, found: Any) -> dict[str, Any]:
        """What the record keeps of a search. No times: they differ from run to run."""
        from bt_ray.rollout.evaluator import row_score

        trials = [{name: value for name, value in trial.items() if name != "seconds"} for trial in found.trials]
        scores = {row["example_id"]: row_score(row) for row in self.scored.rows_of(found.best).values()}
        errors = sum(1 for row in self.scored.all_rows() if row["error"])
        return {
            "best": found.best, "label": found.label, "score": found.score, "trials": trials, "notes": found.notes,
            "scores": scores, "errors": errors, "lineage": found.lineage,
        }  # fmt: skip

    def cost(self, seconds: float) -> Cost:
        """Calls of the program, in scoring and on training examples, of the proposer and of a compile."""
        answers = [*self.proposals.answers(), *self.compiles.answers()]
        asked = Cost(
            lm_calls=len(answers),
            prompt_tokens=sum(answer.extra.get("prompt_tokens", len(answer.prompt_token_ids)) for answer in answers),
            completion_tokens=sum(answer.extra.get("completion_tokens", len(answer.token_ids)) for answer in answers),
        )
        return asked + cost_of([*self.scored.all_rows(), *self.trained.all_rows()], seconds)

    def num_calls(self) -> int:
        """LM calls of the search so far."""
        return self.cost(0.0).lm_calls

    def _evaluator(self, examples: list[Row], folder: Path, known: tuple[str, ...]) -> Any:
        from bt_ray.rollout.evaluator import RowEvaluator

        return RowEvaluator(
            workers=tuple(self._ctx.workers),
            examples={row["id"]: row for row in examples},
            weights=self._weights,
            max_tokens=self._ctx.config.rollout.max_tokens,
            rows_dir=str(folder),
            known=known,
            timeout_s=self._ctx.config.rollout.timeout_s,
        )

    def _session(self, seed: int) -> Any:
        from bt_ray.rollout.session import ProgramSession

        rollout = self._ctx.config.rollout
        return ProgramSession(
            spec=self._ctx.spec,
            pool=self.compiles,
            weights=self._weights,
            max_tokens=rollout.max_tokens,
            proposer_max_tokens=self._step_config.proposer_max_tokens,
            seed=derive_seed(seed, "compile"),
            num_threads=rollout.concurrency,
            proposer=(self.proposals, self._asked.weights) if self._step_config.proposer else None,
        )

    def _ask(self, seed: int) -> Any:
        from bt_ray.search.proposer import Proposer

        return Proposer(self.proposals, self._asked.weights, self._step_config, seed)
