"""One writer per run in a bucket: an object that only who knows its present version may change.

The writer renews it while it is at work. One that is silent for STALE_S is succeeded: whoever replaces the version that it
left is the new one, and the old one, should it wake up, finds its version gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from typing import Any

from bt_ray.errors import RunDirError
from bt_ray.runs.bucket import Bucket, TakenError
from bt_ray.runs.lock import process_start

WRITER = "writer.json"
STALE_S = 180.0


def is_free(owner: dict[str, Any] | None, host: str, start: str | None, now: float) -> bool:
    """Whether the place of `owner` may be taken. `start`: start time of its process on this host. Pure but for the look at
    its own process, whose earlier drivers are judged by their silence, as those elsewhere."""
    if owner is None or owner.get("released"):
        return True
    if owner.get("host") == host and owner.get("pid") != os.getpid():
        return start is None or start != owner.get("process_start")
    return now - float(owner.get("heartbeat", 0)) > STALE_S


class Writer:
    """The right to write to a run in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._version: str | None = None
        self.token = uuid.uuid4().hex

    def take(self) -> str | None:
        """Become the writer. Returns the token of the one before, None where there was none. Raises RunDirError where
        another is at work."""
        owner, self._version = read_writer(self._bucket)
        start = process_start(int(owner.get("pid", 0))) if owner else None
        if not is_free(owner, socket.gethostname(), start, time.time()):
            assert owner is not None
            raise RunDirError(self._held(f"process {owner.get('pid')} on {owner.get('host')}"))
        try:
            self._write(released=False)
        except TakenError:
            raise RunDirError(self._held("another driver, since just now")) from None
        return str(owner["token"]) if owner else None

    def renew(self) -> None:
        """Show that this writer is at work. Raises TakenError where it has been succeeded."""
        self._write(released=False)

    def release(self) -> None:
        """Give the place back; the token stays, and says whose copy is the newest. Raises TakenError."""
        self._write(released=True)

    def _write(self, released: bool) -> None:
        pid = os.getpid()
        owner = {"host": socket.gethostname(), "pid": pid, "process_start": process_start(pid), "token": self.token}
        text = json.dumps({**owner, "heartbeat": time.time(), "released": released}).encode()
        try:
            self._version = self._bucket.put_if(WRITER, text, self._version)
        except TakenError:
            now, version = read_writer(self._bucket)
            if not now or now["token"] != self.token:
                raise
            # Its own word: the answer to an earlier write was lost on its way.
            self._version = self._bucket.put_if(WRITER, text, version)

    def _held(self, who: str) -> str:
        url = self._bucket.place.url
        return f"{url} is being written by {who}. Wait for it, or stop it with `bt-ray stop {url}`; a run has one driver."


def read_writer(bucket: Bucket) -> tuple[dict[str, Any] | None, str | None]:
    """Who writes or wrote last, and the version of that word; (None, None) where nobody has."""
    found = bucket.get(WRITER)
    if found is None:
        return None, None
    try:
        owner = json.loads(found[0])
    except ValueError:
        owner = None
    if not isinstance(owner, dict) or not isinstance(owner.get("token"), str):
        raise RunDirError(f"{bucket.place.url}/{WRITER} is damaged. Delete it once no driver is at work on that run.")
    return owner, found[1]
