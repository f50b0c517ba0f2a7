"""One writer per run in a bucket: an object that only who knows its present version may change.

The writer renews it while it is at work. One that is silent for STALE_S is succeeded: whoever replaces the version that it
left is the new one, and the old one, should it wake up, finds its version gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from bt_ray.errors import RunDirError
from bt_ray.runs.bucket import Bucket, TakenError
from bt_ray.runs.lock import process_start

WRITER = "writer.json"
STALE_S = 300.0  # one that lives may wait three minutes for an answer


def is_free(owner: dict[str, Any] | None, here: dict[str, Any], start: str | None, now: float) -> bool:
    """Whether the place of `owner` may be taken. `here`: this process as `itself` tells of it; `start`: start time of the
    owner's process number on this machine. Pure.

    An owner on this machine is judged by its process, all others, and earlier drivers of this very process, by their silence.
    """
    if owner is None or owner.get("released"):
        return True
    if owner.get("machine") == here["machine"] and owner.get("pid") != here["pid"]:
        return start is None or start != owner.get("process_start")
    return now - float(owner.get("heartbeat", 0)) > STALE_S


def itself() -> dict[str, Any]:
    """This process, so that another on the same machine can tell whether it lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "process_start": process_start(pid)}


def _machine() -> str:
    """Where process numbers mean the same: this boot and this namespace. Names of hosts are used twice."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


class Writer:
    """The right to write to a run in a bucket. Safe in several threads.

    `newest` is the token of whoever last changed anything there, which a writer that only came and went is not.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._version: str | None = None
        self._lock = threading.Lock()
        self._renewed = 0.0
        self.token = uuid.uuid4().hex
        self.newest: str | None = None

    def take(self) -> None:
        """Become the writer. Raises RunDirError where another is at work."""
        owner, self._version = read_writer(self._bucket)
        self.newest = owner.get("newest") if owner else None
        if owner and owner["token"] == self.token:  # the answer to an earlier try was lost on its way
            return
        start = process_start(int(owner.get("pid", 0))) if owner else None
        if not is_free(owner, itself(), start, time.time()):
            assert owner is not None
            raise RunDirError(self._held(f"process {owner.get('pid')} on {owner.get('host')}"))
        try:
            self._write(released=False)
        except TakenError:
            raise RunDirError(self._held("another driver, since just now")) from None

    def renew(self, changes: bool = False) -> None:
        """Show that this writer is at work; `changes`: and about to change something. Raises TakenError where it has been
        succeeded."""
        if changes:
            self.newest = self.token
        self._write(released=False)

    def confirm(self, max_age_s: float) -> None:
        """`renew`, where that was longer ago by the clock on the wall, which runs on while a machine sleeps."""
        if time.time() - self._renewed > max_age_s:
            self.renew()

    def release(self) -> None:
        """Give the place back. Raises TakenError."""
        self._write(released=True)

    def _write(self, released: bool) -> None:
        with self._lock:
            now = time.time()
            data = {**itself(), "token": self.token, "newest": self.newest, "heartbeat": now, "released": released}
            text = json.dumps(data).encode()
            try:
                self._version = self._bucket.put_if(WRITER, text, self._version)
            except TakenError:
                owner, version = read_writer(self._bucket)
                if not owner or owner["token"] != self.token:
                    raise
                # Its own word: the answer to an earlier write was lost on its way.
                self._version = self._bucket.put_if(WRITER, text, version)
            self._renewed = now

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
