"""The Serve pool with a stub engine: what it promises whatever engine is inside."""

from __future__ import annotations

import asyncio
import pickle
import time
from pathlib import Path

import pytest

from bt_ray.config import EngineConfig
from bt_ray.errors import CanaryError, PoolError, PromptTooLongError
from bt_ray.lm import lease, serve_app
from bt_ray.lm.pool import ServePool, deploy
from bt_ray.lm.types import LMAnswer, LMCall, Sampling, Weights

STUB = "tests.support.stub_engine:StubEngine"
CONFIG = EngineConfig.model_validate({"num_cpus": 0.5, "stall_timeout_s": 1.0})


def weights(name: str, log: str = "", **changes: str) -> Weights:
    return Weights(**{"id": name, "kind": "base", "model_dir": "m", "base_dir": log, "embedding_id": "e", **changes})  # type: ignore[arg-type]


def call(wanted: Weights, content: str = "hello") -> LMCall:
    return LMCall(wanted, Sampling(), ({"role": "user", "content": content},))


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> ServePool:
    return deploy("stub", CONFIG, engine_factory=STUB, start_timeout_s=60)


def test_answers_with_the_weights_of_each_call(pool: ServePool) -> None:
    async def many() -> list[LMAnswer]:
        return await asyncio.gather(*(pool.generate(call(weights("ab"[n % 2]), str(n))) for n in range(20)))

    answers = asyncio.run(many())
    assert [(a.weights_id, a.text) for a in answers] == [("ab"[n % 2], f"{'ab'[n % 2]}: {n}") for n in range(20)]


def test_engines_that_no_node_has_room_for_are_not_waited_for(ray_cluster: None) -> None:
    """The cluster has four CPUs: of five engines that take one each, and a half that others hold, not all ever run."""
    config = EngineConfig.model_validate({"num_cpus": 1.0, "replicas": {"min": 5, "max": 5}})
    crowded = deploy("crowded", config, engine_factory=STUB, start_timeout_s=60)
    try:
        asyncio.run(crowded.scale(0))
        asyncio.run(crowded.ensure(weights("a")))
        assert asyncio.run(crowded.generate(call(weights("a"), "hi"))).text == "a: hi"
        assert serve_app.replica_states("crowded")["RUNNING"] < 5
    finally:
        asyncio.run(crowded.close())


def test_client_travels_by_pickle_and_deploy_finds_what_runs(pool: ServePool) -> None:
    before = asyncio.run(pool.pid())
    assert asyncio.run(pickle.loads(pickle.dumps(pool)).pid()) == before
    assert asyncio.run(deploy("stub", CONFIG, engine_factory=STUB).pid()) == before


def test_errors_of_a_row_come_back_as_themselves(pool: ServePool) -> None:
    with pytest.raises(PromptTooLongError, match="99 tokens"):
        asyncio.run(pool.generate(call(weights("a"), "too long")))


def test_failed_canary_is_raised_once_and_the_pool_goes_on(pool: ServePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with pytest.raises(CanaryError):
        asyncio.run(pool.load(weights("wrong", str(log), model_dir="bad")))
    assert log.read_text() == "swap wrong\n"  # no second try
    assert asyncio.run(pool.generate(call(weights("a")))).weights_id == "a"


def test_other_embeddings_start_the_engine_anew(pool: ServePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    asyncio.run(pool.load(weights("a", str(log))))
    log.write_text("")
    asyncio.run(pool.load(weights("b", str(log))))
    asyncio.run(pool.load(weights("full", str(log), embedding_id="other")))
    assert log.read_text().split("\n")[:2] == ["swap b", "start full"]


def test_cancelled_call_is_aborted_in_the_engine(pool: ServePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    async def cancel() -> None:
        task = asyncio.create_task(pool.generate(call(weights("a", str(log)), "sleep 60")))
        await _until(lambda: "sleeping a" in log.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(lambda: "aborted a" in log.read_text())

    asyncio.run(cancel())


@pytest.mark.parametrize("how", ["kill", "die", "hang"])
def test_lost_replica_is_replaced_and_the_call_answered(pool: ServePool, how: str) -> None:
    async def lose() -> None:
        wanted = weights("c")
        before = await pool.pid()
        running = asyncio.create_task(pool.generate(call(wanted, "sleep 3")))
        await asyncio.sleep(0.2)
        if how == "kill":
            import os
            import signal

            os.kill(before, signal.SIGKILL)
        else:
            dying = asyncio.create_task(pool.generate(call(wanted, how)))
            await _until_changed(pool, before)
            dying.cancel()
        answer = await running  # the same call, sent again by the client
        assert answer.text == "c: sleep 3" and answer.extra["pid"] != before

    asyncio.run(lose())


def test_scale_to_zero_and_back(pool: ServePool) -> None:
    asyncio.run(pool.scale(0))
    assert serve_app.replica_states("stub") == {}
    asyncio.run(pool.ensure(weights("a")))
    assert serve_app.replica_states("stub") == {"RUNNING": 1}
    assert asyncio.run(pool.generate(call(weights("a")))).text == "a: hello"


def test_no_replica_for_long_is_a_pool_error(pool: ServePool) -> None:
    asyncio.run(pool.scale(0))
    with pytest.raises(PoolError, match="no replica runs"):
        asyncio.run(ServePool("stub", start_timeout_s=0.5).generate(call(weights("a"))))
    asyncio.run(pool.scale(1))


def test_unknown_application_is_a_pool_error(ray_cluster: None, pool: ServePool) -> None:
    with pytest.raises(PoolError, match="no such application"):
        asyncio.run(ServePool("nobody").generate(call(weights("a"))))


def test_pool_without_renewal_goes_and_others_stay(ray_cluster: None, pool: ServePool) -> None:
    from ray import serve

    short = deploy("short", CONFIG, lease_s=2.0, engine_factory=STUB, start_timeout_s=60)
    for _ in range(15):  # renewed, it outlives its lease
        short.renew()
        time.sleep(0.2)
    assert "short" in serve.status().applications
    asyncio.run(_until(lambda: "short" not in serve.status().applications, 30))
    with pytest.raises(PoolError):
        asyncio.run(ServePool("short", start_timeout_s=0.5).generate(call(weights("a"))))
    assert asyncio.run(pool.generate(call(weights("a")))).text == "a: hello"


def test_close_deletes_only_its_own(ray_cluster: None, pool: ServePool) -> None:
    from ray import serve

    other = deploy("other", CONFIG, engine_factory=STUB, start_timeout_s=60)
    asyncio.run(other.close())
    assert "other" not in serve.status().applications and "stub" in serve.status().applications
    assert lease.read("other") is None


async def _until(true: object, timeout_s: float = 20.0) -> None:
    """Wait until the function gives true; fail after the time."""
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)


async def _until_changed(pool: ServePool, before: int) -> None:
    deadline = time.monotonic() + 30
    while await pool.pid() == before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
