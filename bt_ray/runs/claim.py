"""One stage at a time works on a step: whoever needs the same result waits for it.

Branches that run side by side share steps (the rollouts of their parent's program). Without a claim
both would make them, and pay twice, and the older attempt would end as fenced off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


def _record_or_claim(step: Step, held: ExitStack) -> Record | None:
    while (record := step.record()) is None:
        step.folder.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(RunLock(step.folder))
        except RunDirError:  # held by a process that lives
            time.sleep(POLL_S)
            continue
        return step.record()  # it may have been committed between the look and the lock
    return record
