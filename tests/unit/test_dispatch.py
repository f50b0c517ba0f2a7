"""Which rows a worker dies of, with workers that are no processes."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from bt_ray.errors import PoolError
from bt_ray.lm.types import Weights
from bt_ray.rollout import dispatch
from bt_ray.rollout.dispatch import Dispatcher
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.rollout.tasks import RolloutTask

BASE = Weights(id="base0000", kind="base", model_dir="/none", base_dir="/none")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """A batch that is given up is cancelled in Ray, which would start a cluster for that."""
    monkeypatch.setattr("ray.cancel", lambda reference: None)


class Worker:
    """Dies of the examples in `deadly`, taking along what it holds at that time, and once more from outside for each in `unlucky`;
    for each in `waiting` it dies before that example has its turn."""

    def __init__(self, name, deadly=(), unlucky=(), waiting=()):
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.deadly, self.unlucky, self.waiting = set(deadly), list(unlucky), list(waiting)
        self.alone = []
        self.run, self.ready = SimpleNamespace(remote=self._run), SimpleNamespace(remote=self._ready)

    async def _ready(self):
        return True

    async def _run(self, batch):
        await asyncio.sleep(0)
        names = [task.key[0] for task in batch.tasks]
        if batch.alone:
            self.alone.extend(names)
            if names[0] in self.waiting:
                self.waiting.remove(names[0])
                raise RayActorError
            batch.mark.touch()
        for name in names:
            if name in self.unlucky:
                self.unlucky.remove(name)
                raise RayActorError
        if self.deadly & set(names):
            raise RayActorError
        rows = [row(*task.key) for task in batch.tasks]
        segment = SegmentWriter(batch.segment)
        for one in rows:
            segment.write(one)
        segment.close()
        if batch.alone:
            batch.mark.unlink()


def row(example_id, sample):
    return {"example_id": example_id, "sample": sample, "accept": True, "error": None}


def tasks(count):
    candidate = {"predictors": {}}
    return [RolloutTask({"id": f"e{number}", "inputs": {}}, 0, candidate, BASE, 0.0, 8, 0) for number in range(count)]


def run(folder, workers, count):
    asyncio.run(Dispatcher(workers, str(folder), silence_s=60.0).run(tasks(count), chunk_size=4))
    return {one["example_id"]: (one["error"] or {}).get("kind") for one in read_rows(folder).values()}


def test_one_row_is_found_among_those_that_died_with_it(tmp_path):
    worker = Worker("one", deadly=["e2"])
    assert run(tmp_path, [worker], 8) == {f"e{number}": "crash" if number == 2 else None for number in range(8)}
    assert worker.alone.count("e2") == dispatch.DEATHS_ALONE


def test_a_worker_that_dies_of_something_else_costs_no_row(tmp_path):
    worker = Worker("one", unlucky=["e1", "e1", "e1"])  # with others, by itself, and while it ran alone
    assert set(run(tmp_path, [worker], 8).values()) == {None}
    assert worker.alone.count("e1") == 2


def test_a_worker_that_dies_while_a_row_waits_for_its_turn_is_not_that_rows_fault(tmp_path):
    worker = Worker("one", unlucky=["e1", "e1"], waiting=["e1"] * 5)
    assert set(run(tmp_path, [worker], 8).values()) == {None}
    assert worker.alone.count("e1") == 6
    forever = Worker("two", unlucky=["e1", "e1"], waiting=["e1"] * 99)
    with pytest.raises(PoolError, match="died 20 times before example e1 could run"):
        run(tmp_path / "second", [forever], 8)


def test_rows_that_all_end_their_workers_are_no_fault_of_the_rows(tmp_path):
    workers = [Worker(name, deadly=[f"e{number}" for number in range(8)]) for name in ("one", "two")]
    with pytest.raises(PoolError, match="died while each of the examples e"):
        run(tmp_path, workers, 8)
    assert len(read_rows(tmp_path)) == dispatch.MAX_CRASHED
