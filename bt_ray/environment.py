"""The process's surroundings: environment variables for a while, and the name that it was called by."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)


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


def own_command() -> str:
    """The word that runs this tool again: `bt-ray`, or its path where the shell would not find it by name."""
    called = sys.argv[0]
    return called if Path(called).name == "bt-ray" and shutil.which("bt-ray") is None else "bt-ray"
