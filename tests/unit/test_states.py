"""What the live view and `bt-ray status` read from the files of a run."""

import json
import time
from types import SimpleNamespace

import pytest

from bt_ray.report import states
from bt_ray.report.meter import RowMeter
from bt_ray.report.states import Watcher
from bt_ray.runs.files import append_line, write_atomic
from bt_ray.runs.lock import RunLock
from bt_ray.runs.run_dir import RunDir
from tests.support.plans import config

NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path):
    row = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    identity = {"follow": "a", "signatures": {"one": {"inputs": ["x"], "outputs": ["z"]}}, "weights": {}}
    made = RunDir(tmp_path)
    made.create(config(strategy="p -> w"), identity, {name: [row] for name in ("train", "search", "select", "test")})
    made.write_plan({name: {"seconds": 100.0} for name in ("vanilla", "p", "p.w", "final")})
    return made


@pytest.fixture
def clock(monkeypatch):
    """The watcher's time and the meter's, in seconds after the stage began."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(states.time, "time", lambda: NOW + now.s)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


def submit(run, stage_id):
    """As the driver submits a job, at NOW."""
    write_atomic(run.stage(stage_id) / "job.json", json.dumps({"submission_id": "job", "since": NOW}))


def progress(run, stage_id, step, rows, since=NOW + 1.0, note=""):
    data = {"name": f"{step}-a", "step": step, "total": 10, "rows": rows, "note": note, "since": since}
    write_atomic(run.stage(stage_id) / "progress.json", json.dumps(data))


def add_row(run, folder, *tokens):
    append_line(run.root / folder / "one.jsonl", {"calls": [{"token_ids": [0] * count} for count in tokens]})


def add_answer(path, tokens, **extra):
    append_line(path, {"key": str(path), "answer": {"token_ids": [0] * tokens, "extra": extra}})


def of(run, stage_id, known=None, watcher=None):
    return next(state for state in (watcher or Watcher(run)).states(known or {}) if state.id == stage_id)


def test_a_stage_that_ended_shows_its_score_and_what_it_paid(run):
    cost = {"lm_calls": 12, "completion_tokens": 60, "seconds": 20.0}
    record = {"status": "done", "select_scores": {"a": 1.0, "b": 0.0, "c": None}, "cost": cost, "note": "fine"}
    write_atomic(run.stage("vanilla") / "record.json", json.dumps(record))
    state = of(run, "vanilla", {"vanilla": "running"})  # the driver has not seen it yet
    assert (state.status, state.score, state.lm_calls, state.tokens_per_s) == ("done", 0.5, 12, None)
    assert (state.seconds, state.note) == (20.0, "fine")


def test_a_running_stage_shows_step_calls_rate_and_time_left(run, clock):
    submit(run, "p")
    watcher, known = Watcher(run), {"vanilla": "done", "p": "running", "p.w": "pending"}
    clock.s = 2.0
    state = of(run, "p", known, watcher)
    assert (state.step, state.lm_calls, state.tokens_per_s, state.seconds_left) == ("starting", 0, None, 100.0)
    progress(run, "p", "rollout", "steps/rollout-a/rows")
    add_row(run, "steps/rollout-a/rows", 5, 5)
    clock.s = 10.0
    assert of(run, "p", known, watcher).tokens_per_s is None, "a rate needs a second look"
    add_row(run, "steps/rollout-a/rows", 60)
    clock.s = 30.0
    state = of(run, "p", known, watcher)
    assert (state.status, state.step, state.lm_calls, state.tokens_per_s) == ("running", "rollout", 3, 3.0)
    assert (state.seconds, state.seconds_left) == (30.0, 70.0)
    progress(run, "p", "finetune", None, note="8 rows, 2 epochs")
    clock.s = 130.0
    state = of(run, "p", known, watcher)
    assert (state.step, state.lm_calls, state.tokens_per_s) == ("finetune (8 rows, 2 epochs)", 3, None)
    assert state.seconds_left == 0.0, "never below nothing"
    assert of(run, "p.w", known, watcher).step is None


def test_what_an_earlier_attempt_left_is_not_shown_as_progress(run, clock):
    submit(run, "p")
    progress(run, "p", "search", "steps/search-a/rows", since=NOW - 50.0)
    clock.s = 4.0
    state = of(run, "p", {"p": "running"})
    assert (state.step, state.lm_calls, state.seconds) == ("starting", 0, 4.0)


def test_calls_of_the_proposer_and_of_a_compile_are_counted_as_they_come(run, clock):
    submit(run, "p")
    progress(run, "p", "search", "steps/search-a/rows")
    step = run.root / "steps" / "search-a"
    (step / "rows").mkdir(parents=True)
    watcher = Watcher(run)
    assert of(run, "p", {"p": "running"}, watcher).lm_calls == 0
    add_answer(step / "proposer_calls.jsonl", 40)
    add_answer(step / "proposer_calls.jsonl", 0, completion_tokens=50)  # of an endpoint, which gives no ids
    add_answer(step / "compile_calls.jsonl", 10)
    add_row(run, "steps/search-a/rows/candidate", 20)
    clock.s = 10.0
    state = of(run, "p", {"p": "running"}, watcher)
    assert (state.lm_calls, state.tokens_per_s) == (4, 12.0)
    clock.s = 20.0
    assert of(run, "p", {"p": "running"}, watcher).lm_calls == 4, "each is read once"


def test_the_journals_that_are_counted_are_those_that_a_search_writes(tmp_path):
    from bt_ray.stages.searching import COMPILES, PROPOSALS

    (tmp_path / "rows").mkdir()
    for name in (PROPOSALS, COMPILES):
        add_answer(tmp_path / name, 1)
    assert RowMeter().read("p", tmp_path / "rows")[0] == 2


def test_without_a_driver_a_submitted_stage_is_running_while_the_lock_is_held(run):
    write_atomic(run.stage("vanilla") / "job.json", json.dumps({"submission_id": "job", "since": time.time()}))
    assert of(run, "vanilla").status == "pending"
    with RunLock(run.root) as lock:
        assert of(run, "vanilla").status == "running" and of(run, "p").status == "pending"
        owner = json.loads(lock.path.read_text())
        write_atomic(lock.path, json.dumps({**owner, "process_start": "of a driver that was killed"}))
        assert of(run, "vanilla").status == "pending"


def test_a_failed_stage_keeps_its_reason_until_it_is_tried_again(run):
    write_atomic(run.stage("p") / "error.json", json.dumps({"status": "failed", "message": "the loss is NaN"}))
    assert (of(run, "p").status, of(run, "p").note) == ("failed", "the loss is NaN")
    waiting = of(run, "p", {"p": "pending"})
    assert (waiting.status, waiting.note) == ("pending", None)


def test_test_has_its_line_once_it_was_submitted(run):
    assert [state.id for state in Watcher(run).states({})] == ["vanilla", "p", "p.w"]
    submit(run, "final")
    assert Watcher(run).states({})[-1].path == "test, once"
