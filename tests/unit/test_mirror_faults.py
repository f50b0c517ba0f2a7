"""Runs in a bucket when drivers die, sleep or come twice, and when bucket or disk fail."""

import threading
import time

import pytest

from bt_ray.errors import ConfigError, RunDirError, StorageError
from bt_ray.runs import mirror as mirror_module
from bt_ray.runs import sent as sent_module
from bt_ray.runs import writer as writer_module
from bt_ray.runs.bucket import ATTEMPTS, Bucket
from bt_ray.runs.files import append_line
from bt_ray.runs.lock import RunLock
from bt_ray.runs.mirror import Mirror
from bt_ray.runs.objects import fetch
from bt_ray.runs.writer import Writer, read_writer
from tests.support.bucket_runs import RUN, bucket, fast, running_server, server, wait_for, write

__all__ = ["fast", "running_server", "server"]


def test_what_a_killed_driver_left_here_goes_up_with_the_next(server, tmp_path, fast, monkeypatch):
    dead = Mirror(bucket(), tmp_path / "here")
    dead._beating, dead._threads = threading.Thread(target=lambda: None), []
    dead.__enter__()
    write(dead.folder, RUN)
    monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)  # its process is gone
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert (mirror.folder / "pick.json").is_file()
    assert "pick.json" in bucket().names()


def test_a_driver_that_is_killed_as_soon_as_it_holds_the_run_loses_nothing(server, tmp_path, fast, monkeypatch):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": 2})  # not sent: its driver was killed
    dead = Mirror(bucket(), tmp_path / "here")
    dead._writer.take()
    monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert len((mirror.folder / "steps/rollout-1/rows/a.jsonl").read_text().splitlines()) == 2


