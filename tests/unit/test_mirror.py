"""Runs in a bucket, in good and in bad times, on a real S3 server."""

import json
import shutil
import threading
import time

import pytest

from bt_ray import stop as stop_module
from bt_ray.errors import RunDirError, StorageError
from bt_ray.runs import writer as writer_module
from bt_ray.runs.bucket import Bucket, Place
from bt_ray.runs.files import append_line
from bt_ray.runs.lock import LOCK, STOP, RunLock
from bt_ray.runs.mirror import Mirror
from bt_ray.runs.objects import fetch, grows, is_kept, rank
from bt_ray.runs.reader import reading, relaying
from bt_ray.runs.run_dir import RunDir
from bt_ray.runs.writer import Writer, read_writer
from tests.support.bucket_runs import RUN, URL, bucket, fast, running_server, server, wait_for, write
from tests.support.bucket_server import BUCKET

__all__ = ["fast", "running_server", "server"]


def test_a_record_goes_up_after_what_it_speaks_of():
    order = sorted(RUN, key=rank)
    assert order.index("steps/rollout-1/rows/a.jsonl") < order.index("steps/finetune-1/record.json")
    assert order.index("steps/finetune-1/record.json") < order.index("stages/w/record.json") < order.index("pick.json")
    assert order.index("examples/train.jsonl") < order.index("run.json")


def test_what_is_kept_in_the_bucket():
    kept = [name for name in RUN if is_kept(name, lambda step: step == "steps/finetune-1")]
    assert kept == list(RUN)
    left = ["scratch/train/x", "lock.json", "stop.json", "steps/rollout-1/lock.json", ".probe-1", "steps/a/.x.tmp"]
    left.append("steps/finetune-2/files-0001/adapter/x.safetensors")
    assert not [name for name in left if is_kept(name, lambda step: step == "steps/finetune-1")]
    assert [name for name in RUN if grows(name)] == ["steps/rollout-1/rows/a.jsonl"]
    assert (
        grows("test_looks.jsonl") and grows("steps/search-1/proposer_calls.jsonl") and not grows("steps/f/files-0001/rows.jsonl")
    )


def test_a_run_comes_back_whole_on_another_machine(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {**RUN, "scratch/big": "x", "steps/finetune-2/files-0001/half": "x"})
        wait_for(lambda: "pick.json" in bucket().sizes())
        for number in range(2, 5):
            append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": number})
            wait_for(lambda number=number: len([name for name in bucket().sizes() if "/rows/a.jsonl/" in name]) >= number)
        (mirror.folder / "stages/w/record.json").unlink()
    with Mirror(bucket(), tmp_path / "there") as mirror:
        found = {str(path.relative_to(mirror.folder)): path.read_text() for path in mirror.folder.rglob("*") if path.is_file()}
    rows = "".join(json.dumps({"row": number}) + "\n" for number in range(1, 5))
    assert found == {name: text for name, text in RUN.items() if name != "stages/w/record.json"} | {
        "steps/rollout-1/rows/a.jsonl": rows
    }


def test_each_byte_goes_up_once(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    server.requests.clear()
    with Mirror(bucket(), tmp_path / "here") as mirror:
        append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": 2})
        time.sleep(0.5)
    sent = {path for path in server.sent() if not path.endswith("writer.json")}
    assert sent == {f"/{BUCKET}/team/run/steps/rollout-1/rows/a.jsonl/{len(RUN['steps/rollout-1/rows/a.jsonl']):012d}"}
    assert not [path for path in server.sent("GET") if "rows" in path or "files" in path], "nor does anything come down"


def test_half_a_line_waits_for_its_other_half(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}"})
        path = mirror.folder / "test_looks.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a"')
        wait_for(lambda: "test_looks.jsonl/000000000000" in bucket().sizes())
        with path.open("ab") as file:
            file.write(b": 2}\n")
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_part_that_is_missing_is_said(server, tmp_path):
    bucket().put("steps/x/rows/a.jsonl/000000000000", b"one\n")
    bucket().put("steps/x/rows/a.jsonl/000000000009", b"two\n")
    with pytest.raises(StorageError, match="lacks the bytes from 4 on"):
        fetch(bucket(), tmp_path)


def test_the_copy_of_whoever_wrote_last_counts(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {**RUN, "pick.json": '"old"'})
    with Mirror(bucket(), tmp_path / "there") as mirror:
        write(mirror.folder, {"pick.json": '"new"'})
    (tmp_path / "here/run/steps/leftover").mkdir()
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert (mirror.folder / "pick.json").read_text() == '"new"'
        assert not (mirror.folder / "steps/leftover").exists()


def test_what_a_killed_driver_left_here_goes_up_with_the_next(server, tmp_path, fast, monkeypatch):
    dead = Mirror(bucket(), tmp_path / "here")
    dead._threads = []
    dead.__enter__()
    write(dead.folder, RUN)
    monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)  # its process is gone
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert (mirror.folder / "pick.json").is_file()
    assert "pick.json" in bucket().sizes()


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
    assert "steps/finetune-1/record.json" in bucket().sizes()


