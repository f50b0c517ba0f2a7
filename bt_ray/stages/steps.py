"""Rollout, evaluate and finetune steps. Each looks for its record first: committed work is never run again.

The fourth kind, search, is in `searching`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from bt_ray import planning
from bt_ray.config import WeightStep
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import combined, from_record, to_record
from bt_ray.resources import reachable
from bt_ray.rollout.candidates import candidate_id
from bt_ray.rollout.rows import REUSED, StoredRows
from bt_ray.rollout.tasks import Key
from bt_ray.runs.claim import alone, claimed
from bt_ray.runs.commit import Cost, Record, Step
from bt_ray.runs.files import write_atomic
from bt_ray.runs.identity import content_hash, derive_seed, hash_of_items
from bt_ray.stages.context import Candidate, Row, StageContext
from bt_ray.stages.lent import TRAIN, lend_rollouts, lenders, sharing

LARGE_ROWS = 2000  # evaluations above this go through Ray Data too; below, its start costs more than it brings


@dataclass(frozen=True)
class Rollouts:
    """A rollout or evaluate step that has its record, with its rows."""

    record: Record
    rows: Sequence[Row]


def rollout(ctx: StageContext, candidate: Candidate, weights: Weights, train: list[Row]) -> Rollouts:
    """Run the program over these training examples, `samples` times each, through Ray Data.

    Rows that another rollout step of the run has, over other examples of train, are taken over and not run again.
    """
    step, job = _rollout_step(ctx, candidate, weights, train)
    return _run_program(ctx, step, (candidate, weights), job)


def committed_rollout(ctx: StageContext, candidate: Candidate, weights: Weights, train: list[Row]) -> Rollouts | None:
    """The rollouts that `rollout` would give, where they are committed already."""
    step, job = _rollout_step(ctx, candidate, weights, train)
    record = step.record()
    return None if record is None else Rollouts(record, stored_rows(step, job, record.sealed))


def _rollout_step(ctx: StageContext, candidate: Candidate, weights: Weights, train: list[Row]) -> tuple[Step, _Job]:
    config, whole = ctx.config.rollout, ctx.examples("train")
    drawn = split_hash(train)
    key = ctx.key(
        "rollout",
        candidate=candidate_id(candidate),
        weights=weights.id,
        examples=drawn,
        samples=config.samples,
        temperature=config.temperature,
        seed=ctx.config.seed,
    )
    every = drawn if train is whole else split_hash(whole)
    return ctx.step(key), _Job(train, config.samples, config.temperature, large=True, label="rollout", train=every)


def evaluate(ctx: StageContext, candidate: Candidate, weights: Weights, split: str = "select", again: bool = False) -> Rollouts:
    """Greedy run over a split (and the followed train example, which is in no score).

    `again`: a second run of the same, beside the first; batching lets greedy answers differ.
    """
    examples = [*ctx.examples(split), ctx.follow]
    inputs = {"candidate": candidate_id(candidate), "weights": weights.id, "examples": split_hash(examples), "split": split}
    key = ctx.key("evaluate", **inputs, **({"again": True} if again else {}))
    job = _Job(examples, 1, 0.0, large=len(examples) > LARGE_ROWS, label=f"evaluate {split}", unscored=ctx.follow["id"])
    return _run_program(ctx, ctx.step(key), (candidate, weights), job)


@dataclass(frozen=True)
class _Job:
    examples: list[Row]
    samples: int
    temperature: float
    large: bool
    label: str
    unscored: str | None = None  # id of a row that is run but in no score: its error counts for nothing
    train: str | None = None  # hash of all training examples; None: the rows are of no rollout step, and nothing lends them

    @property
    def num_runs(self) -> int:
        return len(self.examples) * self.samples

    def keys(self) -> Iterator[Key]:
        """Of all rows, in the order of the examples."""
        return ((example["id"], sample) for example in self.examples for sample in range(self.samples))


def _run_program(ctx: StageContext, step: Step, what: tuple[Candidate, Weights], job: _Job) -> Rollouts:
    rows: StoredRows | None = None
    with claimed(step) as record:
        if record is None:
            with alone(sharing(step, ctx.run.scratch)) if job.train else nullcontext():
                record, rows = _made(ctx, step, what, job)
    return Rollouts(record, stored_rows(step, job, record.sealed) if rows is None else rows)


def _made(ctx: StageContext, step: Step, what: tuple[Candidate, Weights], job: _Job) -> tuple[Record, StoredRows]:
    started = time.monotonic()
    lent = lend_rollouts(step, job.keys(), job.train) if job.train else 0
    ctx.check_budget(job.num_runs - lent)
    step.begin(**({TRAIN: job.train} if job.train else {}))
    if lent < job.num_runs:
        _run_missing(ctx, step, what, job)
    rows = stored_rows(step, job)
    summary, cost = _summary(rows, job.unscored)
    return step.commit(ctx.stage_id, summary, replace(cost, seconds=round(time.monotonic() - started, 3)), rows.sealed), rows


def _run_missing(ctx: StageContext, step: Step, what: tuple[Candidate, Weights], job: _Job) -> None:
    """Run what the step has no row of."""
    from bt_ray.rollout.pipeline import begin_data, run_rollouts
    from bt_ray.rollout.tasks import write_tasks

    plan = _plan(ctx, step, what, job)
    write_tasks(plan.tasks_path, job.examples, job.samples, plan.group_size)
    ctx.progress(step, job.label, job.num_runs)
    ctx.begin_workers()  # they load the program while the engine takes the weights
    if job.large:
        begin_data()
    ctx.ensure(what[1])
    run_rollouts(plan, ctx.workers, job.large)


def _plan(ctx: StageContext, step: Step, what: tuple[Candidate, Weights], job: _Job) -> Any:
    from bt_ray.rollout.tasks import RolloutPlan

    return RolloutPlan(
        tasks_path=str(ctx.run.scratch / step.key.name / "tasks.parquet"),
        segment_dir=str(step.rows),
        candidate=what[0],
        weights=what[1],
        temperature=job.temperature,
        max_tokens=ctx.config.rollout.max_tokens,
        seed=derive_seed(ctx.config.seed, "rollout"),
        timeout_s=ctx.config.rollout.timeout_s,
        chunk_size=max(1, ctx.config.rollout.concurrency // 2),  # two batches are in flight for each worker
    )


def stored_rows(step: Step, job: _Job, sealed: Mapping[str, Sequence[Any]] | None = None) -> StoredRows:
    """Rows in the order of the examples, so that nothing depends on who finished first; they stay on the disk."""
    return StoredRows(step.rows, job.keys(), sealed)


def _summary(rows: Sequence[Row], unscored: str | None) -> tuple[dict[str, Any], Cost]:
    """What later steps may depend on (no times, no order of arrival), and the calls and tokens. Reads the rows once."""
    passed, examples_passed, examples = 0, set(), set()
    kinds: Counter[str] = Counter()
    cost = Cost()

    def digest() -> Iterator[list[Any]]:
        nonlocal passed, cost
        for row in rows:
            examples.add(row["example_id"])
            passed += row["accept"]
            if row["accept"]:
                examples_passed.add(row["example_id"])
            if row["error"] and row["example_id"] != unscored:
                kinds[row["error"]["kind"]] += 1
            cost += cost_of([row], 0.0)
            tokens = [call["token_ids"] for call in row["calls"]]
            yield [row["example_id"], row["sample"], row["score"], row["accept"], tokens]

    rows_hash = hash_of_items(digest())
    summary = {
        "rows": len(rows),
        "passed": passed,
        "examples_passed": len(examples_passed),
        "examples": len(examples),
        "errors": dict(sorted(kinds.items())),
        "rows_hash": rows_hash,
    }
    return summary, cost


def cost_of(rows: Iterable[Row], seconds: float) -> Cost:
    """LM calls and tokens of rows that no earlier step paid for, with the step's seconds."""
    cost = Cost(seconds=round(seconds, 3))
    for row in rows:
        for call in () if row.get(REUSED) else row["calls"]:
            cost += Cost(1, len(call["prompt_token_ids"]), len(call["token_ids"]))
    return cost


