"""One run with real parts that meets one fault after another, nine drivers long, and ends as if nothing had happened.

The tests of this file are its chapters and need each other in this order: engines and clusters take long to start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bt_ray.errors import CommitError
from bt_ray.runs.commit import Cost, Step, latest_attempt
from tests.support.driver_runs import bt_ray, family, our_processes, wait_until
from tests.support.injecting import (
    Left,
    RunAtWork,
    assert_as_undisturbed,
    assert_kept,
    damaged,
    snapshot,
    wait_for_training,
    write_undisturbed_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Story:
    """The run, its drivers, and what the last of them left."""

    def __init__(self, folder: Path, disk: Path | None) -> None:
        self.config, self.disk = write_undisturbed_run(folder), disk
        self.config.write_text(self.config.read_text().replace("engine: {", "engine: {stall_timeout_s: 20, "))
        self.run_dir = (disk or folder) / "run"
        self.left = Left({}, {}, {})
        self.asleep: Step | None = None  # an attempt whose result comes late
        self._logs, self._drivers = folder, 0
        self._run: RunAtWork | None = None

    def drive(self) -> RunAtWork:
        """The next driver."""
        self.end()
        self._drivers += 1
        self._run = RunAtWork(self.config, self.run_dir, self._logs / f"driver-{self._drivers}.log")
        return self._run

    def end(self) -> None:
        """A driver that a failed chapter left goes; nothing that was written may have changed."""
        if self._run is not None and self._run.driver.poll() is None:
            self._run.kill_driver()
        if self._run is not None:
            assert_kept(self.run_dir, self.left)
            self.left = snapshot(self.run_dir)

    def fill_disk(self) -> Path:
        """Take all the space that is left on the run's disk; the file gives it back."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue
        assert os.statvfs(self.disk).f_bavail == 0
        return filler


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A disk of 64 MiB of its own, where this machine lets us mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False)
    yield None if mounted.returncode else folder
    if not mounted.returncode:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def story(small_disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(tmp_path_factory.mktemp("story"), small_disk)
    yield story
    story.end()


def test_the_engine_dies_and_hangs_a_job_is_stopped_and_one_killed_once_committed_a_worker_dies_and_the_disk_fills_up(
    story: Story,
) -> None:
    run = story.drive()
    run.wait_for_rows("evaluate")
    run.kill("VLLM::EngineCore")
    run.stop_job("vanilla")
    with ThreadPoolExecutor(1) as beside:
        second = beside.submit(bt_ray, "run", story.config, "--run-dir", story.run_dir, check=False)
        run.kill_once_committed("vanilla")  # its last submission: the record alone says that it is done
        refused = second.result()
    assert refused.returncode == 2 and "a run has one driver" in refused.stderr
    run.wait_for_rows("rollout", 3)
    run.kill("ray::ProgramWorker")
    run.suspend("VLLM::EngineCore")
    run.wait_for_rows("search", 2)
    story.asleep = run.attempt_at_work("search")
    if story.disk is None:
        run.kill_driver()
        pytest.skip("no file system may be mounted here, so that none fills up")
    filler = story.fill_disk()
    code, output = run.end()
    filler.unlink()
    assert code == 1, output[-3000:]
    assert "its disk is full. Free some space" in output and "Traceback" not in output, output[-3000:]


def test_an_old_attempt_wakes_up_late_a_trial_the_stage_and_the_replica_are_killed_then_the_driver(story: Story) -> None:
    run, old = story.drive(), story.asleep
    assert old is not None
    run.wait_for(lambda: latest_attempt(old.folder) > old.attempt)
    with pytest.raises(CommitError, match=f"attempt {old.attempt} ended after attempt"):
        old.commit("p", {}, Cost())
    assert old.record() is None
    run.kill("ray::CandidateTrial")
    run.wait_for_rows("search", 8)
    run.kill("-m bt_ray.stages")
    run.wait_for_rows("search", 12)
    run.kill("ray::ServeReplica")
    run.wait_for((story.run_dir / "stages" / "p" / "record.json").is_file)
    run.kill_driver()  # between two stages


def test_the_driver_is_killed_in_training_no_checkpoint_has_room_and_it_is_killed_before_the_record_of_what_was_trained(
    story: Story,
) -> None:
    run = story.drive()
    wait_for_training(run)
    run.kill_driver()
    run = story.drive()
    if story.disk is not None:
        wait_for_training(run)
        filler = story.fill_disk()  # no checkpoint can be written
        code, output = run.end()
        filler.unlink()
        assert code == 1 and "its disk is full. Free some space" in output and "Traceback" not in output, output[-3000:]
        run = story.drive()
    run.wait_for_artifact("finetune", "merged/model.safetensors")
    run.kill_driver()
    assert not list(story.run_dir.glob("steps/finetune-*/record.json")), "it came too late to show anything"


def test_the_training_worker_is_killed_in_a_checkpoints_write_then_ctrl_c_is_pressed_twice(story: Story) -> None:
    story.end()
    shutil.rmtree(story.run_dir / "scratch" / "train")  # what earlier drivers trained: this one is to write its checkpoint
    run = story.drive()
    run.kill_in_checkpoint_write()
    run.wait_for_step("evaluate")
    processes = family(run.driver.pid)
    for _ in range(2):
        run.driver.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, output = run.end()
    assert code == 130, output[-3000:]
    assert "go on with" in output and "Traceback" not in output, output[-3000:]
    wait_until(lambda: not any(process.is_running() for process in processes), 90.0)
    assert not (story.run_dir / "lock.json").exists()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("bit", "finetune-*/files-*/merged/model.safetensors"),
        ("half", "finetune-*/files-*/adapter/adapter_model.safetensors"),
        ("bit", "search-*/record.json"),
        ("bit", "rollout-*/rows/*.jsonl"),
    ],
)
def test_what_was_committed_is_damaged(story: Story, how: str, what: str) -> None:
    """A bit of it is another, or the second half is gone."""
    story.end()
    *_, path = sorted(story.run_dir.glob(f"steps/{what}"))  # of the last attempt, the one that committed
    with damaged(path, how):
        done = bt_ray("run", story.config, "--run-dir", story.run_dir, check=False)
    said = "".join((done.stdout + done.stderr).split())  # the terminal breaks long lines
    assert done.returncode != 0 and str(path) in said and "Delete" in said and "Traceback" not in said, done.stdout[-3000:]


