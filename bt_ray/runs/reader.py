"""Looking at a run in a bucket from anywhere: a copy of its own, for as long as it is looked at."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bt_ray.errors import RunDirError, StorageError
from bt_ray.runs.bucket import Bucket, place_of
from bt_ray.runs.files import write_atomic
from bt_ray.runs.lock import LOCK, STOP
from bt_ray.runs.objects import fetch
from bt_ray.runs.run_dir import PLACE
from bt_ray.runs.writer import read_writer

RELAY_S = 1.0


@contextmanager
def reading(url: str, whole: bool = False) -> Iterator[Path]:
    """The run at `url` as a folder, which goes with the block. Without `whole`: but for the artifacts of its steps.

    Raises RunDirError where there is no run, StorageError where the bucket does not answer.
    """
    bucket = Bucket(place_of(url))
    with tempfile.TemporaryDirectory(prefix="bt_ray-") as root:
        folder = Path(root, Path(bucket.place.prefix).name)
        folder.mkdir()
        write_atomic(Path(root, PLACE), json.dumps({"url": url}))
        _show_writer(bucket, folder)
        fetch(bucket, folder, lambda name: whole or "/files-" not in name)
        if not (folder / "run.json").is_file():
            raise RunDirError(f"{url} holds no run (it has no run.json). Start one with `bt-ray run CONFIG --run-dir {url}`.")
        yield folder


@contextmanager
def relaying(url: str, folder: Path) -> Iterator[None]:
    """While the block lasts, the folder's lock is that of the run at `url`, and a request to stop goes there."""
    bucket, end, sent = Bucket(place_of(url)), threading.Event(), b""

    def send() -> None:
        nonlocal sent
        asked = (folder / STOP).read_bytes() if (folder / STOP).is_file() else b""
        if asked != sent:
            bucket.put(STOP, asked) if asked else bucket.delete(STOP)
            sent = asked

    def relay() -> None:
        while not end.wait(RELAY_S):
            with suppress(StorageError, RunDirError, OSError):  # asked again a second later; who waits has a limit
                send()
                _show_writer(bucket, folder)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        send()


def _show_writer(bucket: Bucket, folder: Path) -> None:
    """Write the folder's lock as that of the driver which is at work on the run, or remove it."""
    owner: dict[str, Any] | None = read_writer(bucket)[0]
    if owner is None or owner.get("released"):
        (folder / LOCK).unlink(missing_ok=True)
    else:
        write_atomic(folder / LOCK, json.dumps(owner))
