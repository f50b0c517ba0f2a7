"""SIGKILL of the driver: what it left is whole, and the next run goes on from there."""

import json
import random
import subprocess

import pytest

from tests.support.driver_runs import bt_ray
from tests.support.injecting import RunAtWork, assert_as_undisturbed, assert_kept, snapshot, write_undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_killed_at_random_moments_then_the_same_hashes(undisturbed, tmp_path):
    config, run_dir = write_undisturbed_run(tmp_path), tmp_path / "run"
    moments = random.Random(0)
    before = ({}, {})
    for _ in range(2):
        run = RunAtWork(config, run_dir)
        try:
            run.driver.wait(moments.uniform(15.0, 55.0))
        except subprocess.TimeoutExpired:
            run.kill_driver()
        assert_kept(run_dir, before)
        before = snapshot(run_dir)
        assert_whole(*before)
    bt_ray("run", config, "--run-dir", run_dir, timeout_s=1000)
    assert_kept(run_dir, before)
    assert_as_undisturbed(run_dir, undisturbed)


def assert_whole(rows, records):
    """What a killed driver left is whole: each row once, each record readable."""
    for name, data in rows.items():
        keys = [(row["example_id"], row["sample"]) for row in map(json.loads, data.decode().rpartition("\n")[0].splitlines())]
        assert len(keys) == len(set(keys)), f"{name} holds a row twice"
    for path, data in records.items():
        assert json.loads(data)["name"] == path.parent.name
