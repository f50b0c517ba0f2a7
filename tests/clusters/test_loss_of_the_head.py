"""The head of a cluster is lost while engines are up: nothing stays behind, and the next run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.driver_runs import bt_ray, family, our_processes, wait_until
from tests.support.injecting import RunAtWork, assert_kept, assert_no_row_twice, snapshot
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_head_of_the_cluster_dies(tmp_path: Path) -> None:
    config, run_dir = write_run(tmp_path, strategy='"vanilla"', train=4), tmp_path / "run"
    with RunAtWork(config, run_dir) as run:
        run.wait_for_rows("evaluate")
        processes = family(run.driver.pid)
        run.kill("gcs_server")
        code, output = run.end(200)
        # Ray ends every process that has not reached the head for a minute, and says so itself.
        assert code != 0 and "Failed to connect to GCS" in output, output[-3000:]
        wait_until(lambda: not any(process.is_running() for process in processes), 240.0)
    before = snapshot(run_dir)
    assert before.rows
    bt_ray("run", config, "--run-dir", run_dir)
    assert_kept(run_dir, before)
    assert_no_row_twice(run_dir)
    wait_until(lambda: not our_processes(), 60.0)
