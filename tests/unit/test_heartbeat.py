"""A worker that gives no sign of life is ended from outside, and a busy one is let be; workers that are no processes."""

import asyncio
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from bt_ray.rollout import dispatch, heartbeat, pipeline
from bt_ray.rollout.dispatch import Dispatcher
from bt_ray.rollout.heartbeat import LOOKS_PER_LIMIT, silence_limit_s
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.rollout.tasks import RolloutPlan
from bt_ray.rollout.watchdog import GRACE_S, LAST_RESORT
from tests.unit.test_dispatch import BASE, row, tasks

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 0.2


class Worker:
    """Is suspended by the examples of `stops`, as often as they say, and before those of `early` begin alone; nothing in it goes
    on until it is killed. `after_kill`: what becomes of it then."""

    def __init__(self, name, stops=(), early=(), after_kill="restarts"):
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.stops, self.early, self.after_kill = Counter(stops), list(early), after_kill
        self.alone, self.kills, self.waiting = [], [], []
        self.suspended = False
        self.run, self.ready = SimpleNamespace(remote=self._run), SimpleNamespace(remote=self._ready)

    async def _goes_on(self):
        await asyncio.sleep(0.001)
        if self.suspended:
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]

    async def _ready(self):
        await self._goes_on()
        return True

    async def works(self):
        await self._goes_on()

    async def _run(self, batch):
        name = batch.tasks[0].key[0]
        if batch.alone and name in self.early:
            self.early.remove(name)
            self.suspended = True
        await self._goes_on()
        if batch.alone:
            self.alone.append(name)
            batch.mark.touch()
        segment = SegmentWriter(batch.segment)
        for task in batch.tasks:
            self.suspended |= self.stops[task.key[0]] > 0
            self.stops[task.key[0]] -= 1
            await self.works()
            segment.write(row(*task.key))
        batch.mark.unlink(missing_ok=True)

    def kill(self, no_restart):
        self.kills.append(no_restart)
        if self.after_kill == "nothing":
            return
        self.suspended = False
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None) if self.after_kill == "wakes" else one.set_exception(RayActorError())


@pytest.fixture(autouse=True)
def cancelled(monkeypatch):
    """What was given up; `ray` without a cluster."""
    given_up = []
    monkeypatch.setattr("ray.cancel", given_up.append)
    monkeypatch.setattr("ray.kill", lambda worker, no_restart: worker.kill(no_restart))
    return given_up


def run(folder, workers, count=8):
    """Kinds of the rows' errors by example; none of them may be there twice."""
    asyncio.run(asyncio.wait_for(Dispatcher(workers, str(folder), LIMIT_S).run(tasks(count), chunk_size=4), 60.0))
    rows = read_rows(folder)
    assert sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl")) == len(rows) == count
    return {one["example_id"]: (one["error"] or {}).get("kind") for one in rows.values()}


def test_a_suspended_worker_is_ended_and_what_it_had_written_is_kept(tmp_path, cancelled):
    workers = [Worker("one", {"e2": 1}), Worker("two")]
    assert set(run(tmp_path, workers, 16).values()) == {None}
    assert set(workers[0].kills) == {False} and workers[1].kills == [] and cancelled == []


def assert_let_be(tmp_path, worker, num_tasks):
    """All rows come, and nobody is ended."""
    assert set(run(tmp_path, [worker], num_tasks).values()) == {None}
    assert worker.kills == []


def test_a_worker_that_is_busy_is_let_be(tmp_path):
    class Busy(Worker):
        async def works(self):
            await asyncio.sleep(2 * LIMIT_S)

    assert_let_be(tmp_path, Busy("one"), 2)


def test_a_dispatcher_that_was_suspended_itself_blames_nobody(tmp_path):
    class Asked(Worker):
        async def _ready(self):
            time.sleep(2 * LIMIT_S)  # the loop of this test is the dispatcher's too
            await asyncio.sleep(LIMIT_S / 20)

        async def works(self):
            await asyncio.sleep(3 * LIMIT_S)

    assert_let_be(tmp_path, Asked("one"), 1)


def test_a_row_that_suspends_its_worker_each_time_is_to_blame(tmp_path):
    worker = Worker("one", {"e2": 99})
    assert run(tmp_path, [worker]) == {f"e{number}": "crash" if number == 2 else None for number in range(8)}
    assert worker.alone.count("e2") == dispatch.DEATHS_ALONE


def test_a_row_whose_worker_was_suspended_before_it_began_is_not(tmp_path):
    worker = Worker("one", {"e1": 2}, early=["e1"] * 3)
    assert set(run(tmp_path, [worker]).values()) == {None}
    assert worker.early == [] and worker.alone.count("e1") == 1


def test_a_worker_whose_end_is_not_heard_of_is_not_waited_for(tmp_path, monkeypatch, cancelled):
    monkeypatch.setattr(heartbeat, "END_TIMEOUT_S", 0.1)
    monkeypatch.setattr(dispatch, "RESTART_TIMEOUT_S", 0.1)
    workers = [Worker("one", {"e2": 1}, after_kill="nothing"), Worker("two")]
    assert set(run(tmp_path, workers, 16).values()) == {None}
    assert workers[0].suspended and cancelled


def test_one_that_wakes_up_as_it_is_to_be_ended_has_done_its_work(tmp_path):
    worker = Worker("one", {"e2": 1}, after_kill="wakes")
    assert set(run(tmp_path, [worker]).values()) == {None}
    assert worker.kills and worker.alone == []


@pytest.mark.parametrize("timeout_s", [0.1, 120.0, 3600.0])
def test_the_watchdog_inside_comes_first(timeout_s):
    observed = silence_limit_s(timeout_s) * (LOOKS_PER_LIMIT - 1) / LOOKS_PER_LIMIT  # where one look was late
    assert observed > LAST_RESORT * (timeout_s + GRACE_S)


def test_the_limit_follows_from_the_time_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "end_with_parent", lambda: None)  # that is for a process of its own
    plan = RolloutPlan("", str(tmp_path / "data"), {"predictors": {}}, BASE, 1.0, 9, 3, timeout_s=7.0)
    assert pipeline.RolloutProxy(plan, [])._dispatcher.silence_s == silence_limit_s(7.0)


def test_a_small_step_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "silence_limit_s", lambda timeout_s: {7.0: LIMIT_S}[timeout_s])
    worker = Worker("one", {"e0": 1})
    assert len(pipeline.run_direct(tasks(1), [worker], str(tmp_path), 7.0)) == 1
    assert worker.kills
