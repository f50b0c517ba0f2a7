"""Runs of `bt-ray` in processes of their own, which a test may interrupt and count."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

MARK = f"BT_RAY_TEST_{os.getpid()}"  # other runs on this machine are not ours to count


def command(*arguments: object) -> list[str]:
    """The command line of `bt-ray` with `arguments`."""
    return [sys.executable, "-m", "bt_ray.cli", *map(str, arguments)]


def bt_ray(*arguments: object, check: bool = True, timeout_s: float = 800.0) -> subprocess.CompletedProcess[str]:
    """Run `bt-ray` to its end; with `check` an exit code other than 0 fails the test with what was printed.

    `timeout_s` is to be below the test's own time limit, so that the run is ended and not only the test.
    """
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False, env=marked())
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def marked() -> dict[str, str]:
    """This environment with the mark that `our_processes` looks for."""
    return {**os.environ, MARK: "1"}


def our_processes() -> set[int]:
    """Processes that `bt_ray` of this test process started, however far down: they inherit its environment."""
    found = set()
    for process in psutil.process_iter():
        try:
            if MARK in process.environ():
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def family(pid: int) -> list[psutil.Process]:
    """A driver's processes: those of its cluster, its engines and its jobs are all below it."""
    return psutil.Process(pid).children(recursive=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until `condition()` holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
