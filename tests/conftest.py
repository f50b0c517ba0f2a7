"""A test session that leaves a process behind fails: all that it starts inherits its mark."""

from __future__ import annotations

import os
import time
import uuid

import psutil
import pytest
from hypothesis import settings

MARK = "BT_RAY_TEST_SESSION"
PATIENCE_S = 60.0  # a cluster that was told to end takes a while
settings.register_profile("untimed", deadline=None)  # no test is one of speed: machines are shared
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not one of xdist's workers, which inherit it
        os.environ[MARK] = uuid.uuid4().hex


def left_behind(mark: str) -> list[str]:
    """Command lines of the processes that carry `mark`, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get(MARK) != mark or process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = " ".join(process.cmdline())
            if "multiprocessing.resource_tracker" not in words:  # Python's own, which ends with this process
                found.append(f"{process.pid} {words[:200]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.hookimpl(trylast=True)  # after xdist has ended its workers
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    deadline = time.monotonic() + PATIENCE_S
    while (found := left_behind(os.environ[MARK])) and time.monotonic() < deadline:
        time.sleep(0.5)
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.get_terminal_writer().line("\n" + "\n".join(["processes were left behind:", *found]))