def test_what_was_removed_from_the_bucket_goes_up_again(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    bucket().delete("steps/rollout-1/rows/a.jsonl/000000000000")
    bucket().put("steps/", b"")  # a folder, as consoles make one
    with Mirror(bucket(), tmp_path / "here"):
        pass
    fetch(bucket(), tmp_path / "fetched")
    assert (tmp_path / "fetched/steps/rollout-1/rows/a.jsonl").read_text() == RUN["steps/rollout-1/rows/a.jsonl"]


def test_a_copy_that_was_removed_is_fetched_again_and_the_bucket_keeps_all(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    shutil.rmtree(mirror.folder)
    with Mirror(bucket(), tmp_path / "here") as mirror:
        assert (mirror.folder / "pick.json").is_file()
    with pytest.raises(StorageError, match="is no run any more"), Mirror(bucket(), tmp_path / "here") as mirror:
        shutil.rmtree(mirror.folder)
    assert {"pick.json", "run.json"} <= set(bucket().sizes())


def test_a_step_that_was_deleted_goes_from_the_bucket_with_all_parts_of_its_rows(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    shutil.rmtree(mirror.folder / "steps/rollout-1")
    with Mirror(bucket(), tmp_path / "here"):
        pass
    assert not [name for name in bucket().sizes() if "rollout-1" in name]


def test_a_line_that_was_taken_back_is_taken_back_in_the_bucket(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": "1\n2\n"})
    (mirror.folder / "test_looks.jsonl").write_text("1\n")
    with Mirror(bucket(), tmp_path / "here"):
        pass
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == "1\n"


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
        wait_for(lambda: "pick.json" in bucket().sizes())
        monkeypatch.setattr(writer_module, "is_free", lambda *asked: True)
        wait_for(takes_over)
        write(mirror.folder, {"stages/p/record.json": "{}"})
        wait_for(lock.is_asked_to_stop)
        write(mirror.folder, {"pick.json": '"late"'})
    assert bucket().get("pick.json")[0] == b"{}" and "stages/p/record.json" not in bucket().sizes()


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
    assert "pick.json" in bucket().sizes()


def test_what_did_not_go_up_at_the_end_is_said(server, tmp_path, fast):
    with (
        pytest.raises(StorageError, match="run the same again on this machine, which sends what is missing"),
        Mirror(bucket(), tmp_path / "here", patience_s=0.5) as mirror,
    ):
        mirror._threads = []
        server.fault = lambda method, path: "503"
        write(mirror.folder, RUN)


def test_a_name_that_leads_elsewhere_is_not_followed(server, tmp_path):
    Bucket(Place(BUCKET, "team")).put("run/../../x", b"")
    for name in ("steps/../../../evil", "/etc/evil"):
        bucket().put(name, b"x")
        with pytest.raises(RunDirError, match="is not followed"):
            fetch(bucket(), tmp_path)
        bucket().delete(name)


def test_what_is_no_part_of_a_run_is_not_taken_from_the_bucket(server, tmp_path):
    for name in ("scratch/program-1.pkl", "inner/run.json", "steps/x/.hidden", "steps/x/lock.json", "run.json"):
        bucket().put(name, b"x")
    fetch(bucket(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run.json"]


def test_whoever_looks_sees_the_run_and_its_url(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
        wait_for(lambda: "pick.json" in bucket().sizes())
        with reading(URL) as folder:
            assert RunDir(folder).shown == URL and (folder / LOCK).is_file()
            assert (folder / "pick.json").is_file() and not list(folder.rglob("*.safetensors"))
    with reading(URL, whole=True) as folder:
        assert list(folder.rglob("*.safetensors")) and not (folder / LOCK).exists()
    assert not folder.exists()
    with pytest.raises(RunDirError, match="holds no run"), reading(f"s3://{BUCKET}/team/other"):
        pass


def test_a_request_to_stop_reaches_the_driver_through_the_bucket(server, tmp_path, fast, monkeypatch):
    said = []
    monkeypatch.setattr(stop_module, "is_complete", lambda run: False)

    def drive():
        with Mirror(bucket(), tmp_path / "here") as mirror:
            write(mirror.folder, RUN)
            with RunLock(mirror.folder) as lock:
                wait_for(lock.is_asked_to_stop, 30)

    driver = threading.Thread(target=drive)
    driver.start()
    wait_for(lambda: "pick.json" in bucket().sizes())
    with reading(URL) as folder, relaying(URL, folder):
        assert stop_module.stop(RunDir(folder), 30, said.append) == 0
    driver.join()
    assert "was asked to end" in said[0] and "Stopped" in said[-1] and URL in said[-1]
    assert STOP not in bucket().sizes()
