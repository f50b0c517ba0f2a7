"""The demo's path with a tiny model, on real Ray, Serve, Data, Tune, Train and vLLM: its driver is killed, and the next goes on."""

import json
import subprocess
import sys

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import bt_ray, our_processes, wait_until
from tests.support.injecting import RunAtWork, assert_kept, assert_no_row_twice, snapshot
from tests.support.tiny_run import CURSE, hashes, write_run, written_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run whose driver is killed in the first search: (config path, run directory, what was on disk then)."""
    folder = tmp_path_factory.mktemp("main_job")
    config = write_run(folder)
    with RunAtWork(config, folder / "run") as run:
        run.wait_for_rows("search", 3)
        run.kill_driver()
    return config, folder / "run", snapshot(folder / "run")


@pytest.fixture(scope="module")
def finished(killed):
    """The same run, which the next driver ended: (config path, run directory, output)."""
    config, run_dir, _ = killed
    done = bt_ray("run", config, "--run-dir", run_dir, timeout_s=1000)
    return config, run_dir, done.stdout


def test_the_next_driver_keeps_what_was_written_and_runs_no_row_twice(killed, finished):
    _, run_dir, before = killed
    assert any("/search-" in f"/{name}" for name in before.rows) and any("evaluate-" in str(path) for path in before.records)
    assert_kept(run_dir, before)
    assert_no_row_twice(run_dir)


def test_every_stage_kind_runs_and_the_report_is_whole(finished):
    _, run_dir, output = finished
    report = json.loads(bt_ray("report", str(run_dir), "--json").stdout)
    assert report["status"] == "done"
    assert [stage["path"] for stage in report["stages"]] == ["vanilla", "p", "w", "p -> w", "p -> w -> p"]
    assert {stage["kind"] for stage in report["stages"]} == {"vanilla", "p", "w"}
    for stage in report["stages"]:
        assert stage["status"] == "done"
        assert 0 <= stage["select"]["low"] <= stage["select"]["score"] <= stage["select"]["high"] <= 1
        assert stage["test"]["n"] == 6
        assert stage["lm_calls"] > 0 and stage["tokens_per_example"] > 0
    assert report["test_looks"] == 1
    assert report["flip_rate"] is not None and 0 <= report["flip_rate"] <= 1, "the pick ran on select a second time"
    assert report["best"]["path"] in [stage["path"] for stage in report["stages"]]
    assert {control["name"] for control in report["controls"]} == {"fine-tuned on gold labels", "TF-IDF + logistic regression"}
    for word in ("vanilla", "p -> w -> p", "test"):
        assert word in output


def test_a_metric_that_raises_costs_its_rows_alone(finished):
    _, run_dir, _ = finished
    report = json.loads(bt_ray("report", str(run_dir), "--json").stdout)
    run = RunDir(run_dir)
    cursed = {split: sum(CURSE in row["inputs"]["text"] for row in run.examples(split)) for split in ("search", "select")}
    assert sum(cursed.values()) == 2
    for stage in report["stages"]:
        assert stage["select"]["n"] == 5 - cursed["select"]
    assert sum(stage["row_errors"] for stage in report["stages"]) >= 2
    texts = b"".join(written_rows(run_dir).values()).decode()
    assert "this row is cursed" in texts


def test_shared_work_ran_once(finished):
    _, run_dir, _ = finished
    run = RunDir(run_dir)
    record = {name: run.stage_record(name) for name in ("p", "w")}
    rollout = next(step for step in record["w"]["steps"] if step.startswith("rollout-"))
    assert rollout in record["p"]["steps"]
    assert rollout in record["w"]["shared_steps"] + record["p"]["shared_steps"]


def test_nothing_is_left_running(finished):
    wait_until(lambda: not our_processes())


def test_a_finished_run_is_not_run_again(finished):
    config, run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    bt_ray("run", config, "--run-dir", run_dir, timeout_s=1000)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_another_config_is_refused_with_the_difference(finished):
    config, run_dir, _ = finished
    done = bt_ray("run", str(config), "--run-dir", str(run_dir), "--set", "steps.w.epochs=7", check=False)
    assert done.returncode == 2
    assert "steps.w.epochs: the run has 1, you ask for 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_html_report_and_status(finished, tmp_path):
    _, run_dir, _ = finished
    bt_ray("report", str(run_dir), "--html", str(tmp_path / "report.html"))
    assert "<svg" in (tmp_path / "report.html").read_text()
    status = bt_ray("status", str(run_dir)).stdout
    done = [line.removeprefix("done").strip().split("  ")[0] for line in status.splitlines() if line.startswith("done")]
    assert done == ["vanilla", "p", "w", "p -> w", "p -> w -> p", "test, once"]


PYTHON = """
import json, sys
import dspy, yaml
import bt_ray
from program import Program, exact

if __name__ == "__main__":
    config = yaml.safe_load(open("config.yaml"))
    rows = {name: [dspy.Example(**json.loads(line)).with_inputs("text") for line in open(f"{name}.jsonl")] for name in ("train", "val", "test")}
    parts = {key: config[key] for key in ("adapter", "rollout", "engine", "controls", "seed")}
    optimiser = bt_ray.BetterTogether(metric=exact, model=config["model"], **config["steps"], **parts)
    splits = {"trainset": rows["train"], "valset": rows["val"], "testset": rows["test"]}
    better = optimiser.compile(Program(), **splits, strategy=config["strategy"], run_dir="run")
    print("ANSWER", better(text="a boat on the shelf").side, better.report["best"]["path"])
"""


def test_the_same_from_python_finds_every_stage_done(finished):
    """Equal hashes: the run of the YAML is the run of `compile`, so nothing is left to do."""
    config, run_dir, _ = finished
    (config.parent / "script.py").write_text(PYTHON)
    before = written_rows(run_dir), hashes(run_dir), (run_dir / "run.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=config.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ANSWER left" in done.stdout or "ANSWER right" in done.stdout
    assert (written_rows(run_dir), hashes(run_dir), (run_dir / "run.json").read_bytes()) == before
