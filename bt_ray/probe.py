"""A few training examples on one engine in this process: what `bt-ray plan` measures and `bt-ray doctor` judges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from bt_ray.lm.types import Weights
from bt_ray.preflight import Prepared
from bt_ray.report.estimate import Probe, probe_of
from bt_ray.report.probes import keep_probe

NUM_PROBES = 16  # training examples that are run

Row = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """A started engine that answers with the base model."""

    pool: Any  # LocalPool, or one for each model
    base: Weights
    start_s: float


@asynccontextmanager
async def engine_for(prepared: Prepared) -> AsyncIterator[Engine]:
    """An engine with the run's base model, for as long as the block lasts. Raises what its start raises."""
    from bt_ray.lm.local import LocalPool
    from bt_ray.lm.routed import pools_of

    base = Weights.from_json(prepared.identity["weights"])
    pool = pools_of(prepared.config, lambda _, engine: LocalPool(engine))
    started = time.monotonic()
    try:
        await pool.ensure(base)
        yield Engine(pool, base, time.monotonic() - started)
    finally:
        await pool.close()


async def run_probe(prepared: Prepared, engine: Engine) -> list[Row]:
    """Rows of the program as written, sampled as rollouts are, on NUM_PROBES examples spread over train."""
    from bt_ray.rollout.program import spec_of
    from bt_ray.rollout.runner import ProgramRunner
    from bt_ray.rollout.tasks import RolloutTask

    config, train = prepared.config, prepared.splits["train"]
    chosen = train[:: max(1, len(train) // NUM_PROBES)][:NUM_PROBES]
    runner = ProgramRunner(spec_of(config, prepared.identity.get("pickle_path")), engine.pool)
    draw = (config.rollout.temperature, config.rollout.max_tokens, config.seed)
    tasks = [RolloutTask(example, 0, prepared.identity["vanilla"], engine.base, *draw) for example in chosen]
    return list(await asyncio.gather(*(runner.run(task) for task in tasks)))


def measure(prepared: Prepared) -> Probe | None:
    """What the rows of a probe cost; None where they made no LM call. Kept, for the plan of a run of the same."""
    probe = asyncio.run(_measure(prepared))
    if probe:
        keep_probe(prepared.config, prepared.identity, probe)
    return probe


async def _measure(prepared: Prepared) -> Probe | None:
    async with engine_for(prepared) as engine:
        started = time.monotonic()
        rows = await run_probe(prepared, engine)
        seconds = time.monotonic() - started
    return probe_of(rows, demo_tokens(prepared, rows), seconds, engine.start_s)


def demo_tokens(prepared: Prepared, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens that one demo adds to a prompt, the mean over the calls of `rows` whose answers parsed; None without one."""
    from bt_ray.lm.adapter import make_adapter
    from bt_ray.lm.tokenize import ChatTokenizer
    from bt_ray.rollout.program import load_program, predictor_signatures, spec_of

    spec = spec_of(prepared.config, prepared.identity.get("pickle_path"))
    adapter, signatures = make_adapter(spec.adapter, spec.constrain), predictor_signatures(load_program(spec))
    tokenizer = ChatTokenizer(prepared.identity["weights"]["model_dir"])
    added = []
    for call in (call for row in rows for call in row["calls"] if call["outputs"] is not None):
        signature, demo = signatures[call["predictor"]], {**call["inputs"], **call["outputs"]}
        bare, shown = (tokenizer.count(adapter.format(signature, demos, call["inputs"])) for demos in ([], [demo]))
        added.append(shown - bare)
    return sum(added) / len(added) if added else None
