"""A run in which nothing is learned. The tiny model, on real parts."""

import json

import pytest

from tests.support.driver_runs import bt_ray
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_nothing_passes_skips_the_weight_stage_and_what_follows(tmp_path):
    config = write_run(tmp_path, strategy='["w -> p", "p"]', train=4)
    config.write_text(config.read_text().replace("program.py:exact", "program.py:never"))
    bt_ray("run", config, "--run-dir", tmp_path / "run", timeout_s=1000)
    report = json.loads(bt_ray("report", str(tmp_path / "run"), "--json").stdout)
    states = {stage["path"]: stage["status"] for stage in report["stages"]}
    assert states == {"vanilla": "done", "p": "done", "w": "skipped", "w -> p": "skipped"}
    assert "nothing to learn from" in next(stage["note"] for stage in report["stages"] if stage["path"] == "w")
