"""Work that finds no room on the cluster fails in time, with what it waits for: nothing waits for ever, and nobody is pushed out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from bt_ray.config import EngineConfig, PromptStep
from bt_ray.errors import PoolError, TrainingError
from bt_ray.lm.pool import deploy
from bt_ray.lm.types import Weights
from bt_ray.rollout import pipeline, worker
from bt_ray.rollout.worker import start_workers, stop_workers
from bt_ray.search import room
from bt_ray.search.base import SearchContext
from bt_ray.search.experiment import SearchPlan, run_search
from bt_ray.search.racing import StopRule
from bt_ray.training.job import TrainJob
from bt_ray.training.run import train
from tests.ray.test_rollout import SPEC, plan_for
from tests.support import programs
from tests.support.driver_runs import wait_until
from tests.support.stub_pool import StubPool

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]
LIMIT_S = 2.0


@ray.remote
class Neighbour:
    """Somebody else's work on a shared cluster."""

    def ready(self) -> bool:
        return True


@contextmanager
def full(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """All CPUs that are free are another's, who keeps them."""
    seen = deque([-1.0], maxlen=5)

    def settled() -> bool:  # what earlier tests had is given back by and by
        time.sleep(0.5)
        seen.append(ray.available_resources().get("CPU", 0.0))
        return len(set(seen)) == 1

    wait_until(settled, 60.0)
    neighbour = Neighbour.options(num_cpus=seen[-1]).remote()
    assert ray.get(neighbour.ready.remote(), timeout=60)
    for module in (worker, pipeline, room):
        patch.setattr(module, "START_TIMEOUT_S", LIMIT_S)
    yield
    assert ray.get(neighbour.ready.remote(), timeout=60), "it was pushed out"
    ray.kill(neighbour)


def test_program_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        full(monkeypatch),
        pytest.raises(PoolError, match=r"2 program workers did not start within 2 s; each needs 0\.5 logical CPUs"),
    ):
        start_workers(SPEC, StubPool(programs.answer), 2)


def test_processes_of_ray_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = start_workers(SPEC, StubPool(programs.answer), 2)
    said = "1 processes of Ray Data did not start within 2 s; each needs 0.1 logical CPUs"
    try:
        with full(monkeypatch), pytest.raises(PoolError, match=said):
            pipeline.run_rollouts(plan_for(tmp_path, 2), pair, large=True)
    finally:
        stop_workers(pair)


class Never:
    """An evaluator that is not asked."""

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        raise AssertionError("there was room")


def test_candidates_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = {"predictors": {"p": {"instructions": "Do it.", "demos": []}}}
    example = {"id": "e0", "inputs": {"text": "a"}, "labels": {"side": "left"}}
    step = PromptStep.model_validate({"optimizer": "labeled"})
    context = SearchContext(step, student, [example], [], {"p": ["text"]}, {"p": ["side"]}, seed=1)
    said = r"no process for a candidate could start within 2 s; each needs 0\.25 logical CPUs"
    with full(monkeypatch), pytest.raises(PoolError, match=said):
        run_search("labeled", context, Never(), SearchPlan(["e0"], (), StopRule(0.05), 2, str(tmp_path)))


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    with full(monkeypatch), pytest.raises(PoolError, match="within 2 s"):
        deploy("no-room", EngineConfig.model_validate({"num_cpus": 1.0}), start_timeout_s=LIMIT_S)
    serve.delete("no-room")


def test_training_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Weights("0" * 16, "base", str(tmp_path), str(tmp_path))
    job = TrainJob("", base, {"method": "sft"}, str(tmp_path / "out"), str(tmp_path / "scratch"), "room", 0, 128, "cpu")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    with (
        full(monkeypatch),
        pytest.raises(TrainingError, match=r"fine-tune room: .*startup timed out.*insufficient cluster resources"),
    ):
        train(job)


def test_as_many_processes_of_ray_data_as_have_room() -> None:
    assert [pipeline.num_proxies(workers, 8.0) for workers in (1, 2, 3, 64)] == [1, 1, 2, 32]
    assert [pipeline.num_proxies(64, free) for free in (0.0, 0.25, 1.5, 4.0)] == [1, 2, 15, 32]
