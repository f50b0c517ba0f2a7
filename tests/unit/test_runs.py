import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bt_ray.config import PromptStep
from bt_ray.errors import CommitError, RunDirError, StorageError
from bt_ray.runs import lock as locks
from bt_ray.runs import opening
from bt_ray.runs.commit import Cost, Step, StepKey, read_record, spent_cost
from bt_ray.runs.files import append_line, publish_once, read_json, read_lines, write_atomic
from bt_ray.runs.identity import canonical_json, content_hash, derive_seed
from bt_ray.runs.lock import RunLock
from bt_ray.runs.opening import changed_searchers, open_run
from bt_ray.runs.run_dir import IDENTITY_PARTS, RunDir, check_writable, differences
from bt_ray.stages.searching import WHERE_IT_RUNS
from tests.support.plans import config

KEY = StepKey("rollout", {"weights": "abc", "seed": 0})


def test_hash_depends_on_content_not_on_order():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert KEY.hash != StepKey("search", KEY.inputs).hash
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        content_hash(float("nan"))


def test_derived_seeds_are_stable_and_differ():
    assert derive_seed(0, "rollout") == derive_seed(0, "rollout")
    assert derive_seed(0, "rollout") != derive_seed(1, "rollout")
    assert 0 <= derive_seed("x") < 2**31


def test_commit_once_then_read(tmp_path):
    step = Step(tmp_path, KEY)
    assert step.record() is None
    step.begin()
    (step.files / "model.bin").write_text("weights")
    step.commit("p", {"score": 0.5}, Cost(lm_calls=3, seconds=1.5))
    record = Step(tmp_path, KEY).record()
    assert record.result == {"score": 0.5}
    assert record.cost.lm_calls == 3
    assert list(record.files) == ["files-0001/model.bin"]
    assert spent_cost(tmp_path) == Cost(lm_calls=3, seconds=1.5)


def test_an_older_attempt_cannot_commit(tmp_path):
    old, new = Step(tmp_path, KEY), Step(tmp_path, KEY)
    old.begin()
    new.begin()
    with pytest.raises(CommitError, match="attempt 1 ended after attempt 2"):
        old.commit("p", {}, Cost())
    new.commit("p", {"by": "new"}, Cost())
    assert Step(tmp_path, KEY).record().result == {"by": "new"}


def test_the_second_commit_of_a_step_is_refused(tmp_path):
    step = Step(tmp_path, KEY)
    step.begin()
    step.commit("p", {}, Cost())
    with pytest.raises(CommitError, match="committed first"):
        step.commit("p", {}, Cost())


def test_result_hash_leaves_out_cost(tmp_path):
    hashes = []
    for number, seconds in enumerate((1.0, 9.0)):
        step = Step(tmp_path / str(number), KEY)
        step.begin()
        hashes.append(step.commit("p", {"score": 1}, Cost(seconds=seconds)).result_hash)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("damage", ["result", "cost", "file", "missing", "json"])
def test_damage_is_found(tmp_path, damage):
    step = Step(tmp_path, KEY)
    step.begin()
    (step.files / "model.bin").write_text("weights")
    step.commit("p", {"score": 0.5}, Cost())
    path = step.folder / "record.json"
    if damage == "result":
        data = json.loads(path.read_text())
        data["result"]["score"] = 0.9
        path.write_text(json.dumps(data))
    elif damage == "cost":
        path.write_text(path.read_text().replace('"lm_calls": 0', '"lm_calls": 1'))
    elif damage == "json":
        path.write_text(path.read_text()[:40])
    elif damage == "file":
        (step.files / "model.bin").write_text("weighty")
    else:
        (step.files / "model.bin").unlink()
    with pytest.raises(CommitError, match="Delete"):
        read_record(step.folder)
    if damage in ("cost", "json"):  # the budget does not believe them either
        with pytest.raises(CommitError, match="Delete"):
            spent_cost(tmp_path)


