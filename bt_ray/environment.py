"""The process's surroundings: environment variables for a while, its parent and its end, and the name that it was called by."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables, for this process and those that it starts, and put back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def exit_hard(reason: str) -> None:
    """End this process at once, and before it those that it started, which may hang as well; nothing is cleaned up."""
    import psutil

    log.error("process %d exits: %s", os.getpid(), reason)
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def end_with_parent() -> None:
    """From now on the kernel ends this process when the one that started it ends, however that was: nothing of a run
    outlives its cluster, not even a process that hangs in its own exit (Linux; nothing elsewhere).

    The kernel forgets the wish with the thread that had it, and an actor's threads come and go: so a thread of its own has it.
    """
    if sys.platform != "linux":
        return
    bound = threading.Event()
    threading.Thread(target=_bind, args=(os.getppid(), bound), name="end-with-parent", daemon=True).start()
    bound.wait()


def _bind(parent: int, bound: threading.Event) -> None:
    import ctypes  # not on the way to `bt-ray --help`

    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)
    finally:
        bound.set()
    threading.Event().wait()


def own_command() -> str:
    """The word that runs this tool again: `bt-ray`, or its path where the shell would not find it by name."""
    called = sys.argv[0]
    return called if Path(called).name == "bt-ray" and shutil.which("bt-ray") is None else "bt-ray"
