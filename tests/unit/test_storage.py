"""A disk that takes no more: said in words, and nothing half written stays."""

import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bt_ray.errors import StorageError
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.runs.files import append_line, full_disk, read_lines, storage, write_atomic


@contextmanager
def no_file_grows_beyond(size):
    """The system writes as much as fits, then refuses, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def row(number):
    return {"example_id": f"e{number}", "sample": 0, "accept": True, "error": None, "text": "x" * 200}


def test_half_a_row_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "rows" / "worker.jsonl"
    segment = SegmentWriter(str(path))
    segment.write(row(0))
    with no_file_grows_beyond(path.stat().st_size + 50), pytest.raises(StorageError, match=f"{path} cannot be written"):
        segment.write(row(1))
    assert path.read_bytes().endswith(b"\n")
    segment.write(row(2))
    segment.close()
    assert [key[0] for key in read_rows(path.parent)] == ["e0", "e2"]


def test_a_line_that_does_not_fit_is_not_there(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"first": 1})
    with no_file_grows_beyond(path.stat().st_size + 5), pytest.raises(StorageError):
        append_line(path, {"second": 2})
    append_line(path, {"third": 3})
    assert read_lines(path) == [{"first": 1}, {"third": 3}]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    path = tmp_path / "record.json"
    write_atomic(path, "old")
    with no_file_grows_beyond(5), pytest.raises(StorageError, match="run again: what was committed is kept"):
        write_atomic(path, "a new text that is longer")
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), storage(tmp_path):
        (tmp_path / "missing").read_text()


@pytest.mark.parametrize(
    "words",
    [
        "[Errno 28] No space left on device",
        "Error while serializing: IoError(Os { code: 28, kind: StorageFull })",
        "PytorchStreamWriter failed: file write failed (os error 28)",
        "[Errno 122] Disk quota exceeded",
    ],
)
def test_a_full_disk_is_known_by_what_libraries_say_of_it(tmp_path, words):
    try:
        try:
            raise RuntimeError(words)
        except RuntimeError as inner:
            raise ValueError("the checkpoint was not written") from inner
    except ValueError as error:
        found = full_disk(tmp_path, error)
    assert found is not None and f"{tmp_path} cannot be written: its disk is full. Free some space" in str(found)


def test_a_disk_without_space_is_full_whatever_is_said_and_another_is_not(tmp_path, monkeypatch):
    assert full_disk(tmp_path, RuntimeError("unexpected pos 64 vs 0, code: 280")) is None
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    assert full_disk(tmp_path, RuntimeError("unexpected pos 64 vs 0")) is not None
