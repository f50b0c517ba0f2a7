"""Which tests share a process where they run in several (`--dist loadfile`), and that none of them leaves one behind."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import pytest

OURS = "BT_RAY_TEST_SESSION"  # a variable that every process inherits which a test starts, however far down
END_TIMEOUT_S = 60.0

SHARED = ("tests/faults/test_one_run_through_all.py", "tests/faults/test_loss_of_nodes.py")  # one run that nobody disturbs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file, and of the files that share a run, go to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return SHARED[0] if file in SHARED else file

    return Scheduler(config, log)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(OURS, str(os.getpid()))  # in the first process: those that run tests beside it inherit it


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session where a process that it started is still there after a while."""
    if os.environ[OURS] != str(os.getpid()):
        return
    deadline = time.monotonic() + END_TIMEOUT_S
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        print("\nleft behind:", *left, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _left_behind() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(OURS) == str(os.getpid()):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
