"""Runs in a bucket, in good and in bad times, on a real S3 server."""

import json
import shutil
import threading
import time

import pytest

from bt_ray import stop as stop_module
from bt_ray.errors import RunDirError, StorageError
from bt_ray.running import placed
from bt_ray.runs import sent as sent_module
from bt_ray.runs.bucket import Bucket, Place
from bt_ray.runs.files import append_line
from bt_ray.runs.lock import LOCK, STOP, RunLock
from bt_ray.runs.mirror import Mirror
from bt_ray.runs.objects import belongs, fetch, grows, parts_of, rank, step_of_artifact
from bt_ray.runs.reader import reading, relaying
from bt_ray.runs.run_dir import RunDir
from tests.support.bucket_runs import RUN, URL, bucket, fast, running_server, server, wait_for, write
from tests.support.bucket_server import BUCKET

__all__ = ["fast", "running_server", "server"]


def test_a_record_goes_up_after_what_it_speaks_of():
    order = sorted(RUN, key=rank)
    assert order.index("steps/rollout-1/rows/a.jsonl") < order.index("steps/finetune-1/record.json")
    assert order.index("steps/finetune-1/record.json") < order.index("stages/w/record.json") < order.index("pick.json")
    assert order.index("examples/train.jsonl") < order.index("run.json")


def test_what_is_kept_in_the_bucket():
    assert [name for name in RUN if belongs(name)] == list(RUN)
    left = ["scratch/train/x", "lock.json", "stop.json", "writer.json", "steps/rollout-1/lock.json", ".probe-1", "steps/a/.x.tmp"]
    assert not [name for name in (*left, "inner/run.json") if belongs(name)]
    assert belongs("steps/a/files-0001/.config"), "what a record speaks of, whatever its name"
    assert step_of_artifact("steps/a/files-0001/x/y") == "steps/a" and step_of_artifact("steps/a/rows/files-1") is None
    assert [name for name in RUN if grows(name)] == ["steps/rollout-1/rows/a.jsonl"]
    assert (
        grows("test_looks.jsonl") and grows("steps/search-1/proposer_calls.jsonl") and not grows("steps/f/files-0001/rows.jsonl")
    )


def test_a_run_comes_back_whole_on_another_machine(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {**RUN, "scratch/big": "x", "steps/finetune-2/files-0001/half": "x"})
        wait_for(lambda: "pick.json" in bucket().names())
        for number in range(2, 5):
            append_line(mirror.folder / "steps/rollout-1/rows/a.jsonl", {"row": number})
            wait_for(lambda number=number: len([name for name in bucket().names() if "/rows/a.jsonl/" in name]) >= number)
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
        wait_for(lambda: "test_looks.jsonl/000000000000" in bucket().names())
        with path.open("ab") as file:
            file.write(b": 2}\n")
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_line_that_is_ended_while_others_go_up_is_not_taken_for_its_end_alone(server, tmp_path, fast, monkeypatch):
    put = Bucket.put

    def ended_meanwhile(self, name, data):
        if data == b"1\n":
            with (mirror.folder / "test_looks.jsonl").open("ab") as file:
                file.write(b"3\n")
        put(self, name, data)

    monkeypatch.setattr(Bucket, "put", ended_meanwhile)
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": "1\n2"})
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == "1\n23\n"


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
    assert {"pick.json", "run.json"} <= set(bucket().names())


