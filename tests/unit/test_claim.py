"""Stages that need one step at the same time: one makes it, the others wait for its record."""

import json
import os
import threading

from bt_ray.runs import claim
from bt_ray.runs.claim import claimed
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.lock import LOCK

KEY = StepKey("rollout", {"seed": 0})


def test_two_stages_make_a_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "POLL_S", 0.01)
    made, found, both_began = [], [], threading.Barrier(2)

    def stage(name):
        step = Step(tmp_path, KEY)
        both_began.wait()
        with claimed(step) as record:
            if record is None:
                made.append(name)
                step.begin()
                record = step.commit(name, {"rows": 1}, Cost(lm_calls=5))
        found.append(record)

    threads = [threading.Thread(target=stage, args=(name,)) for name in ("p", "w")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert {record.stage for record in found} == set(made)
    assert len(list(Step(tmp_path, KEY).folder.glob("attempt-*.json"))) == 1
    assert not (Step(tmp_path, KEY).folder / LOCK).exists()


def test_a_step_whose_maker_died_is_made_again(tmp_path):
    step = Step(tmp_path, KEY)
    step.folder.mkdir(parents=True)
    owner = {"host": os.uname().nodename, "pid": 2**22 + 1, "process_start": "1", "token": "dead", "heartbeat": 0.0}
    (step.folder / LOCK).write_text(json.dumps(owner))
    with claimed(step) as record:
        assert record is None


def test_a_maker_that_fails_leaves_the_step_to_the_next(tmp_path):
    step = Step(tmp_path, KEY)
    try:
        with claimed(step) as record:
            assert record is None
            raise OSError("disk full")
    except OSError:
        pass
    with claimed(step) as record:
        assert record is None