def test_publish_once_has_one_winner(tmp_path):
    assert publish_once(tmp_path / "x", "a")
    assert not publish_once(tmp_path / "x", "b")
    assert (tmp_path / "x").read_text() == "a"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_torn_last_line_is_passed_over_and_a_torn_inner_one_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_line(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": ')
    assert read_lines(path) == [{"a": 1}]
    with open(path, "a") as file:
        file.write('\n{"a": 3}\n')
    with pytest.raises(CommitError, match="line 2"):
        read_lines(path)


def test_a_run_has_one_driver(tmp_path):
    with RunLock(tmp_path) as held:
        assert held.holds()
        with pytest.raises(RunDirError, match=f"process {os.getpid()}"), RunLock(tmp_path):
            pass
    assert not (tmp_path / "lock.json").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = f"from pathlib import Path; from bt_ray.runs.lock import RunLock; RunLock(Path({str(tmp_path)!r})).__enter__(); import os; os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / "lock.json").is_file()
    with RunLock(tmp_path) as held:
        assert held.holds()


def dead_lock(path, token):
    owner = {"host": socket.gethostname(), "pid": 2**22 + 1, "process_start": "1", "heartbeat": 0.0}
    write_atomic(path, json.dumps({**owner, "token": token}))


def test_of_two_that_succeed_a_dead_driver_one_wins(tmp_path):
    dead_lock(tmp_path / "lock.json", "old")
    with RunLock(tmp_path) as first:
        # The second had read the dead lock before the first replaced it.
        late = RunLock(tmp_path)
        with pytest.raises(RunDirError, match="taken over by another driver"):
            late._take_over({"token": "old"})
        assert first.holds()
        assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_who_died_while_taking_over_is_succeeded_too(tmp_path):
    dead_lock(tmp_path / "lock.json", "old")
    dead_lock(tmp_path / ".lock.after.old", "claimant")
    with RunLock(tmp_path) as held:
        assert held.holds()
        assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_who_is_taking_over_now_is_left_to_it(tmp_path):
    dead_lock(tmp_path / "lock.json", "old")
    other = RunLock(tmp_path)
    write_atomic(tmp_path / ".lock.after.old", other._text())
    with pytest.raises(RunDirError, match="taken over by another driver"), RunLock(tmp_path):
        pass


def test_who_is_gone():
    owner = {"host": "a", "pid": 1, "process_start": "100", "heartbeat": 1000.0}
    assert not locks.owner_is_gone(owner, "a", "100", 9999.0)
    assert locks.owner_is_gone(owner, "a", None, 1000.0)
    assert locks.owner_is_gone(owner, "a", "777", 1000.0)  # the pid was given to another process
    assert not locks.owner_is_gone(owner, "b", None, 1000.0 + locks.STALE_S)
    assert locks.owner_is_gone(owner, "b", None, 1001.0 + locks.STALE_S)


def test_a_lock_is_held_while_its_owner_lives(tmp_path):
    assert not locks.is_held(tmp_path)
    with RunLock(tmp_path):
        assert locks.is_held(tmp_path)
    dead_lock(tmp_path / "lock.json", "old")
    assert not locks.is_held(tmp_path)


def test_a_lock_beats_on_after_a_disk_that_was_full(tmp_path, monkeypatch):
    write, failed, written = locks.write_atomic, threading.Event(), threading.Event()

    def full_once(path, text):
        if not failed.is_set():
            failed.set()
            raise StorageError("its disk is full")
        write(path, text)
        written.set()

    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(locks, "write_atomic", full_once)
    with RunLock(tmp_path):
        assert written.wait(10)


def test_a_lock_that_was_taken_is_not_removed(tmp_path):
    first = RunLock(tmp_path)
    with first:
        write_atomic(first.path, json.dumps({**read_json(first.path), "token": "other"}))
    assert first.path.is_file()


def test_differences_name_the_key_and_leave_free_keys_out():
    old = {"seed": 0, "steps": {"w": {"epochs": 2}}, "strategy": "p", "budget": {"max_seconds": None}}
    new = {"seed": 0, "steps": {"w": {"epochs": 3}}, "strategy": "w", "budget": {"max_seconds": 9}}
    assert differences(old, new) == ["steps.w.epochs: the run has 2, you ask for 3"]
    placed = {"engine": {"resources": {"engines": 1}}, "steps": {"w": {"epochs": 2, "resources": {"trainers": 1}}}}
    assert differences({"engine": {"resources": {}}, "steps": {"w": {"epochs": 2, "resources": {}}}}, placed) == []
    asking = {"steps": {"p": {"proposer": {"model": "m", "engine": {"num_cpus": 1}}}}}  # of a time without the key
    now = {"steps": {"p": {"proposer": {"model": "m", "engine": {"num_cpus": 1, "resources": {}}}}}}
    assert differences(asking, now) == []
    keyed = {"steps": {"p": {"proposer": {"model": "m", "api_key_file": "/run/secrets/key"}}}}
    assert differences({"steps": {"p": {"proposer": {"model": "m"}}}}, keyed) == []
    assert differences({"steps": {"p": {"options": {}}}}, {"steps": {"p": {"options": {"api_key_file": "x"}}}})


def test_where_a_key_lies_is_no_part_of_a_search():
    named = {"optimizer": "opro", "proposer": {"model": "openai/x"}}
    keyed = {**named, "proposer": {"model": "openai/x", "api_key_file": "/run/secrets/key"}}
    one, other = (PromptStep.model_validate(step).model_dump(mode="json", exclude=WHERE_IT_RUNS) for step in (named, keyed))
    assert one == other and one["proposer"]["model"] == "openai/x" and "api_key_file" not in one["proposer"]


def test_not_a_run_directory(tmp_path):
    with pytest.raises(RunDirError, match="no run directory"):
        RunDir(tmp_path).header()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be written"):
        check_writable(tmp_path / "file")
    with pytest.raises(RunDirError, match="object stores"):
        RunDir("s3://bucket/run")
    for place in ("s3://bucket/run", Path("gs://bucket/run")):
        with pytest.raises(RunDirError, match="is no folder, and of object stores only S3-compatible ones are known"):
            check_writable(place)


def test_costs_add_up():
    assert Cost(1, 2, 3, 4, 5.0) + Cost(1, 1, 1, 1, 1.0) == Cost(2, 3, 4, 5, 6.0)
    assert replace(Cost(), lm_calls=2) + Cost() == Cost(lm_calls=2)


def prepared(**changes):
    row = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    identity = {**dict.fromkeys(IDENTITY_PARTS, "same"), "follow": "a"}
    return SimpleNamespace(config=config(**changes), splits={"train": [row]}, identity=identity)


def meanwhile(monkeypatch, action):
    """`action` happens once, after the next look at the run and before its lock."""
    actions = [action]

    class Slow(RunLock):
        def __enter__(self):
            if actions:
                actions.pop()()
            return super().__enter__()

    monkeypatch.setattr(opening, "RunLock", Slow)


def test_a_run_that_another_process_made_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    meanwhile(monkeypatch, lambda: open_run(tmp_path, prepared(seed=1)))
    with pytest.raises(RunDirError, match="seed: the run has 1, you ask for 2"):
        open_run(tmp_path, prepared(seed=2))
    assert RunDir(tmp_path).config().seed == 1
    meanwhile(monkeypatch, lambda: open_run(tmp_path / "equal", prepared()))
    assert open_run(tmp_path / "equal", prepared()).exists()


def test_a_header_is_compared_again_before_it_is_written(tmp_path, monkeypatch):
    run = open_run(tmp_path, prepared(strategy="p"))
    other = prepared(strategy="p -> w", steps={"p": {"optimizer": "random_fewshot"}, "w": {"method": "sft", "epochs": 9}})
    added = prepared(strategy="p", steps={"p": {"optimizer": "random_fewshot"}})
    run.write_header(added.config, added.identity)
    meanwhile(monkeypatch, lambda: open_run(tmp_path, other))
    with pytest.raises(RunDirError, match=r"steps\.w\.epochs: the run has 9, you ask for 2"):
        open_run(tmp_path, prepared(strategy="w"))
    assert run.config().strategy == "p -> w"


def test_a_searcher_whose_source_changed_is_searched_anew_where_it_has_no_outcome_yet(tmp_path):
    def with_source(source):
        made = prepared(strategy="p")
        made.identity["searchers"] = {"p": source}
        return made

    run = open_run(tmp_path, with_source("one"))
    assert open_run(tmp_path, with_source("two")).header()["identity"]["searchers"] == {"p": "two"}, "it was mended"
    write_atomic(run.stage("p") / "record.json", json.dumps({"id": "p", "status": "done"}))
    with pytest.raises(RunDirError, match=r"steps\.p\.optimizer: its source changed since its search"):
        open_run(tmp_path, with_source("three"))
    assert changed_searchers(run, {"searchers": {"p": "three"}}) == ["p"] and not changed_searchers(run, {})


def test_what_does_not_touch_a_result_may_change(tmp_path):
    open_run(tmp_path, prepared(strategy="p"))
    run = open_run(tmp_path, prepared(strategy="p -> w", budget={"max_lm_calls": 9}))
    assert run.config().strategy == "p -> w" and run.config().budget.max_lm_calls == 9
    assert not (tmp_path / "lock.json").exists()