def test_a_step_that_was_deleted_goes_from_the_bucket_with_all_parts_of_its_rows(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    shutil.rmtree(mirror.folder / "steps/rollout-1")
    with Mirror(bucket(), tmp_path / "here"):
        pass
    assert not [name for name in bucket().names() if "rollout-1" in name]


def test_many_lines_go_up_in_parts_of_a_bounded_size(server, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(sent_module, "PART_BYTES", 100)
    lines = "".join(f"{number:020d}\n" for number in range(50))
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}", "test_looks.jsonl": lines})
    parts = [name for name in bucket().names() if name.startswith("test_looks.jsonl/")]
    assert len(parts) == 10 and max(len(bucket().get(name)[0]) for name in parts) <= 121
    fetch(bucket(), tmp_path)
    assert (tmp_path / "test_looks.jsonl").read_text() == lines


def test_once_a_step_has_committed_its_rows_are_one_object(server, tmp_path, fast):
    rows = "steps/rollout-1/rows/a.jsonl"
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, {"run.json": "{}"})
        for number in range(3):
            append_line(mirror.folder / rows, {"row": number})
            wait_for(lambda number=number: len(parts_of(bucket(), rows)) > number)
        write(mirror.folder, {"steps/rollout-1/record.json": "{}"})
        wait_for(lambda: parts_of(bucket(), rows) == [f"{rows}/000000000000"])
    fetch(bucket(), tmp_path)
    assert (tmp_path / rows).read_text() == (mirror.folder / rows).read_text()


def test_whoever_reads_while_parts_become_one_finds_all(server, tmp_path, fast, monkeypatch):
    rows, get = "steps/rollout-1/rows/a.jsonl", Bucket.get
    for start, text in ((0, "a\n"), (2, "b\n"), (4, "c\n")):
        bucket().put(f"{rows}/{start:012d}", text.encode())

    def joined_meanwhile(self, name):
        found = get(self, name)
        if name.endswith("/000000000000"):
            bucket().put(f"{rows}/000000000000", b"a\nb\nc\n")
            for start in (2, 4):
                bucket().delete(f"{rows}/{start:012d}")
        return found

    monkeypatch.setattr(Bucket, "get", joined_meanwhile)
    fetch(bucket(), tmp_path)
    assert (tmp_path / rows).read_text() == "a\nb\nc\n"


def test_a_copy_at_which_a_driver_works_is_not_removed(server, tmp_path, fast):
    (tmp_path / "here/run").mkdir(parents=True)
    with RunLock(tmp_path / "here/run"), pytest.raises(RunDirError, match="has a driver at work"):
        Mirror(bucket(), tmp_path / "here").__enter__()


def test_the_same_url_at_another_store_has_another_copy(server, tmp_path, fast, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(tmp_path))
    with placed(URL) as here:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("127.0.0.1", "localhost"))
    with placed(URL) as there:
        assert here != there


def test_whoever_looks_sees_the_step_that_a_stage_is_at(server, tmp_path, fast):
    word = {"name": "search-1", "step": "search", "total": 1, "rows": None, "note": "", "since": 100.0}
    with Mirror(bucket(), tmp_path / "here") as mirror:
        files = {"job.json": {"submission_id": "x", "since": 99.0}, "progress.json": word}
        write(mirror.folder, {"run.json": "{}", **{f"stages/p/{name}": json.dumps(text) for name, text in files.items()}})
    with reading(URL) as folder:
        assert RunDir(folder).progress("p") == word


def test_who_asks_only_for_outcomes_gets_no_row(server, tmp_path, fast):
    with Mirror(bucket(), tmp_path / "here") as mirror:
        write(mirror.folder, RUN)
    with reading(URL, "outcomes") as folder:
        assert {path.name for path in folder.rglob("*") if path.is_file()} == {"run.json", "record.json", "pick.json"}
        assert not (folder / "steps").exists()


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
        wait_for(lambda: "pick.json" in bucket().names())
        with reading(URL) as folder:
            assert RunDir(folder).shown == URL and (folder / LOCK).is_file()
            assert (folder / "pick.json").is_file() and not list(folder.rglob("*.safetensors"))
    with reading(URL, "artifacts") as folder:
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
    wait_for(lambda: "pick.json" in bucket().names())
    with reading(URL) as folder, relaying(URL, folder):
        assert stop_module.stop(RunDir(folder), 30, said.append) == 0
    driver.join()
    assert "was asked to end" in said[0] and "Stopped" in said[-1] and URL in said[-1]
    assert STOP not in bucket().names()
