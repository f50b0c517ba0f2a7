"""One stage at a time works on a step: whoever needs the same result waits for it.

Branches that run side by side share steps (the rollouts of their parent's program). Without a claim
both would make them, and pay twice, and the older attempt would end as fenced off. Steps that share
only some of their rows are made one after the other too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bt_ray.errors import RunDirError
from bt_ray.runs.commit import Record, Step
from bt_ray.runs.lock import RunLock

POLL_S = 1.0


@contextmanager
def claimed(step: Step) -> Iterator[Record | None]:
    """The step's record, at once or when the stage that is at it has committed. None: this caller
    holds the step and makes it. A holder that died is succeeded, as with a run's lock. CommitError.
    """
    with ExitStack() as held:
        yield _record_or_claim(step, held)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process holds this folder, and hold it."""
    with ExitStack() as held:
        while not _held(folder, held):
            time.sleep(POLL_S)
        yield


def _record_or_claim(step: Step, held: ExitStack) -> Record | None:
    while (record := step.record()) is None:
        if _held(step.folder, held):
            return step.record()  # it may have been committed between the look and the lock
        time.sleep(POLL_S)
    return record


def _held(folder: Path, held: ExitStack) -> bool:
    """Whether the folder is held from now on; False where another process that lives holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(RunLock(folder))
    except RunDirError:
        return False
    return True
