"""What a stage job works with: the run, the pool, program workers, and the stage's own record."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bt_ray import planning
from bt_ray.config import RunConfig
from bt_ray.data import label_fields
from bt_ray.errors import BudgetError
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import from_record, to_record
from bt_ray.node_check import refuse_local_storage
from bt_ray.resources import declare, reachable
from bt_ray.rollout.candidates import candidate_id
from bt_ray.runs.commit import Cost, Record, Step, StepKey, read_record, spent_cost
from bt_ray.runs.files import write_atomic
from bt_ray.runs.identity import content_hash
from bt_ray.runs.run_dir import RunDir
from bt_ray.strategy import StageNode

Candidate = dict[str, Any]
Row = dict[str, Any]
CALLS_MARGIN = 0.1  # share by which the calls of a program's runs may differ from one prompt to another


@dataclass(frozen=True)
class Incoming:
    """What a stage receives from its parent: prompts and weights."""

    candidate: Candidate
    weights: Weights


class StageContext:
    """One stage job's surroundings. Use as a context manager: it ends its program workers."""

    def __init__(self, run: RunDir, stage_id: str, app_name: str):
        self.run = run
        self.stage_id = stage_id
        self.app_name = app_name
        self.header = run.header()
        self.config: RunConfig = run.config()
        declare(self.config.cluster)
        self.identity: dict[str, Any] = self.header["identity"]
        self._closers = ExitStack()
        self._started: list[Any] = []  # program workers, ready or not

    def __enter__(self) -> StageContext:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closers.close()

    @cached_property
    def node(self) -> StageNode:
        return StageNode.of(self.stage_id)

    @property
    def vanilla(self) -> Candidate:
        return self.identity["vanilla"]

    @cached_property
    def base(self) -> Weights:
        return Weights.from_json(self.identity["weights"])

    @cached_property
    def pool(self) -> Any:
        from bt_ray.lm.pool import ServePool, app_of
        from bt_ray.lm.routed import pools_of

        counts = planning.engine_counts(self.config, reachable())
        return pools_of(self.config, lambda name, engine: ServePool(app_of(self.app_name, name), counts[name]))

    def ensure(self, weights: Weights) -> None:
        """An engine answers with these weights and has passed their canary. PoolError, CanaryError."""
        asyncio.run(self.pool.ensure(weights))

    @contextmanager
    def on_pool(self, pool: Any) -> Iterator[StageContext]:
        """This stage over another pool, with program workers of its own that end with the block."""
        other = copy.copy(self)
        for name in ("pool", "workers"):
            other.__dict__.pop(name, None)
        other.__dict__["pool"], other._started = pool, []
        with ExitStack() as other._closers:
            yield other

    def begin_workers(self) -> None:
        """Start the program workers unless they are up; `workers` waits for them."""
        if not self._started:
            from bt_ray.rollout.worker import begin_workers, stop_workers

            count = planning.num_program_workers(self.config, reachable())
            self._started = begin_workers(self.spec, self.pool, count, self.config.rollout.concurrency)
            self._closers.callback(stop_workers, self._started)

    @property
    def num_workers(self) -> int:
        """Program workers that are up, or starting."""
        return len(self._started)

    def end_workers(self) -> None:
        """End the program workers; the next step that needs them starts others."""
        from bt_ray.rollout.worker import stop_workers

        stop_workers(self._started)
        self._started = []
        self.__dict__.pop("workers", None)

    @cached_property
    def workers(self) -> list[Any]:
        """Program workers that have loaded the program, started on first use and kept for the stage's steps."""
        from bt_ray.rollout.worker import await_workers

        self.begin_workers()
        await_workers(self._started, self.spec, self.pool)
        refuse_local_storage(self.run.root)  # nodes that came up for this stage too
        return self._started

    @cached_property
    def spec(self) -> Any:
        from bt_ray.rollout.program import spec_of

        return spec_of(self.config, self.identity.get("pickle_path"))

    def examples(self, split: str) -> list[Row]:
        """The same list each time: a step asks for its splits more than once, and they do not change."""
        if split not in self._examples:
            self._examples[split] = self.run.examples(split)
        return self._examples[split]

    @cached_property
    def _examples(self) -> dict[str, list[Row]]:
        return {}

    @cached_property
    def follow(self) -> Row:
        """The train example that is followed through all stages."""
        return next(row for row in self.examples("train") if row["id"] == self.identity["follow"])

    def labelled_outputs(self) -> dict[str, list[str]]:
        """Predictors whose outputs the examples' labels hold, with those outputs."""
        labels = set(label_fields(self.examples("train")))
        found = {
            name: [output for output in signature["outputs"] if output in labels]
            for name, signature in self.identity["signatures"].items()
        }
        return {name: outputs for name, outputs in found.items() if outputs}

    def incoming(self) -> Incoming:
        """The parent's outcome; for `vanilla` the program as written, on the base model."""
        if self.node.parent is None:
            return Incoming(self.vanilla, self.base)
        record = self.run.stage_record(self.node.parent.id)
        if record is None:
            raise FileNotFoundError(f"stage {self.node.parent.id} has no record in {self.run.root}")
        return Incoming(record["candidate"], self.absolute(record["weights"]))

    def absolute(self, data: dict[str, Any], root: Path | None = None) -> Weights:
        """Weights from JSON of a record, with paths on this machine."""
        return from_record(data, root or self.run.root, self.base)

    def relative(self, weights: Weights, root: Path | None = None) -> dict[str, Any]:
        """Weights as JSON of a record, whose paths start at `root` (the run directory).

        A step's own record starts them at its attempt's files: what it holds must not depend on
        how many attempts it took.
        """
        return to_record(weights, root or self.run.root, self.base)

    def key(self, kind: str, **inputs: Any) -> StepKey:
        """Identity of a step: the program, metric and adapter, and what is named here."""
        common = {name: self.identity[name] for name in ("program", "metric")}
        rollout = self.config.rollout
        common |= {"adapter": self.config.adapter, "max_tokens": rollout.max_tokens, "constrain": rollout.constrain}
        common |= {"timeout_s": rollout.timeout_s, "threshold": rollout.metric_threshold}
        return StepKey(kind, {**common, **inputs})

    def step(self, key: StepKey) -> Step:
        return Step(self.run.root, key)

    def progress(self, step: Step, label: str, total: int, note: str = "") -> None:
        """Tell whoever watches what runs now; `total` rows are to come, 0 where the step has none."""
        rows = str(step.rows.relative_to(self.run.root)) if total else None
        state = {"name": step.key.name, "step": label, "total": total, "rows": rows, "note": note, "since": time.time()}
        write_atomic(self.run.stage(self.stage_id) / "progress.json", json.dumps(state))

    def check_budget(self, num_runs: int = 0) -> None:
        """Raise BudgetError where the steps committed so far have used the budget up, or leave too few calls for so many runs."""
        budget = self.config.budget
        spent = spent_cost(self.run.root)
        if budget.max_lm_calls is not None and spent.lm_calls >= budget.max_lm_calls:
            raise BudgetError(
                f"budget.max_lm_calls {budget.max_lm_calls} is used up ({spent.lm_calls} calls). Raise it and run again."
            )
        if budget.max_lm_calls is not None and num_runs:
            left, needed = budget.max_lm_calls - spent.lm_calls, math.ceil(num_runs * self._calls_per_run())
            if left < (1 - CALLS_MARGIN) * needed:
                raise BudgetError(
                    f"budget.max_lm_calls {budget.max_lm_calls} has {left} calls left, and the next {num_runs} runs of the "
                    f"program take about {needed}. Raise it and run again."
                )
        if budget.max_seconds is not None and spent.seconds >= budget.max_seconds:
            raise BudgetError(
                f"budget.max_seconds {budget.max_seconds:g} is used up ({spent.seconds:.0f} s). Raise it and run again."
            )

    def _calls_per_run(self) -> float:
        """LM calls of one run of the program, as `vanilla` was evaluated; before that one of each predictor."""
        vanilla = self.run.stage_record("vanilla")
        evaluated = read_record(self.run.step(vanilla["evaluate"]), verify_files=False) if vanilla else None
        if evaluated is None:
            return float(len(self.identity["signatures"]))
        return evaluated.cost.lm_calls / (len(self.examples("select")) + 1)  # and the followed training example

    def publish(self, outcome: dict[str, Any], records: list[Record]) -> dict[str, Any]:
        """Write the stage's record: its outcome, the steps that it used, and what it paid for."""
        records = list({record.name: record for record in records}.values())  # two stages may have asked for one evaluation
        own = [record for record in records if record.stage == self.stage_id]
        cost = sum((record.cost for record in own), Cost())
        candidate, weights = outcome.get("candidate"), outcome.get("weights")
        identity = {
            "candidate": candidate_id(candidate) if candidate else None,
            "weights": weights["id"] if weights else None,
            "steps": {record.name: record.result_hash for record in records},
        }
        data = {
            "id": self.stage_id,
            "path": self.node.path,
            **outcome,
            "steps": [record.name for record in records],
            "shared_steps": [record.name for record in records if record.stage != self.stage_id],
            "cost": cost.to_json(),
            "hash": content_hash({"stage": self.stage_id, **identity}),
        }
        write_atomic(
            self.run.stage(self.stage_id) / "record.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        )
        return data
