from __future__ import annotations

import threading
import time
from collections import Counter

import psutil
import pytest
import ray

from bt_ray.errors import ConfigError, PoolError
from bt_ray.rollout.evaluator import row_score
from bt_ray.rollout.pipeline import BLOCK_BATCHES, run_direct, run_rollouts
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.rows import read_rows
from bt_ray.rollout.tasks import RolloutPlan, write_tasks
from bt_ray.rollout.worker import start_workers, stop_workers
from tests.support import programs
from tests.support.stub_pool import BASE, StubPool

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPEC = ProgramSpec("tests.support.programs:RaisesOnMark", "tests.support.programs:exact", adapter="compact", timeout_s=30.0)
NAMES = ("route", "classify")
CANDIDATE = {"predictors": {name: {"instructions": f"Do {name}.", "demos": []} for name in NAMES}}


def plan_for(folder, count, chunk_size=4, marks=((2, "RAISE my card"),)):
    examples = [programs.example(i, dict(marks).get(i, "")) for i in range(count)]
    write_tasks(str(folder / "tasks.parquet"), examples, samples=2, group_size=2 * chunk_size)
    paths = str(folder / "tasks.parquet"), str(folder / "rows")
    return RolloutPlan(*paths, CANDIDATE, BASE, 1.0, 16, 5, chunk_size, timeout_s=SPEC.timeout_s)


@pytest.fixture
def workers(tmp_path):
    started = []

    def start(pool, count=2, concurrency=8, spec=SPEC):
        started.extend(start_workers(spec, pool, count, concurrency))
        return list(started)

    yield start
    stop_workers(started)