def test_a_driver_that_only_came_and_went_makes_no_copy_old(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": 2})  # not sent
    with Mirror(bucket(), tmp_path / "there"):
        pass
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert len((mirror.folder / "steps/rollout-1/rows/a.jsonl").read_text().splitlines()) == 2


def test_what_a_cleaner_took_from_the_copy_comes_back(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    for name in ("steps/finetune-1/record.json", "steps/rollout-1/rows/a.jsonl"):
        (mirror.folder / name).unlink()
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert {name: (mirror.folder / name).read_text() for name in RUN} == RUN
    assert "steps/finetune-1/record.json" in bucket().names()


def test_a_line_that_was_taken_back_is_taken_back_in_the_bucket(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": "1\n2\n"})
    (mirror.folder / "test_looks.jsonl").write_text("1\n")
    with Mirror(bucket(), tmp_path / "here"):
        pass
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == "1\n"


@pytest.mark.parametrize("later", ["1\n3\n4\n", "1\n" + "3" * 600 + "\n", "2\n2\n"])
def test_a_file_that_was_cut_and_grew_again_is_sent_anew(server, tmp_path, fast, later):
    """Also where it is longer than, or as long as, what the bucket had of it."""
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": "1\n2\n"})
    (mirror.folder / "test_looks.jsonl").write_text(later)
    with Mirror(bucket(), tmp_path / "here"):
        pass
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == later


def test_lines_are_taken_back_though_that_was_cut_off_the_first_time(server, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(sent_module, "PART_BYTES", 4)
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": "11111\n22222\n33333\n"})
    monkeypatch.setattr(sent_module, "PART_BYTES", 1000)
    (mirror.folder / "test_looks.jsonl").write_text("44444\n555\n")
    faults = iter(["503"] * ATTEMPTS)  # of one part; the others go

    def fault(method, path):
        return next(faults, None) if method == "DELETE" and path.endswith("/000000000012") else None

    server.fault = fault
    with Mirror(bucket(), tmp_path / "here"):
        pass
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == "44444\n555\n"


def test_a_driver_that_slept_in_the_middle_of_a_sync_sends_nothing_more(server, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(mirror_module, "BEAT_S", 0.0)  # each object asks first
    upload = Bucket.upload

    def sleeps(self, name, path):
        upload(self, name, path)
        if name == "examples/train.jsonl":
            monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)
            wait_for(takes_over)

    monkeypatch.setattr(Bucket, "upload", sleeps)
    mirror = Mirror(bucket(), tmp_path / "here")
    mirror._beating, mirror._threads = threading.Thread(target=lambda: None), []
    with pytest.raises(StorageError, match="taken over by another driver"), mirror:
        write(mirror.folder, RUN)
    assert "examples/train.jsonl" in bucket().names() and "run.json" not in bucket().names()


def test_a_driver_shows_that_it_is_at_work_while_it_fetches_and_at_its_last_sync(server, tmp_path, fast, monkeypatch):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)

    def beats_during(work):
        def slow(self):
            before = read_writer(bucket())[0]["heartbeat"]
            wait_for(lambda: read_writer(bucket())[0]["heartbeat"] > before)
            seen.append(work.__name__)
            return work(self)

        return slow

    seen = []
    monkeypatch.setattr(Mirror, "_fetch", beats_during(Mirror._fetch))
    with Mirror(bucket(), tmp_path / "there") as mirror:
        mirror._end.set()
        for thread in mirror._threads:
            thread.join()
        monkeypatch.setattr(Mirror, "_sync", beats_during(Mirror._sync))
    assert seen == ["_fetch", "_sync"]


def test_the_runs_own_error_is_said_beside_the_buckets(server, tmp_path, fast):
    words = r"run the same again .* ended with: the config is wrong"
    with pytest.raises(StorageError, match=words), Mirror(bucket(), tmp_path / "here", patience_s=0.2) as mirror:
        mirror._end.set()
        write(mirror.folder, RUN)
        server.fault = lambda method, path: "503"
        raise ConfigError("the config is wrong")


def test_a_copy_that_cannot_be_read_stops_the_run(server, tmp_path, fast, monkeypatch):
    def fail(self):
        raise PermissionError(13, "Permission denied")

    def drive():
        with Mirror(bucket(), tmp_path / "here") as mirror, RunLock(mirror.folder) as lock:
            monkeypatch.setattr(Mirror, "_files", fail)
            wait_for(lock.is_asked_to_stop)

    with pytest.raises(StorageError, match=r"cannot be read: .*Permission denied"):
        drive()


def test_a_second_driver_is_refused(server, tmp_path, fast):
    with (
        Mirror(bucket(), tmp_path / "here"),
        pytest.raises(RunDirError, match=r"being written by process \d+ on .*bt-ray stop s3://"),
    ):
        Mirror(bucket(), tmp_path / "there").__enter__()


def takes_over():
    """Another driver takes the run; it may have to try more than once, as the present one renews its word meanwhile."""
    try:
        Writer(bucket()).take()
    except RunDirError:
        return False
    return True


def test_a_driver_that_was_succeeded_stops_and_writes_no_more(server, tmp_path, fast, monkeypatch):
    with (
        pytest.raises(StorageError, match="taken over by another driver"),
        Mirror(bucket(), tmp_path / "here") as mirror,
        RunLock(mirror.folder) as lock,
    ):
        write(mirror.folder, RUN)
        wait_for(lambda: "pick.json" in bucket().names())
        monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)
        wait_for(takes_over)
        write(mirror.folder, {"stages/p/record.json": "{}"})
        wait_for(lock.is_asked_to_stop)
        write(mirror.folder, {"pick.json": '"late"'})
    assert bucket().get("pick.json")[0] == b"{}" and "stages/p/record.json" not in bucket().names()


def test_a_spell_of_errors_changes_nothing(server, tmp_path, fast):
    faults = iter([*["503", "reset", 0.2, "lost", "503"] * 2, 3.0, *["lost", "reset", "503"]])  # 3 s: longer than is waited
    with Mirror(bucket(), tmp_path / "here") as mirror:
        server.fault = lambda method, path: next(faults, None)
        write(mirror.folder, RUN)
        for number in range(2, 6):
            append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": number})
            time.sleep(0.2)
    server.fault = lambda method, path: None
    fetch(bucket(), tmp_path)
    for name, text in RUN.items():
        assert (tmp_path / name).read_text().startswith(text)
    assert len((tmp_path / "steps/rollout-1/rows/a.jsonl").read_text().splitlines()) == 5
    assert read_writer(bucket())[0]["released"] is True


def test_a_bucket_that_stays_silent_stops_the_run_and_the_copy_keeps_it(server, tmp_path, fast, monkeypatch):
    with (
        pytest.raises(StorageError, match=r"does not answer .* silent for 0.5 s, so the run was stopped"),
        Mirror(bucket(), tmp_path / "here", patience_s=0.5) as mirror,
        RunLock(mirror.folder) as lock,
    ):
        server.fault = lambda method, path: "503"
        write(mirror.folder, RUN)
        wait_for(lock.is_asked_to_stop)
    server.fault = lambda method, path: None
    monkeypatch.setattr(writer_module, "STALE_S", -1.0)
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert (mirror.folder / "pick.json").is_file()
    assert "pick.json" in bucket().names()


def test_what_did_not_go_up_at_the_end_is_said(server, tmp_path, fast):
    with (
        pytest.raises(StorageError, match="run the same again on this machine, which sends what is missing"),
        Mirror(bucket(), tmp_path / "here", patience_s=0.5) as mirror,
    ):
        mirror._threads = []
        server.fault = lambda method, path: "503"
        write(mirror.folder, RUN)
