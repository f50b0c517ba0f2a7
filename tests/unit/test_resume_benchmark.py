"""The resume benchmark counts what it says: kills that met a run at work, and all that was lost after any of them."""

import importlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def resume(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("resume")
    for name in ("resume", "common"):
        sys.modules.pop(name, None)


def write(run_dir, name, text):
    path = run_dir / "steps" / "rollout-1" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def row(number):
    return json.dumps({"example_id": f"e{number}", "sample": 0}) + "\n"


def test_what_changed_since_the_last_look_is_counted_and_a_torn_line_is_not(resume, tmp_path):
    write(tmp_path, "rows/a.jsonl", row(1) + row(2) + '{"exa')
    write(tmp_path, "record.json", "{}")
    before, count = resume.Snapshot.of(tmp_path), Counter()
    write(tmp_path, "rows/a.jsonl", row(1) + row(2) + row(3))
    after = before.compared(tmp_path, count)
    assert count.total() == 0
    write(tmp_path, "rows/a.jsonl", row(1))
    write(tmp_path, "record.json", "{} ")
    after.compared(tmp_path, count)
    assert dict(count) == {"records_changed": 1, "rows_lost": 2}
    assert resume.repeated({"s/rows/a.jsonl": (row(1) + "torn").encode(), "s/rows/b.jsonl": row(1).encode()}) == 1


def scripted(resume, monkeypatch, deeds):
    """Runs of no real driver: each deed changes the run directory and says whether its run was killed."""
    moments = []

    def run_and_kill(command, seconds):
        moments.append(seconds)
        return deeds.pop(0)(Path(command[-1]))

    def write_run(folder):
        folder.mkdir()
        return folder / "config.yaml"

    monkeypatch.setattr(resume, "run_and_kill", run_and_kill)
    monkeypatch.setattr(resume, "write_run", write_run)
    monkeypatch.setattr(resume, "bt_ray", lambda *arguments: None)
    monkeypatch.setattr(resume, "hashes", lambda run_dir: {"vanilla": "same"})
    return moments


def test_only_kills_of_a_run_at_work_count_and_each_is_compared_with_the_one_before(resume, monkeypatch, tmp_path):
    def works(run_dir):
        write(run_dir, "rows/a.jsonl", row(1) + row(2))
        return True

    def loses(run_dir):
        write(run_dir, "rows/a.jsonl", row(1))
        return True

    def mends(run_dir):  # what the last kill left hides what an earlier one lost
        write(run_dir, "rows/a.jsonl", row(1) + row(2))
        return True

    def ends(run_dir):
        return False

    moments = scripted(resume, monkeypatch, [works, loses, mends, ends, works])
    figure = resume.kill_often(tmp_path, {"vanilla": "same"}, 4, random.Random(0))
    assert (figure["kills"], figure["runs"], figure["rows_lost"], figure["same_hashes"]) == (4, 2, 1, True)
    assert len(moments) == 5 and moments[4] < 0.7 * resume.LATEST_S


def test_a_kill_waits_for_the_processes_of_the_cluster(resume, monkeypatch):
    found = []
    wait = resume.wait_for_end
    monkeypatch.setattr(
        resume, "wait_for_end", lambda processes, timeout_s: (found.extend(processes), wait(processes, timeout_s))
    )
    assert resume.run_and_kill(["/bin/sh", "-c", "sleep 4 & wait"], 1.0) is True
    assert len(found) == 1 and not resume.is_alive(found[0])


def test_a_cluster_that_does_not_end_is_named(resume):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(SystemExit, match=f"still run: {child.pid}"):
            resume.wait_for_end([psutil.Process(child.pid)], 0.2)
    finally:
        child.kill()
        child.wait()


def test_a_run_that_ends_by_itself_is_no_kill_and_one_that_fails_shows_its_words(resume):
    assert resume.run_and_kill([sys.executable, "-c", "pass"], 60.0) is False
    with pytest.raises(SystemExit, match="no such key"):
        resume.run_and_kill([sys.executable, "-c", "import sys; sys.exit('no such key')"], 60.0)


def test_the_last_words_of_a_command_that_fails_are_shown(resume):
    with pytest.raises(SystemExit, match="no run directory"):
        resume.bt_ray("status", "/nowhere/at/all")
    assert resume.bt_ray("status", "/nowhere/at/all", check=False).returncode == 2


def test_the_time_to_resume_ends_with_the_first_row_that_is_new(resume, tmp_path):
    write(tmp_path, "rows/a.jsonl", row(1))
    with resume.FirstNew(tmp_path) as first:
        time.sleep(0.5)
        assert first.after_s is None, "the rows of before are no news"
        write(tmp_path, "rows/b.jsonl", row(2))
        first._thread.join(5)
    assert first.after_s is not None and first.after_s >= 0.5
    with resume.FirstNew(tmp_path) as nothing:
        pass
    assert nothing.after_s is None
