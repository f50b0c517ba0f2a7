"""Ctrl-C again, by somebody who does not want to wait: the end is as clean as after the first."""

import signal
import time

import pytest

from tests.support.driver_runs import family, our_processes, wait_until
from tests.support.injecting import RunAtWork, write_undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_second_ctrl_c_leaves_nothing_behind(tmp_path):
    run = RunAtWork(write_undisturbed_run(tmp_path), tmp_path / "run")
    run.wait_for_rows("evaluate")
    processes = family(run.driver.pid)
    for _ in range(2):
        run.driver.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, output = run.end(120)
    assert code == 130, output[-3000:]
    assert "go on with" in output and "Traceback" not in output
    wait_until(lambda: not any(process.is_running() for process in processes) and not our_processes(), 90.0)
    assert not (tmp_path / "run" / "lock.json").exists()
