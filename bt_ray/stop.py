"""`bt-ray stop`: ask the driver of a run to stop, by a file in the run directory.

No cluster is asked, so it works wherever the run directory is mounted. The driver looks for the file about twice a
second and then does what Ctrl-C does: its stage jobs are stopped, what was committed stays, the lock is given back.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable
from typing import Any

from bt_ray.environment import own_command
from bt_ray.errors import RunDirError, StorageError
from bt_ray.runs.lock import HEARTBEAT_S, STOP, ask_to_stop, is_gone, owner_of
from bt_ray.runs.opening import is_complete
from bt_ray.runs.run_dir import RunDir

POLL_S = 0.5
SILENCE_S = 3 * HEARTBEAT_S  # who lives writes its heartbeat within that time, whatever this machine's clock says

Say = Callable[[str], None]


def stop(run: RunDir, wait_s: float, say: Say) -> int:
    """Stop the driver of the run and wait for its end. Returns the exit code: 0 where none runs any more, else 1.

    Raises RunDirError where the request cannot be written.
    """
    owner = owner_of(run.root)
    if owner is None or not _lives(run, owner):
        say(_nothing_to_stop(run, owner))
        return 0
    try:
        ask_to_stop(run.root, owner)
    except (OSError, StorageError) as error:
        why = getattr(error.__cause__ or error, "strerror", error)  # the system's own word for it
        raise RunDirError(
            f"{run.shown}: the request to stop cannot be written there ({why}). Ask as a user who may write to the "
            f"folder, or stop {_name(owner)} with Ctrl-C."
        ) from None
    say(f"Stopping: {_name(owner)} was asked to end. Its stage jobs end first; this waits {wait_s:g} s at most.")
    last = _await_end(run, owner, wait_s)
    if last is not None:
        say(_still_there(run, last, is_silent=_beat(last) == _beat(owner)))
        return 1
    say(_ended(run, owner))
    return 0


def _lives(run: RunDir, owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock is alive. One on another host whose heartbeat looks old is watched for a while:
    the clocks of two machines may differ."""
    if not is_gone(owner):
        return True
    if owner.get("host") == socket.gethostname():
        return False
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = owner_of(run.root)
        if now is None or now.get("token") != owner["token"]:
            return False
        if _beat(now) != _beat(owner):
            return True
    return False


def _beat(owner: dict[str, Any]) -> Any:
    """What changes with each sign of life of an owner. Of a run in a bucket the copy's lock has it beside its heartbeat."""
    return owner.get("beat", owner.get("heartbeat"))


def _await_end(run: RunDir, owner: dict[str, Any], wait_s: float) -> dict[str, Any] | None:
    """None once the owner holds the run no more; else its lock as it was last read."""
    deadline = time.monotonic() + wait_s
    while True:
        now = owner_of(run.root)
        if now is None or now.get("token") != owner["token"]:
            return None
        if now.get("host") == socket.gethostname() and is_gone(now):
            return None
        if time.monotonic() >= deadline:
            return now
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _nothing_to_stop(run: RunDir, owner: dict[str, Any] | None) -> str:
    if is_complete(run):
        return f"Nothing to stop: the run in {run.shown} is finished. See it with: {_verb('report', run)}"
    if owner is None:
        return f"Nothing to stop: no driver is at work on {run.shown}. {_go_on(run)}"
    return (
        f"Nothing to stop: {_name(owner)}, the last driver of {run.shown}, is gone and left its lock behind. `bt-ray run` takes "
        "the lock over, adopts stage jobs that its cluster still runs, and goes on from what is committed."
    )


def _still_there(run: RunDir, owner: dict[str, Any], is_silent: bool) -> str:
    request = f"The request stays in {run.shown}/{STOP} and is for this driver alone"
    if is_silent:
        return (
            f"Not stopped: {_name(owner)} has shown no sign of life meanwhile; it may be gone, or its storage slow. {request}. "
            f"Look again with: {_verb('status', run)}"
        )
    return (
        f"Not stopped yet: {_name(owner)} is alive and still holds the run; it may be starting its cluster or engines, or be "
        f"waiting for its stage jobs to end. {request}: it stops when it reads it. Wait again with: {_verb('stop', run)}"
    )


def _ended(run: RunDir, owner: dict[str, Any]) -> str:
    (run.root / STOP).unlink(missing_ok=True)  # a driver that was killed has not removed it
    now = owner_of(run.root)
    if now is not None and now.get("token") != owner["token"]:
        return f"Stopped: {_name(owner)} has ended. {_name(now)} has taken the run since, and was not asked to stop."
    if now is not None:
        return f"Stopped: {_name(owner)} ended without giving its lock back. `bt-ray run` takes it over and goes on."
    if is_complete(run):
        return f"The run in {run.shown} was finished before its driver read the request. See it with: {_verb('report', run)}"
    return f"Stopped. What was committed is kept. {_go_on(run)}"


def _go_on(run: RunDir) -> str:
    return f"To go on, give the command that began the run again, with --run-dir {shlex.quote(run.shown)}"


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _verb(name: str, run: RunDir) -> str:
    return shlex.join([own_command(), name, run.shown])