def scores(ctx: StageContext, found: Rollouts) -> dict[str, float | None]:
    """Score per example of an evaluation; a failing program scores 0; where the metric failed or the process died there is none."""
    from bt_ray.rollout.evaluator import row_score

    return {row["example_id"]: row_score(row) for row in found.rows if row["example_id"] != ctx.follow["id"]}


def taken_over(ctx: StageContext, record: Record) -> str:
    """For a stage's note: rollouts of its step that other steps paid for. Empty where there are none."""
    found = lenders(ctx.run.step(record.name))
    return f"; {found.total()} of them were run by {', '.join(found)}" if found else ""


def pass_counts(record: Record) -> dict[str, int]:
    """Pass counts of a rollout step, in the report's words."""
    result = record.result
    counts = {"examples": result["examples"], "rollouts": result["rows"]}
    return {**counts, "passed": result["passed"], "examples_passed": result["examples_passed"]}


def finetune_parts(ctx: StageContext, step_config: WeightStep, rows: list[Row], start: Weights) -> tuple[list[Record], Weights]:
    """Fine-tune each model on the rows of its own predictors; one without rows keeps the weights that it has."""
    if not start.parts:
        record, weights = finetune(ctx, step_config, rows, start)
        return [record], weights
    records, tuned = [], {}
    for part in dict.fromkeys(part for _, part in start.parts):
        tuned[part] = part
        if own := [row for row in rows if start.part_for(row["predictor"]) == part]:
            record, weights = finetune(ctx, step_config, own, part)
            records.append(record)
            tuned[part] = replace(weights, model=part.model)
    return records, combined([(glob, tuned[part]) for glob, part in start.parts])


