"""Runs in which nothing is learned, or training goes wrong. The tiny model, on real parts."""

import json

import pytest
from safetensors.torch import load_file

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


# The first epoch, at learning rate 0 while warming up, is sound; the next update is not.
DIVERGING = (
    "{method: sft, lora_rank: 8, epochs: 6, learning_rate: 1.0e+30, warmup_share: 0.4, scheduler: constant, global_batch_size: 8}"
)


def test_a_fine_tune_that_diverges_fails_its_stage_alone_and_test_stays_shut(tmp_path):
    config = write_run(tmp_path, strategy='["x -> p", "p"]', train=4)
    config.write_text(config.read_text().replace("steps:\n", f"steps:\n  x: {DIVERGING}\n"))
    done = bt_ray("run", config, "--run-dir", tmp_path / "run", check=False, timeout_s=1000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    report = json.loads(bt_ray("report", str(tmp_path / "run"), "--json").stdout)
    stages = {stage["path"]: stage for stage in report["stages"]}
    states = {path: stage["status"] for path, stage in stages.items()}
    assert states == {"vanilla": "done", "p": "done", "x": "failed", "x -> p": "skipped"}
    assert "Lower learning_rate (now 1e+30)" in stages["x"]["note"] and "not run: x was failed" in stages["x -> p"]["note"]
    assert report["test_looks"] == 0, "a stage that failed may be mended, and the pick change"
    kept = list((tmp_path / "run" / "scratch" / "train").glob("finetune-*/checkpoint_*/adapter_model.safetensors"))
    assert kept and all(value.isfinite().all() for path in kept for value in load_file(path).values())


def test_an_engine_that_cannot_start_fails_the_run_at_once(tmp_path):
    config = write_run(tmp_path, strategy='["p"]', train=4)
    done = bt_ray("run", config, "--run-dir", tmp_path / "run", "--set", "engine.kv_cache_gib=1e6", check=False, timeout_s=500)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    report = json.loads(bt_ray("report", str(tmp_path / "run"), "--json").stdout)
    notes = {stage["path"]: stage["note"] for stage in report["stages"]}
    assert "vLLM did not start" in notes["vanilla"] and "lower engine.kv_cache_gib" in notes["vanilla"]
    assert "not run: vanilla was failed" in notes["p"] and not list((tmp_path / "run" / "steps").glob("*/rows/*.jsonl"))