def runs(log):
    """How often the first module was asked, by message."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.split("\t", 1)[1] for line in lines if "department" not in line)


def comparable(rows):
    return {key: {name: value for name, value in row.items() if name != "seconds"} for key, row in rows.items()}


def test_both_paths_give_the_same_rows_and_a_second_run_does_nothing(tmp_path, workers):
    log = tmp_path / "calls.log"
    pair = workers(StubPool(programs.answer, log=str(log)))
    direct, data = plan_for(tmp_path / "direct", 6), plan_for(tmp_path / "data", 6)
    run_rollouts(direct, pair, large=False)
    run_rollouts(data, pair, large=True)
    rows = read_rows(direct.segment_dir)
    assert comparable(rows) == comparable(read_rows(data.segment_dir))
    assert len(rows) == 12
    assert rows["e2", 0]["error"]["kind"] == "program"
    assert all(row["accept"] and len(row["calls"]) == 2 for key, row in rows.items() if key[0] != "e2")
    before = log.read_text()
    run_rollouts(direct, pair, large=False)
    run_rollouts(data, pair, large=True)
    assert log.read_text() == before


@pytest.mark.parametrize("large", [False, True])
def test_a_killed_worker_loses_no_written_row(tmp_path, workers, large):
    log, gate = tmp_path / "calls.log", tmp_path / "gate"
    pair = workers(StubPool(programs.answer, log=str(log), gate=str(gate), free_calls=9), concurrency=2)
    plan = plan_for(tmp_path, 20)
    safe = {}

    def kill_one():
        victim = pair[0]._actor_id.hex()
        path = tmp_path / "rows" / f"{victim}.jsonl"
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        safe.update(read_rows(plan.segment_dir))
        ray.kill(pair[0], no_restart=False)
        gate.touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_rollouts(plan, pair, large=large)
    killer.join()
    rows = read_rows(plan.segment_dir)
    assert 3 <= len(safe) < 40 and len(rows) == 40
    asked = runs(log)
    for key, row in safe.items():
        assert rows[key] == row
        if key[0] != "e2":
            message = repr(f"message: my card {key[0][1:]} is gone")
            # Its two samples ask with the same words; one that was in flight may have asked once more.
            assert asked[message] <= 2 + (1 if (key[0], 1 - key[1]) not in safe else 0)


CRASHING = ProgramSpec(
    "tests.support.programs:CrashesOnMark", "tests.support.programs:crashing_metric", adapter="compact", timeout_s=30.0
)
# Which example ends what, and the kind of error that its rows get.
CRASHES = {"e2": ("CRASH", "crash"), "e4": ("SEGFAULT", "crash"), "e5": ("EXIT", "metric")}


def test_a_row_that_ends_its_process_costs_that_row_alone(tmp_path, workers):
    log = tmp_path / "calls.log"
    pair = workers(StubPool(programs.answer, log=str(log)), spec=CRASHING)
    plan = plan_for(tmp_path, 7, marks=[(int(name[1:]), f"{mark} my card") for name, (mark, _) in CRASHES.items()])
    run_rollouts(plan, pair, large=True)  # two batches at once, in which the others must not be blamed
    rows = read_rows(plan.segment_dir)
    assert len(rows) == 14
    for (example_id, _), row in rows.items():
        _, kind = CRASHES.get(example_id, ("", None))
        assert (row["error"] or {}).get("kind") == kind
        assert row["accept"] == (kind is None) and row_score(row) == (1.0 if kind is None else None)
    assert {key: set(row) for key, row in rows.items()} == {key: set(rows["e0", 0]) for key in rows}
    before = log.read_text()
    run_rollouts(plan, pair, large=False)
    assert log.read_text() == before


BLOCKING = ProgramSpec("tests.support.programs:BlocksOnMark", SPEC.metric, adapter="compact", timeout_s=0.5)


def test_a_row_that_holds_the_loop_is_not_waited_for_for_ever(tmp_path, workers):
    pair = workers(StubPool(programs.answer), spec=BLOCKING)
    plan = plan_for(tmp_path, 4, marks=[(2, "BLOCK my card")])
    run_rollouts(plan, pair, large=False)
    kinds = {key: (row["error"] or {}).get("kind") for key, row in read_rows(plan.segment_dir).items()}
    assert {key for key, kind in kinds.items() if kind == "crash"} == {("e2", 0), ("e2", 1)} and len(kinds) == 8


SUSPENDING = ProgramSpec("tests.support.programs:SuspendsOnMark", SPEC.metric, adapter="compact", timeout_s=30.0)


def is_suspended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def test_a_suspended_worker_is_ended_and_its_rows_run_again(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("bt_ray.rollout.pipeline.silence_limit_s", lambda timeout_s: 3.0)  # else more than a minute
    suspended = tmp_path / "suspended"
    pair = workers(StubPool(programs.answer), spec=SUSPENDING, concurrency=2)
    plan = plan_for(tmp_path, 10, chunk_size=2, marks=[(5, f"my card SUSPEND {suspended}")])
    run_rollouts(plan, pair, large=False)
    assert not is_suspended(int(suspended.read_text())), "its raylet ended it"
    lines = [line for path in (tmp_path / "rows").glob("*.jsonl") for line in path.read_text().splitlines()]
    rows = read_rows(plan.segment_dir)
    assert len(rows) == len(lines) == 20 and all(row["accept"] for row in rows.values())


WAITING = ProgramSpec("tests.support.programs:WaitsOnMark", SPEC.metric, adapter="compact", timeout_s=100.0)


def test_beside_a_block_whose_last_row_is_waited_for_the_next_one_runs(tmp_path, workers):
    gate = tmp_path / "gate"
    pair = workers(StubPool(programs.answer), spec=WAITING)
    plan = plan_for(tmp_path, 20, chunk_size=1, marks=[(0, f"WAIT {gate}")])
    run = threading.Thread(target=run_rollouts, args=(plan, pair, True))
    run.start()
    in_a_block = BLOCK_BATCHES * plan.group_size
    deadline = time.monotonic() + 60.0
    while len(read_rows(plan.segment_dir)) < 2 * in_a_block - 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    written = len(read_rows(plan.segment_dir))
    gate.touch()
    run.join()
    assert written >= 2 * in_a_block - 2 and len(read_rows(plan.segment_dir)) == 40, "but for the two that wait"


def test_rows_of_an_earlier_attempt_are_kept(tmp_path, workers):
    log = tmp_path / "calls.log"
    pair = workers(StubPool(programs.answer, log=str(log)))
    plan = plan_for(tmp_path, 4)
    tasks = plan.read_tasks()
    run_direct(tasks[:3], pair, plan.segment_dir, plan.timeout_s)
    run_rollouts(plan, pair, large=False)
    assert len(read_rows(plan.segment_dir)) == 8
    assert all(count == 2 for count in runs(log).values())


@pytest.mark.parametrize("large", [False, True])
def test_the_pools_fault_comes_out_as_itself(tmp_path, workers, large):
    plan = plan_for(tmp_path, 3)
    with pytest.raises(PoolError, match="no replica answers") as caught:
        run_rollouts(plan, workers(StubPool(programs.no_replica)), large=large)
    assert type(caught.value) is PoolError
    assert all(row["error"] for row in read_rows(plan.segment_dir).values())


def test_a_program_that_cannot_be_loaded_is_a_config_error(workers):
    with pytest.raises(ConfigError, match="has no 'Nope'"):
        workers(StubPool(programs.answer), count=1, spec=ProgramSpec("tests.support.programs:Nope", SPEC.metric))


def test_a_candidate_of_another_program_is_a_config_error(tmp_path, workers):
    plan = plan_for(tmp_path, 1)
    other = RolloutPlan(**{**vars(plan), "candidate": {"predictors": {"nobody": {"instructions": "", "demos": []}}}})
    with pytest.raises(ConfigError, match="'nobody'"):
        run_rollouts(other, workers(StubPool(programs.answer), count=1), large=False)
