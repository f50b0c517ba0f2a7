"""A script, as a notebook, that defines program and metric itself: they reach the workers, and its second run has nothing to do."""

import json
import subprocess
import sys

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import marked, our_processes, wait_until
from tests.support.tiny_run import PROGRAM, hashes, rows, write_run, written_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = """
import yaml

import bt_ray

if __name__ == "__main__":
    config = yaml.safe_load(open("config.yaml"))
    examples = [dspy.Example(**row).with_inputs("text") for row in ROWS]
    parts = {key: config[key] for key in ("adapter", "rollout", "engine", "seed")}
    optimiser = bt_ray.BetterTogether(metric=exact, model=config["model"], p=config["steps"]["p"], **parts)
    better = optimiser.compile(
        Program(), trainset=examples[:8], valset=examples[8:18], testset=examples[18:], strategy="p", run_dir="run"
    )
    print("ANSWER", better(text="a boat on the shelf").side, better.report["best"]["path"])
"""


def test_a_program_that_no_module_has(tmp_path):
    write_run(tmp_path)
    (tmp_path / "program.py").unlink()
    found = [*rows(0, 8), *rows(100, 10), *rows(200, 6)]
    (tmp_path / "script.py").write_text(f"{PROGRAM}\nROWS = {json.dumps(found)}\n{SCRIPT}")

    def run():
        command = [sys.executable, "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False, env=marked())
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "ANSWER left" in done.stdout or "ANSWER right" in done.stdout
        assert "Exception ignored" not in done.stderr and "EngineDeadError" not in done.stdout, (
            done.stdout[-2000:] + done.stderr[-2000:]
        )

    run()
    directory = RunDir(tmp_path / "run")
    assert {name: directory.stage_record(name)["status"] for name in ("vanilla", "p")} == {"vanilla": "done", "p": "done"}
    before = written_rows(directory.root), hashes(directory.root)
    run()
    assert (written_rows(directory.root), hashes(directory.root)) == before
    wait_until(lambda: not our_processes(), 60.0)
