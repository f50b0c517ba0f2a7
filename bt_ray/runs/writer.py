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
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bt_ray.errors import RunDirError
from bt_ray.runs.bucket import Bucket, TakenError, unconditional
from bt_ray.runs.lock import process_start

WRITER = "writer.json"
STALE_S = 300.0  # one that lives may wait three minutes for an answer


class Word(NamedTuple):
    """Who writes a run or wrote it last, the version of that word, and its age in seconds by the store's clock."""

    owner: dict[str, Any] | None = None
    version: str | None = None
    silent_s: float = 0.0


def is_free(owner: dict[str, Any] | None, here: dict[str, Any], start: str | None, silent_s: float) -> bool:
    """Whether the place of `owner` may be taken. `here`: this process as `itself` tells of it; `start`: start time of the
    owner's process number on this machine; `silent_s`: since its last word. Pure.

    An owner on this machine is judged by its process, all others, and earlier drivers of this very process, by their silence.
    """
    if owner is None or owner.get("released"):
        return True
    if owner.get("machine") == here["machine"] and owner.get("pid") != here["pid"]:
        return start is None or start != owner.get("process_start")
    return silent_s > STALE_S


def as_lock(owner: dict[str, Any], here: dict[str, Any], is_gone: bool, now: float) -> dict[str, Any]:
    """The lock of a run whose writer is `owner`, for a copy on this machine in which `lock.py` is to find the same: its
    heartbeat is now, or long ago where the writer `is_gone`. `beat` changes with each sign of life. Pure."""
    is_namesake = owner.get("machine") != here["machine"] and owner.get("host") == here["host"]
    host = f"{owner.get('host')} (another machine of this name)" if is_namesake else owner.get("host")
    return {**owner, "host": host, "heartbeat": 0.0 if is_gone else now, "beat": owner.get("heartbeat")}


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
        owner, self._version, silent_s = read_writer(self._bucket)
        self.newest = owner.get("newest") if owner else None
        if owner and owner["token"] == self.token:  # the answer to an earlier try was lost on its way
            return self._need_conditions()
        if owner and not is_free(owner, itself(), process_start(int(owner.get("pid", 0))), silent_s):
            raise RunDirError(self._held(f"process {owner.get('pid')} on {owner.get('host')}"))
        try:
            self._write(released=False)
        except TakenError:
            raise RunDirError(self._held("another driver, since just now")) from None
        self._need_conditions()

    def _need_conditions(self) -> None:
        """Raise StorageError where the store takes conditions without heeding them, as some do."""
        for condition in (None, '"no version"'):
            with suppress(TakenError):
                self._bucket.put_if(WRITER, self._text(released=False), condition)
                raise unconditional(self._bucket.place.url, "it does not heed them")

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
            now, text = time.time(), self._text(released)
            try:
                self._version = self._bucket.put_if(WRITER, text, self._version)
            except TakenError:
                owner, version, _ = read_writer(self._bucket)
                if not owner or owner["token"] != self.token:
                    raise
                # Its own word: the answer to an earlier write was lost on its way.
                self._version = self._bucket.put_if(WRITER, text, version)
            self._renewed = now

    def _text(self, released: bool) -> bytes:
        word = {"token": self.token, "newest": self.newest, "heartbeat": time.time(), "released": released}
        return json.dumps({**itself(), **word}).encode()

    def _held(self, who: str) -> str:
        url = self._bucket.place.url
        return f"{url} is being written by {who}. Wait for it, or stop it with `bt-ray stop {url}`; a run has one driver."


def read_writer(bucket: Bucket) -> Word:
    """The writer's last word, an empty one where nobody has written yet. Raises RunDirError where it cannot be read."""
    found = bucket.get(WRITER)
    if found is None:
        return Word()
    try:
        owner = json.loads(found.data)
    except ValueError:
        owner = None
    if not isinstance(owner, dict) or not isinstance(owner.get("token"), str):
        raise RunDirError(f"{bucket.place.url}/{WRITER} is damaged. Delete it once no driver is at work on that run.")
    return Word(owner, found.version, found.age_s)