@pytest.mark.parametrize("how", ["stop", "Ctrl-C"])
def test_it_is_asked_to_stop_and_ends(story: Story, how: str) -> None:
    run = story.drive()
    run.wait_for_process("-m bt_ray.stages")
    processes = family(run.driver.pid)
    if how == "stop":
        assert "Stopped. What was committed is kept." in bt_ray("stop", story.run_dir).stdout
    else:
        run.driver.send_signal(signal.SIGINT)
    code, output = run.end()
    assert code == 130, output[-3000:]
    assert "go on with" in output and "Traceback" not in output, output[-3000:]
    wait_until(lambda: not any(process.is_running() for process in processes), 90.0)
    assert not list(story.run_dir.glob("*lock*"))


def test_it_ends_as_if_nothing_had_happened(story: Story, undisturbed: Path) -> None:
    run = story.drive()
    late = []  # rows of an attempt that nobody waits for any more; the name of their file comes before the others
    for record in story.run_dir.glob("steps/*/record.json"):
        for rows in list(record.parent.glob("rows/*.jsonl")):  # of rollouts and evaluations; a search has folders there
            late.append(rows.with_name(f"0-{rows.name}"))
            text = rows.read_text().replace('"accept": true', '"accept": false')
            late[-1].write_text(re.sub('"score": [0-9.]+', '"score": 0.125', text))
    assert {path.parent.parent.name.split("-")[0] for path in late} == {"rollout", "evaluate"}
    code, output = run.end(800)
    for path in late:
        path.unlink()
    assert code == 0, output[-3000:]
    assert_as_undisturbed(story.run_dir, undisturbed)
    wait_until(lambda: not our_processes(), 60.0)
