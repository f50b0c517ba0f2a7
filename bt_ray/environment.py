"""The process's surroundings: environment variables for a while, and the name that it was called by."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


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


def own_command() -> str:
    """The word that runs this tool again: `bt-ray`, or its path where the shell would not find it by name."""
    called = sys.argv[0]
    return called if Path(called).name == "bt-ray" and shutil.which("bt-ray") is None else "bt-ray"
