"""The demo's path with a tiny model, on real Ray, Serve, Data, Tune, Train and vLLM."""

import json
import subprocess
import sys

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import bt_ray, our_processes, wait_until
from tests.support.tiny_run import CURSE, hashes, write_run, written_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nobody disturbed: (config path, run directory, output)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_run(folder)
    done = bt_ray("run", config, "--run-dir", folder / "run", timeout_s=1000)
    return config, folder / "run", done.stdout


def test_every_stage_kind_runs_and_the_report_is_whole(undisturbed):
    _, run_dir, output = undisturbed
    report = json.loads(bt_ray("report", str(run_dir), "--json").stdout)
    assert report["status"] == "done"
    assert [stage["path"] for stage in report["stages"]] == ["vanilla", "p", "w", "p -> w", "p -> w -> p"]
    assert {stage["kind"] for stage in report["stages"]} == {"vanilla", "p", "w"}
    for stage in report["stages"]:
        assert stage["status"] == "done"
        assert 0 <= stage["select"]["low"] <= stage["select"]["score"] <= stage["select"]["high"] <= 1
        assert stage["test"]["n"] == 6
        assert stage["lm_calls"] > 0
    assert report["test_looks"] == 1
    assert report["flip_rate"] is not None and 0 <= report["flip_rate"] <= 1, "the pick ran on select a second time"
    assert report["best"]["path"] in [stage["path"] for stage in report["stages"]]
    assert {control["name"] for control in report["controls"]} == {"fine-tuned on gold labels", "TF-IDF + logistic regression"}
    for word in ("vanilla", "p -> w -> p", "test"):
        assert word in output


def test_a_metric_that_raises_costs_its_rows_alone(undisturbed):
    _, run_dir, _ = undisturbed
    report = json.loads(bt_ray("report", str(run_dir), "--json").stdout)
    run = RunDir(run_dir)
    cursed = {split: sum(CURSE in row["inputs"]["text"] for row in run.examples(split)) for split in ("search", "select")}
    assert sum(cursed.values()) == 2
    for stage in report["stages"]:
        assert stage["select"]["n"] == 5 - cursed["select"]
    assert sum(stage["row_errors"] for stage in report["stages"]) >= 2
    texts = b"".join(written_rows(run_dir).values()).decode()
    assert "this row is cursed" in texts


def test_shared_work_ran_once(undisturbed):
    _, run_dir, _ = undisturbed
    run = RunDir(run_dir)
    record = {name: run.stage_record(name) for name in ("p", "w")}
    rollout = next(step for step in record["w"]["steps"] if step.startswith("rollout-"))
    assert rollout in record["p"]["steps"]
    assert rollout in record["w"]["shared_steps"] + record["p"]["shared_steps"]


def test_nothing_is_left_running(undisturbed):
    wait_until(lambda: not our_processes())


def test_a_finished_run_is_not_run_again(undisturbed):
    config, run_dir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    bt_ray("run", config, "--run-dir", run_dir, timeout_s=1000)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_another_config_is_refused_with_the_difference(undisturbed):
    config, run_dir, _ = undisturbed
    done = bt_ray("run", str(config), "--run-dir", str(run_dir), "--set", "steps.w.epochs=7", check=False)
    assert done.returncode == 2
    assert "steps.w.epochs: the run has 1, you ask for 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_html_report_and_status(undisturbed, tmp_path):
    _, run_dir, _ = undisturbed
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


def test_the_same_from_python_finds_every_stage_done(undisturbed):
    """Equal hashes: the run of the YAML is the run of `compile`, so nothing is left to do."""
    config, run_dir, _ = undisturbed
    (config.parent / "script.py").write_text(PYTHON)
    before = written_rows(run_dir), hashes(run_dir), (run_dir / "run.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=config.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ANSWER left" in done.stdout or "ANSWER right" in done.stdout
    assert (written_rows(run_dir), hashes(run_dir), (run_dir / "run.json").read_bytes()) == before
