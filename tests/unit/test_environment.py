"""What ends with what: a process that is bound to its parent, and one that is not."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

BOUND = """
import signal, sys, threading, time
from bt_ray.environment import end_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if {bound}:
    thread = threading.Thread(target=end_with_parent)  # a thread that ends at once, as an actor's may
    thread.start(), thread.join()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a wish of Linux's kernel")
@pytest.mark.parametrize("bound", [True, False])
def test_a_process_ends_with_the_one_that_started_it_however_that_ended(bound: bool) -> None:
    child = textwrap.dedent(BOUND).format(bound=bound)
    code = textwrap.dedent(PARENT).format(child=child)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    try:
        assert ended(pid, within_s=20.0 if bound else 1.0) is bound
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def ended(pid: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


class Bound(Exception):
    """Raised in place of binding a process."""


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        ("bt_ray.rollout.worker", lambda found: found.ProgramWorker(None, None)),
        ("bt_ray.rollout.pipeline", lambda found: found.RolloutProxy(None, [])),
        ("bt_ray.search.trial", lambda found: object.__new__(found.CandidateTrial).setup({}, [])),
        ("bt_ray.training.worker", lambda found: found.train_worker({})),
        ("bt_ray.stages.__main__", lambda found: found.main(["--run-dir=r", "--stage=p", "--app=a"])),
    ],
)
def test_every_process_of_a_run_ends_with_its_node(module: str, begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind() -> None:
        raise Bound

    found = importlib.import_module(module)
    monkeypatch.setattr(found, "end_with_parent", bind)
    with pytest.raises(Bound):
        begin(found)
