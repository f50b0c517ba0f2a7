"""Serve, Data, Tune and Train of one run ask together for more than its cluster has: they take turns, and none waits for ever.

Its first driver has a budget that pays for little; the next goes on with another.
"""

import json

import pytest

from bt_ray import config_file
from bt_ray.planning import WORKER_CPUS
from bt_ray.resources import demand
from bt_ray.rollout.pipeline import DATA_CPUS
from bt_ray.search.room import TRIAL_CPUS
from tests.support.driver_runs import bt_ray, our_processes, wait_until
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1100)]
CPUS, PROGRAM_WORKERS, TRIALS, TRAINERS = 4, 5, 8, 2


def states(run_dir):
    report = json.loads(bt_ray("report", run_dir, "--json").stdout)
    if "skipped" in {stage["status"] for stage in report["stages"]}:
        note = next(stage["note"] for stage in report["stages"] if stage["path"] == "p")
        assert "stopped by the budget: budget.max_lm_calls 60 has" in note
    return {stage["path"]: stage["status"] for stage in report["stages"]}


def test_a_run_that_asks_for_more_cpus_than_there_are_ends(tmp_path):
    config = write_run(tmp_path, strategy='"p -> w"')
    text = config.read_text().replace("controls: {gold: w, tfidf: side}\n", "").replace("concurrency: 1", "concurrency: 8")
    text = text.replace("num_candidates: 2", "num_candidates: 6").replace("max_parallel: 1", f"max_parallel: {TRIALS}")
    text = text.replace("w: {method: sft,", f"w: {{method: sft, num_workers: {TRAINERS},")
    text += f"cluster: {{num_cpus: {CPUS}, program_workers: {PROGRAM_WORKERS}, stage_timeout_s: 400}}\n"
    config.write_text(text)
    need = demand(config_file.load(config), has_gpu=False)
    assert max(need.generate_cpus, need.train_cpus) <= CPUS, "each alone has room, or the run is refused"
    parts = {"Serve": need.generate_cpus - PROGRAM_WORKERS * WORKER_CPUS, "programs": PROGRAM_WORKERS * WORKER_CPUS}
    parts |= {"Data": DATA_CPUS, "Tune": TRIALS * TRIAL_CPUS, "Train": need.train_cpus}
    assert sum(parts.values()) > 1.5 * CPUS
    poor = bt_ray("run", config, "--run-dir", tmp_path / "run", "--set", "budget.max_lm_calls=60", check=False, timeout_s=400)
    assert "Traceback" not in poor.stdout + poor.stderr
    assert states(tmp_path / "run") == {"vanilla": "done", "p": "skipped", "p -> w": "skipped"}
    answer = bt_ray("ask", tmp_path / "run", "text=a boat on the shelf", timeout_s=200).stdout
    assert any(f"side: {side}" in answer for side in ("left", "right")), "what was picked so far can be used"
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "steps").glob("*/record.json")}
    assert sum(json.loads(record)["cost"]["lm_calls"] for record in before.values()) <= 60
    bt_ray("run", config, "--run-dir", tmp_path / "run", "--set", "budget.max_lm_calls=null", timeout_s=450)
    assert states(tmp_path / "run") == {"vanilla": "done", "p": "done", "p -> w": "done"}
    assert all(path.read_bytes() == record for path, record in before.items())
    wait_until(lambda: not our_processes(), 60.0)
