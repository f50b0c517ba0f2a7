"""What gives its place back for a fine-tune: engines their devices, program workers their CPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.config import WeightStep
from bt_ray.stages import steps
from tests.support.plans import config

TWO_MODELS = {"models": {"small": {"model": "a/b"}}, "assign": {"one": "small"}}


@pytest.mark.parametrize(
    ("plan", "gpus", "workers", "scaled"),
    [
        ({}, 0, 1, []),  # on a CPU they stay warm
        ({"engine": {"replicas": {"min": 0, "max": 3}}}, 0, 1, [0]),
        ({}, 2, 1, []),
        ({}, 1, 1, [0]),
        ({}, 2, 2, [0]),
        (TWO_MODELS, 2, 1, [0]),  # an engine of each model holds a GPU
        (TWO_MODELS, 3, 1, []),
        ({"engine": {"resources": {"shared": 1}}}, 0, 1, []),
        ({"engine": {"resources": {"shared": 2}}}, 0, 1, [0]),  # a resource that both name
    ],
)
def test_engines_go_where_training_does_not_fit_beside_them_or_none_is_to_be_held(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], gpus: int, workers: int, scaled: list[int]
) -> None:
    asked: list[int] = []

    async def scale(count: int) -> None:
        asked.append(count)

    monkeypatch.setattr(steps, "reachable", lambda: {"CPU": 64.0, "shared": 2.0, **({"GPU": float(gpus)} if gpus else {})})
    ctx: Any = SimpleNamespace(config=config(**plan), pool=SimpleNamespace(scale=scale), num_workers=4)
    steps.make_room(ctx, WeightStep.model_validate({"num_workers": workers, "resources": {"shared": 1}}))
    assert asked == scaled


@pytest.mark.parametrize(
    ("reach", "engines", "training", "given_back"),
    [
        ({"CPU": 8.0}, 1, 1, []),
        ({"CPU": 5.0}, 1, 2, []),  # 1 + 4 x 0.5 + 2
        ({"CPU": 4.9}, 1, 2, ["workers"]),
        ({"CPU": 4.0}, 2, 2, ["workers"]),
        ({"CPU": 4.0}, 2, 3, ["workers", "engines"]),  # 3 + 4 x 0.5 is too much even without engines
        ({"CPU": 5.0}, 3, 3, ["engines"]),  # 3 + 4 x 0.5 fits once they are gone
        ({"CPU": 4.0, "GPU": 8.0}, 1, 4, []),  # where it trains on GPUs it takes no CPU
    ],
)
def test_cpus_that_a_fine_tune_needs_are_given_back(
    monkeypatch: pytest.MonkeyPatch, reach: dict[str, float], engines: int, training: int, given_back: list[str]
) -> None:
    found: list[str] = []

    async def scale(count: int) -> None:
        found.append("engines")

    monkeypatch.setattr(steps, "reachable", lambda: reach)
    settings = config(engine={"replicas": {"min": engines, "max": engines}})
    ctx: Any = SimpleNamespace(config=settings, pool=SimpleNamespace(scale=scale), num_workers=4)
    ctx.end_workers = lambda: found.append("workers")
    steps.make_room(ctx, WeightStep.model_validate({"num_workers": training, "global_batch_size": 12}))
    assert found == given_back
