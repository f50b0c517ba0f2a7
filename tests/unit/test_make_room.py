"""When the engines give their devices back for a fine-tune."""

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
    ctx: Any = SimpleNamespace(config=config(**plan), pool=SimpleNamespace(scale=scale))
    steps.make_room(ctx, WeightStep.model_validate({"num_workers": workers, "resources": {"shared": 1}}))
    assert asked == scaled
