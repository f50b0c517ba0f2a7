"""A server with an empty bucket for each test, and a run's files in small."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bt_ray.runs import bucket as bucket_module
from bt_ray.runs import mirror as mirror_module
from bt_ray.runs.bucket import Bucket, Place, place_of
from bt_ray.runs.files import write_atomic
from tests.support.bucket_server import BUCKET, ENVIRONMENT, bucket_server

URL = f"s3://{BUCKET}/team/run"
RUN = {
    "run.json": "{}",
    "examples/train.jsonl": "{}\n",
    "steps/rollout-1/attempt-0001.json": "{}",
    "steps/rollout-1/rows/a.jsonl": '{"row": 1}\n',
    "steps/finetune-1/files-0001/adapter/x.safetensors": "numbers",
    "steps/finetune-1/record.json": "{}",
    "stages/w/record.json": "{}",
    "pick.json": "{}",
}


@pytest.fixture(scope="module")
def running_server():
    with bucket_server() as server:
        yield server


@pytest.fixture
def server(running_server, monkeypatch):
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": running_server.url}.items():
        monkeypatch.setenv(name, value)
    running_server.fault, running_server.heeds_conditions = lambda method, path: None, True
    bucket = Bucket(Place(BUCKET, "team"))
    for name in bucket.names():
        bucket.delete(name)
    running_server.requests.clear()
    return running_server


@pytest.fixture
def fast(monkeypatch):
    for name, value in (("SYNC_S", 0.1), ("BEAT_S", 0.1), ("RETRY_S", 0.05)):
        monkeypatch.setattr(mirror_module, name, value)
    monkeypatch.setattr(bucket_module, "READ_TIMEOUT_S", 2)


def bucket():
    return Bucket(place_of(URL))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        write_atomic(folder / name, text)


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