def finetune(ctx: StageContext, step_config: WeightStep, rows: list[Row], start: Weights) -> tuple[Record, Weights]:
    """Fine-tune on chat rows; the record holds the new weights, whose files it vouches for."""
    from bt_ray.training.run import TrainJob, train

    base = next((part for _, part in ctx.base.parts if part.model == start.model), ctx.base)
    init = base if step_config.init == "base" else start
    key = ctx.key(
        "finetune",
        step=step_config.model_dump(mode="json", exclude={"max_failures", "preset", "resources"}),
        rows=content_hash(rows),
        start=init.id,
        model=base.id,
        seed=ctx.config.seed,
    )
    step = ctx.step(key)
    with claimed(step) as record:
        if record is None:
            ctx.check_budget()
            step.begin()
            ctx.progress(step, "finetune", 0, f"{len(rows)} rows, {step_config.epochs} epochs")
            rows_path = step.files / "rows.jsonl"
            write_atomic(rows_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            job = TrainJob(
                rows_path=str(rows_path),
                start=init,
                step=step_config.model_dump(mode="json"),
                out_dir=str(step.files),
                scratch_dir=str(ctx.run.scratch / "train"),
                name=key.name,
                seed=derive_seed(ctx.config.seed, "finetune") % 2**31,
                max_length=step_config.max_length or ctx.config.engines()[start.model].max_model_len,
            )
            make_room(ctx, step_config)
            done = train(job)
            result = {
                "weights": to_record(done.weights, step.files, base, ctx.run.root),
                "rows": len(rows),
                "history": done.history,
            }
            result["counts"] = done.counts
            record = step.commit(ctx.stage_id, result, Cost(train_tokens=done.trained_tokens, seconds=round(done.seconds, 3)))
    return record, from_record(record.result["weights"], step.folder / f"files-{record.attempt:04d}", base, ctx.run.root)


def make_room(ctx: StageContext, step_config: WeightStep) -> None:
    """Give back what is in the way of a fine-tune: program workers, which the next step starts again, and the engines'
    devices, which `ensure` takes again."""
    reach = reachable()
    if planning.workers_in_the_way(ctx.config, step_config, reach, ctx.num_workers):
        ctx.end_workers()
    if planning.engines_in_the_way(ctx.config, step_config, reach):
        asyncio.run(ctx.pool.scale(0))


def split_hash(examples: list[Row]) -> str:
    return content_hash(examples)
