"""Looking at a run in a bucket from anywhere: a copy of its own, for as long as it is looked at."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from bt_ray.errors import RunDirError, StorageError
from bt_ray.runs.bucket import Bucket, place_of
from bt_ray.runs.files import write_atomic
from bt_ray.runs.lock import LOCK, STOP, process_start
from bt_ray.runs.objects import fetch, step_of_artifact
from bt_ray.runs.run_dir import PLACE
from bt_ray.runs.writer import as_lock, is_free, itself, read_writer

RELAY_S = 1.0


Part = Literal["outcomes", "rows", "artifacts"]  # each with what is before it


@contextmanager
def reading(url: str, part: Part = "rows") -> Iterator[Path]:
    """The run at `url`, or the part of it that is wanted, as a folder, which goes with the block.

    Raises RunDirError where there is no run, StorageError where the bucket does not answer.
    """
    bucket = Bucket(place_of(url))
    with tempfile.TemporaryDirectory(prefix="bt_ray-") as root:
        folder = Path(root, Path(bucket.place.prefix).name)
        folder.mkdir()
        write_atomic(Path(root, PLACE), json.dumps({"url": url}))
        _show_writer(bucket, folder)
        fetch(bucket, folder, lambda name: is_wanted(name, part))
        _show_writer(bucket, folder)  # once more: that may have taken longer than who holds a lock may be silent
        if not (folder / "run.json").is_file():
            raise RunDirError(f"{url} holds no run (it has no run.json). Start one with `bt-ray run CONFIG --run-dir {url}`.")
        yield folder


def is_wanted(name: str, part: Part) -> bool:
    """Whether an object belongs to a part of its run. Pure."""
    if part == "outcomes":
        return not name.startswith(("steps/", "examples/"))
    return part == "artifacts" or step_of_artifact(name) is None


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
    owner, _, silent_s = read_writer(bucket)
    if owner is None or owner.get("released"):
        (folder / LOCK).unlink(missing_ok=True)
        return
    gone = is_free(owner, itself(), process_start(int(owner.get("pid", 0))), silent_s)
    write_atomic(folder / LOCK, json.dumps(as_lock(owner, itself(), gone, time.time())))
