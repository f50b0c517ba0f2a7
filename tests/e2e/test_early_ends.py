"""Runs that end early: Ctrl-C, and a strategy in which nothing is learned. The tiny model, on real parts."""

import json
import signal
import subprocess

import pytest

from tests.support.driver_runs import bt_ray, command, family, wait_until
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path):
    config = write_run(tmp_path, strategy='"p"')
    driver = subprocess.Popen(
        command("run", str(config), "--run-dir", str(tmp_path / "run")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: (tmp_path / "run" / "stages" / "vanilla" / "job.json").exists(), 120.0)
    processes = family(driver.pid)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert "go on with" in output
    assert "Traceback" not in output
    wait_until(lambda: not any(process.is_running() for process in processes), 60.0)
    assert not (tmp_path / "run" / "lock.json").exists()


def test_nothing_passes_skips_the_weight_stage_and_what_follows(tmp_path):
    config = write_run(tmp_path, strategy='["w -> p", "p"]', train=4)
    config.write_text(config.read_text().replace("program.py:exact", "program.py:never"))
    bt_ray("run", config, "--run-dir", tmp_path / "run", timeout_s=1000)
    report = json.loads(bt_ray("report", str(tmp_path / "run"), "--json").stdout)
    states = {stage["path"]: stage["status"] for stage in report["stages"]}
    assert states == {"vanilla": "done", "p": "done", "w": "skipped", "w -> p": "skipped"}
    assert "nothing to learn from" in next(stage["note"] for stage in report["stages"] if stage["path"] == "w")
