"""A bucket as an S3 server answers for it: its places, its words, its one writer."""

import threading

import pytest

from bt_ray.errors import RunDirError, StorageError
from bt_ray.runs import writer as writer_module
from bt_ray.runs.bucket import Bucket, BusyError, Place, TakenError, place_of
from bt_ray.runs.lock import owner_is_gone
from bt_ray.runs.writer import Writer, as_lock, is_free, read_writer
from tests.support.bucket_runs import bucket, running_server, server

__all__ = ["running_server", "server"]


def test_a_place_is_a_bucket_and_a_folder():
    assert place_of("s3://my-runs/team/helpdesk/") == Place("my-runs", "team/helpdesk")
    for wrong in (
        "s3://",
        "s3://b",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket//x",
        "s3:/bucket/x",
        "s3://bucket/../x",
        "s3://B_/x",
    ):
        with pytest.raises(RunDirError, match="Write s3://BUCKET/FOLDER"):
            place_of(wrong)


def test_of_many_that_begin_at_once_one_writes(server):
    writers, won, barrier = [Writer(bucket()) for _ in range(8)], [], threading.Barrier(8)

    def begin(writer):
        barrier.wait()
        try:
            writer.take()
            won.append(writer)
        except RunDirError:
            pass

    threads = [threading.Thread(target=begin, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and read_writer(bucket())[0]["token"] == won[0].token


HERE = {"machine": "boot 1", "pid": 5}


@pytest.mark.parametrize(
    ("owner", "start", "silent_s", "free"),
    [
        (None, None, 0.0, True),
        ({"released": True, "machine": "boot 2"}, None, 0.0, True),
        ({"machine": "boot 1", "pid": 4, "process_start": "7"}, "7", 9999.0, False),
        ({"machine": "boot 1", "pid": 4, "process_start": "7"}, "8", 0.0, True),
        ({"machine": "boot 1", "pid": 4, "process_start": "7"}, None, 0.0, True),
        ({"machine": "boot 1", "pid": 5, "process_start": "7"}, "7", 1.0, False),
        ({"machine": "boot 2", "pid": 4, "heartbeat": 0.0}, None, writer_module.STALE_S - 1, False),
        ({"machine": "boot 2", "pid": 4, "heartbeat": 4e9}, None, writer_module.STALE_S + 1, True),
    ],
)
def test_when_a_writer_may_be_succeeded(owner, start, silent_s, free):
    assert is_free(owner, HERE, start, silent_s) is free


def test_a_copys_lock_says_of_the_writer_what_the_bucket_says():
    """Whatever the clocks of the two machines, and where both have the same name."""
    here = {"machine": "boot 1", "host": "node"}
    near, far = {"machine": "boot 1", "host": "node", "heartbeat": 5.0}, {"machine": "boot 2", "host": "node", "heartbeat": 5.0}
    for owner in (near, far, {**far, "host": "other"}):
        for gone in (True, False):
            lock = as_lock(owner, here, gone, 1000.0)
            found = owner_is_gone({**lock, "process_start": "7"}, "node", None if gone else "7", 1000.0)
            assert found is gone and lock["beat"] == 5.0
    assert as_lock(near, here, False, 0.0)["host"] == "node" != as_lock(far, here, False, 0.0)["host"]


def test_how_long_a_writer_is_silent_is_told_by_the_stores_clock(server, monkeypatch):
    monkeypatch.setattr(writer_module.time, "time", lambda: 0.0)  # this machine's clock is half a century behind
    Writer(bucket()).take()
    assert 0.0 <= read_writer(bucket()).silent_s < 60.0


def test_a_store_that_does_not_heed_conditions_is_refused(server):
    server.heeds_conditions = False
    with pytest.raises(StorageError, match=r"no conditional writes .*does not heed them"):
        Writer(bucket()).take()
    bucket().delete("writer.json")
    faults = iter([None, None, *["503"] * 3])  # the first time its word is written, and no more is known
    server.fault = lambda method, path: next(faults, None)
    writer = Writer(bucket())
    with pytest.raises(BusyError):
        writer.take()
    with pytest.raises(StorageError, match=r"no conditional writes .*does not heed them"):
        writer.take()


def test_a_writer_whose_first_answer_was_lost_holds_the_run(server):
    writer = Writer(bucket())
    writer.take()
    writer.take()
    writer.renew(changes=True)
    assert read_writer(bucket())[0]["newest"] == writer.token


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AccessDenied", StorageError, "the bucket refuses: AccessDenied"),
        (404, "NoSuchBucket", StorageError, "the bucket refuses: NoSuchBucket"),
        (501, "NotImplemented", StorageError, "no conditional writes"),
        (400, "RequestTimeout", BusyError, "does not answer"),
        (503, "SlowDown", BusyError, "does not answer"),
        (500, "InternalError", BusyError, "does not answer"),
    ],
)
def test_what_the_bucket_says_in_our_words(server, status, code, kind, words):
    from botocore.stub import Stubber

    tried = bucket()
    with Stubber(tried._client) as stub, pytest.raises(kind, match=words) as raised:
        stub.add_client_error("put_object", service_error_code=code, http_status_code=status)
        tried.put("run.json", b"{}")
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict"), (404, "NoSuchKey")]
)
def test_a_conditional_write_that_came_too_late(server, status, code):
    from botocore.stub import Stubber

    tried = bucket()
    with Stubber(tried._client) as stub, pytest.raises(TakenError, match="somebody else"):
        stub.add_client_error("put_object", service_error_code=code, http_status_code=status)
        tried.put_if("writer.json", b"{}", "version")


def test_a_bucket_that_is_not_there_and_keys_that_are_not_there(server, monkeypatch):
    with pytest.raises(StorageError, match="refuses: NoSuchBucket"):
        Bucket(Place("nowhere", "x")).names()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(BusyError, match="does not answer"):
        bucket().names()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="aws s3 ls"):
        bucket().put("x", b"")
