"""One driver per run directory: a lock file with its owner.

The owner is a process (host, pid, its start time) with a heartbeat. A lock whose process is
gone on this host, or whose heartbeat stopped on another, is taken over.

Who wants the driver to stop writes `stop.json` beside the lock, with the token of the lock that is meant:
a request that was left behind is none to the next driver.
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
from typing import Any

from bt_ray.errors import CommitError, RunDirError, StorageError
from bt_ray.runs.files import publish_once, read_json, write_atomic

LOCK = "lock.json"
STOP = "stop.json"
HEARTBEAT_S = 5.0
STALE_S = 60.0  # an owner on another host is gone when it is silent for so long


def process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot (Linux), or None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


def owner_is_gone(owner: dict[str, Any], host: str, start: str | None, now: float) -> bool:
    """Pure: may the lock of `owner` be taken? `start` is the start time of its pid on this host."""
    if owner.get("host") == host:
        return start is None or start != owner.get("process_start")
    return bool(now - float(owner.get("heartbeat", 0)) > STALE_S)


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether an owner's process is gone, as far as this host can tell."""
    return owner_is_gone(owner, socket.gethostname(), process_start(int(owner.get("pid", 0))), time.time())


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or not _is_owner(found):
        raise CommitError(f"{path} is damaged. Delete it where no driver is at work on the run.")
    return dict(found)


def _is_owner(found: dict[str, Any]) -> bool:
    """Whether what is there can be an owner, or a request to stop one; the token becomes a part of a file's name."""
    pid, heartbeat, token = found.get("pid", 0), found.get("heartbeat", 0), found.get("token")
    named = isinstance(token, str) and token.isprintable() and "/" not in token and len(token) <= 50
    return named and type(pid) is int and isinstance(heartbeat, (int, float)) and abs(heartbeat) < 1e15


def owner_of(run_dir: Path) -> dict[str, Any] | None:
    """Who holds the run, or held it when its process ended; None where the lock was given back."""
    return _read_or_none(run_dir / LOCK)


def is_held(run_dir: Path) -> bool:
    """Whether a driver that is alive, as far as this host can tell, holds the run."""
    owner = owner_of(run_dir)
    return owner is not None and not is_gone(owner)


def ask_to_stop(run_dir: Path, owner: dict[str, Any]) -> None:
    """Ask the driver that holds the run as `owner` to stop. Raises OSError or StorageError where the directory cannot be
    written."""
    write_atomic(run_dir / STOP, json.dumps({"token": owner["token"]}))


class RunLock:
    """Context manager that holds `<run>/lock.json`. Raises RunDirError if another driver does."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / LOCK
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        if not publish_once(self.path, self._text()):
            owner = _read_or_none(self.path)
            if owner is None:
                raise RunDirError(f"{self.path.parent}: another driver ended just now. Run the same command again.")
            if not is_gone(owner):
                raise RunDirError(
                    f"{self.path.parent} is being written by process {owner.get('pid')} on {owner.get('host')}. "
                    f"Wait for it, or stop it with `bt-ray stop {self.path.parent}`; a run has one driver."
                )
            self._take_over(owner)
        self._thread = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self.holds():
            self.path.with_name(STOP).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether this object still owns the lock (another host may have taken it from a sleeper)."""
        return (_read_or_none(self.path) or {}).get("token") == self._token

    def is_asked_to_stop(self) -> bool:
        """Whether somebody asked the holder of this very lock to stop."""
        return (_read_or_none(self.path.with_name(STOP)) or {}).get("token") == self._token

    def _take_over(self, owner: dict[str, Any]) -> None:
        """Succeed a dead owner. A claim is named by the token that it succeeds, so one of many wins it;
        a claim whose own maker died is succeeded the same way."""
        claims, token = [], owner.get("token")
        while True:
            claims.append(self.path.with_name(f".lock.after.{token}"))
            if publish_once(claims[-1], self._text()):
                break
            holder = _read_or_none(claims[-1])
            if holder is None or not is_gone(holder):
                raise RunDirError(self._taken())
            token = holder["token"]
        now = _read_or_none(self.path)
        if now is None or now.get("token") != owner.get("token"):  # somebody succeeded before this claim was made
            claims[-1].unlink()
            raise RunDirError(self._taken())
        write_atomic(self.path, self._text())
        for claim in claims:
            claim.unlink(missing_ok=True)

    def _taken(self) -> str:
        return f"{self.path.parent} was taken over by another driver just now. Try again when it ends."

    def _text(self) -> str:
        pid = os.getpid()
        owner = {"host": socket.gethostname(), "pid": pid, "process_start": process_start(pid)}
        return json.dumps({**owner, "token": self._token, "heartbeat": time.time()})

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            if not self.holds():
                return
            # A disk that is full now may not be at the next beat; the driver's own writes say that it is.
            with suppress(StorageError, OSError):
                write_atomic(self.path, self._text())
