from __future__ import annotations

import asyncio
import random

import pytest

from bt_ray.lm.gate import WeightsGate
from bt_ray.lm.types import Weights


def weights(name: str) -> Weights:
    return Weights(name, "base", name, name)


class Bench:
    """A gate around a pretended engine that knows what it holds and who is inside."""

    def __init__(self, tenure_s: float = 0.0) -> None:
        self.held: str | None = None
        self.inside = 0
        self.switches: list[str] = []
        self.order: list[str] = []
        self.now_s = 0.0
        self.fail: set[str] = set()
        self.hold_switch: asyncio.Event | None = None
        self.gate = WeightsGate(self._switch, tenure_s=tenure_s, clock=lambda: self.now_s)

    async def _switch(self, wanted: Weights) -> None:
        assert self.inside == 0, "switched while a call was inside"
        self.held = None
        await asyncio.sleep(0)
        if self.hold_switch:
            await self.hold_switch.wait()
        if wanted.id in self.fail:
            raise ValueError(wanted.id)
        self.held = wanted.id
        self.switches.append(wanted.id)

    async def call(self, name: str, turns: int = 1, until: asyncio.Event | None = None) -> None:
        async with self.gate.use(weights(name)):
            self.inside += 1
            self.order.append(name)
            try:
                for _ in range(turns):
                    assert self.held == name, "answered with other weights"
                    await asyncio.sleep(0)
                if until:
                    await until.wait()
            finally:
                self.inside -= 1


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_calls_for_the_same_weights_run_together_after_one_switch() -> None:
    bench, go = Bench(), asyncio.Event()
    calls = [asyncio.create_task(bench.call("a", until=go)) for _ in range(5)]
    await settle()
    assert bench.inside == 5 and bench.switches == ["a"] and bench.gate.holds == "a"
    go.set()
    await asyncio.gather(*calls)


async def test_switch_waits_until_all_have_left() -> None:
    bench, go = Bench(), asyncio.Event()
    first = asyncio.create_task(bench.call("a", until=go))
    await settle()
    other = asyncio.create_task(bench.call("b"))
    await settle()
    assert bench.switches == ["a"]
    go.set()
    await asyncio.gather(first, other)
    assert bench.switches == ["a", "b"]


async def test_a_stream_of_calls_does_not_starve_other_weights() -> None:
    bench, go = Bench(), asyncio.Event()
    calls = [asyncio.create_task(bench.call("a", until=go))]
    await settle()
    calls += [asyncio.create_task(bench.call("b")), asyncio.create_task(bench.call("a")), asyncio.create_task(bench.call("a"))]
    await settle()
    go.set()
    await asyncio.gather(*calls)
    assert bench.order == ["a", "b", "a", "a"] and bench.switches == ["a", "b", "a"]


async def test_present_weights_may_still_join_for_their_tenure() -> None:
    bench, go = Bench(tenure_s=10.0), asyncio.Event()
    calls = [asyncio.create_task(bench.call("a", until=go))]
    await settle()
    calls.append(asyncio.create_task(bench.call("b")))
    await settle()
    bench.now_s = 9.0
    calls.append(asyncio.create_task(bench.call("a", until=go)))
    await settle()
    assert bench.inside == 2
    bench.now_s = 11.0
    calls.append(asyncio.create_task(bench.call("a")))
    await settle()
    assert bench.inside == 2
    go.set()
    await asyncio.gather(*calls)
    assert bench.switches == ["a", "b", "a"]


async def test_failed_switch_reaches_all_who_asked_and_nobody_else() -> None:
    bench = Bench()
    bench.fail = {"bad"}
    results = await asyncio.gather(bench.call("bad"), bench.call("bad"), bench.call("good"), return_exceptions=True)
    assert [type(r) for r in results] == [ValueError, ValueError, type(None)]
    bench.fail = set()
    await bench.call("bad")  # the gate held nothing of it: it switches again
    assert bench.switches == ["good", "bad"]


async def test_forgotten_weights_are_loaded_again() -> None:
    bench = Bench()
    await bench.call("a")
    bench.gate.forget()
    await bench.call("a")
    assert bench.switches == ["a", "a"]


async def test_cancelling_the_caller_leaves_the_switch_to_the_others() -> None:
    bench = Bench()
    bench.hold_switch = asyncio.Event()
    first, second = asyncio.create_task(bench.call("a")), asyncio.create_task(bench.call("a"))
    await settle()
    first.cancel()
    await settle()
    bench.hold_switch.set()
    await second
    assert bench.switches == ["a"] and bench.gate.inside == 0
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize("seed", range(20))
async def test_any_order_of_calls_and_cancellations_ends_with_right_answers(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(tenure_s=draw.choice([0.0, 3.0]))
    bench.fail = {"d"}
    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(bench.call(draw.choice("abcd"), turns=draw.randint(1, 4))))
        bench.now_s += draw.random()
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
        if draw.random() < 0.5:
            await asyncio.sleep(0)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert not [r for r in results if isinstance(r, BaseException) and not isinstance(r, (ValueError, asyncio.CancelledError))]
    assert bench.gate.inside == 0
    await bench.call("a")  # and the gate still works
