"""The process's surroundings: environment variables for a while, and the name that it was called by."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# glibc gives large blocks back to the system at each free, and every forward pass on a CPU then faults its activations
# in again, page by page. With these, a process that computes keeps what it has had. (32 MiB is the most that glibc takes.)
KEEP_MEMORY = (("MALLOC_MMAP_THRESHOLD_", str(32 << 20)), ("MALLOC_TRIM_THRESHOLD_", str(16 << 30)))


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
