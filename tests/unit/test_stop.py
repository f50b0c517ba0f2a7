"""`bt-ray stop`: what it finds in a run directory, whom it asks, and what it says."""

import errno
import json
import os
import socket
import threading
import time

import pytest

from bt_ray import cli
from bt_ray import stop as stops
from bt_ray.runs import lock as locks
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.lock import RunLock, ask_to_stop, owner_of
from bt_ray.runs.run_dir import RunDir
from tests.support.plans import config

ROW = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
DEAD = {"host": socket.gethostname(), "pid": 2**22 + 1, "process_start": "1", "token": "dead", "heartbeat": 0.0}
ELSEWHERE = {"host": "node-7", "pid": 12, "process_start": "1", "token": "far"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stops, "POLL_S", 0.01)
    monkeypatch.setattr(stops, "SILENCE_S", 0.2)


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    data = {"train": "t", "val": "v", "inputs": ["x"]}
    made.create(config(strategy="p", data=data), {"follow": "a"}, {name: [ROW] for name in ("train", "search", "select")})
    return made


def hold(run, owner, **changes):
    write_atomic(run.root / "lock.json", json.dumps({"heartbeat": time.time(), **owner, **changes}))


def finish(run):
    for stage in ("vanilla", "p"):
        write_atomic(run.stage(stage) / "record.json", json.dumps({"status": "done", "hash": stage}))
    write_atomic(run.root / "pick.json", json.dumps({"id": "p", "why": "told so", "stages": {"vanilla": "vanilla", "p": "p"}}))


def stop(run, wait_s=5.0):
    said = []
    code = stops.stop(run, wait_s, said.append)
    return code, "\n".join(said)


def test_a_driver_that_looks_for_the_request_is_waited_for(run):
    begun = threading.Event()

    def drive():
        with RunLock(run.root) as lock:
            begun.set()
            while not lock.is_asked_to_stop():
                time.sleep(0.01)

    driver = threading.Thread(target=drive)
    driver.start()
    assert begun.wait(10)
    code, said = stop(run)
    driver.join()
    assert code == 0 and "was asked to end" in said and "Stopped. What was committed is kept." in said
    assert f"--run-dir {run.root}" in said
    assert not (run.root / "stop.json").exists() and not (run.root / "lock.json").exists()


def test_a_request_that_was_left_behind_is_none_to_the_next_driver(run):
    with RunLock(run.root) as first:
        ask_to_stop(run.root, owner_of(run.root))
        assert first.is_asked_to_stop()
        request = (run.root / "stop.json").read_text()
    assert not (run.root / "stop.json").exists(), "it goes with the lock that it was for"
    write_atomic(run.root / "stop.json", request)  # as where that driver was killed
    with RunLock(run.root) as second:
        assert not second.is_asked_to_stop()


def test_no_run_there(tmp_path, capsys):
    assert cli.main(["stop", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_a_run_without_a_driver(run):
    code, said = stop(run)
    assert code == 0 and "no driver is at work" in said and not (run.root / "stop.json").exists()


def test_a_finished_run(run, capsys):
    finish(run)
    assert cli.main(["stop", str(run.root), "--wait-s", "1"]) == 0
    said = capsys.readouterr().out
    assert "is finished" in said and f"bt-ray report {run.root}" in said


def test_the_lock_of_a_dead_driver(run):
    hold(run, DEAD)
    code, said = stop(run)
    assert code == 0 and f"process {DEAD['pid']} on {DEAD['host']}" in said
    assert "is gone and left its lock behind" in said and "`bt-ray run` takes the lock over, adopts stage jobs" in said
    assert not (run.root / "stop.json").exists() and owner_of(run.root)["token"] == "dead", "the lock is left as it is"


def test_a_driver_on_another_host_that_is_silent(run):
    hold(run, ELSEWHERE, heartbeat=time.time() - 2 * locks.STALE_S)
    code, said = stop(run)
    assert code == 0 and "is gone and left its lock behind" in said


def test_a_driver_whose_clock_is_behind_is_alive(run):
    behind = time.time() - 1000.0
    hold(run, ELSEWHERE, heartbeat=behind)
    beat = threading.Timer(0.05, lambda: hold(run, ELSEWHERE, heartbeat=behind + 5.0))
    beat.start()
    code, said = stop(run, wait_s=0.1)
    beat.join()
    assert code == 1 and "Not stopped" in said
    assert read_json(run.root / "stop.json") == {"token": "far"}


def test_a_heartbeat_that_only_the_relay_renews_is_no_sign_of_life(run):
    """As in the copy of a run in a bucket, whose lock is written anew each second."""
    hold(run, ELSEWHERE, beat=5.0)
    renewed = threading.Timer(0.05, lambda: hold(run, ELSEWHERE, heartbeat=time.time() + 1.0, beat=5.0))
    renewed.start()
    code, said = stop(run, wait_s=0.3)
    renewed.join()
    assert code == 1 and "no sign of life" in said


def test_a_driver_that_does_not_end_in_time_keeps_the_request(run):
    with RunLock(run.root) as lock:
        code, said = stop(run, wait_s=0.05)
        assert code == 1 and "waits 0.05 s at most" in said and "no sign of life" in said
        hold(run, owner_of(run.root), heartbeat=1.0)
        timer = threading.Timer(0.05, lambda: hold(run, owner_of(run.root), heartbeat=2.0))
        timer.start()
        code, said = stop(run, wait_s=0.3)
        timer.join()
        assert code == 1 and "Not stopped yet" in said and f"bt-ray stop {run.root}" in said
        assert lock.is_asked_to_stop()


def test_a_driver_that_was_killed_while_it_was_waited_for(run, monkeypatch):
    hold(run, DEAD)
    answers = iter([False, True])
    monkeypatch.setattr(stops, "is_gone", lambda owner: next(answers))
    code, said = stop(run)
    assert code == 0 and "ended without giving its lock back" in said and not (run.root / "stop.json").exists()


def test_a_driver_that_took_the_run_meanwhile_is_not_asked(run):
    hold(run, ELSEWHERE)
    timer = threading.Timer(0.05, lambda: hold(run, ELSEWHERE, token="next", pid=99))
    timer.start()
    code, said = stop(run)
    timer.join()
    assert code == 0 and "process 99 on node-7 has taken the run since, and was not asked to stop" in said
    assert not (run.root / "stop.json").exists()


def test_a_run_that_ends_before_the_request_is_read(run):
    hold(run, ELSEWHERE)
    finish(run)
    timer = threading.Timer(0.05, (run.root / "lock.json").unlink)
    timer.start()
    code, said = stop(run)
    timer.join()
    assert code == 0 and "was finished before its driver read the request" in said


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written(run, monkeypatch, capsys, code):
    hold(run, ELSEWHERE)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("bt_ray.runs.files.os.replace", refuse)
    assert cli.main(["stop", str(run.root)]) == 2
    assert f"the request to stop cannot be written there ({os.strerror(code)})" in capsys.readouterr().err
