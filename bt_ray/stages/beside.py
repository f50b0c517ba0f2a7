"""LMs beside the program's own: a proposer or a teacher, at an endpoint or on engines of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bt_ray.config import EngineConfig, PromptStep
from bt_ray.lm.types import LMPool, Weights
from bt_ray.runs.identity import content_hash
from bt_ray.stages.context import StageContext


@dataclass(frozen=True)
class AskedLM:
    """Who answers, and with which weights."""

    pool: LMPool
    weights: Weights


def other_weights(ctx: StageContext, model: str) -> Weights:
    """Base weights of a model that the config names beside the run's own. ModelError."""
    from bt_ray.lm.models import located, resolve

    return resolve(located(model, ctx.config.base_dir))


@contextmanager
def other_model(ctx: StageContext, model: str, engine: EngineConfig) -> Iterator[tuple[StageContext, Weights]]:
    """This stage with another model on engines of its own, which end with the block. PoolError, ModelError."""
    from bt_ray.lm.pool import deploy

    weights = other_weights(ctx, model)
    # Begins with the run's application, so that the driver finds it where this job dies.
    name = f"{ctx.app_name}-{content_hash([ctx.stage_id, weights.id, engine.model_dump(mode='json')])}"
    pool = deploy(name, engine)
    try:
        with ctx.on_pool(pool) as other:
            yield other, weights
    finally:
        asyncio.run(pool.close())


@contextmanager
def proposer(ctx: StageContext, step: PromptStep, incoming: Weights) -> Iterator[AskedLM]:
    """The LM that writes a step's instructions, for as long as the block lasts."""
    from bt_ray.lm.endpoint import EndpointPool, endpoint_weights

    named = step.proposer
    if named is None:
        yield AskedLM(ctx.pool, incoming.part_for(""))
    elif named.engine is None:
        yield AskedLM(EndpointPool(named, ctx.config.base_dir), endpoint_weights(named))
    else:
        with other_model(ctx, named.model, named.engine) as (other, weights):
            other.ensure(weights)
            yield AskedLM(other.pool, weights)


def proposer_key(ctx: StageContext, step: PromptStep) -> dict[str, str]:
    """What of a proposer the step's own settings do not say: the content of its weights."""
    named = step.proposer
    return {"proposer": other_weights(ctx, named.model).id} if named is not None and named.engine is not None else {}
