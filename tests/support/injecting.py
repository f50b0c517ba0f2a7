"""Faults injected into a run that is at work, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from bt_ray.runs.commit import Step, StepKey, first_attempt, latest_attempt
from tests.support.driver_runs import command, family, marked, wait_until
from tests.support.tiny_run import hashes, write_run, written_rows

STEP_TIMEOUT_S = 300.0
STOP_JOB = """
import sys, ray
from ray.job_submission import JobSubmissionClient
JobSubmissionClient("http://" + ray.init(address=sys.argv[1], log_to_driver=False).dashboard_url).stop_job(sys.argv[2])
"""
STAGES = ("vanilla", "p", "p.w")


def write_undisturbed_run(folder: Path) -> Path:
    """Config of the run that is disturbed here; stages do not follow from the controls, so it has none."""
    config = write_run(folder, strategy='"p -> w"')
    config.write_text(config.read_text().replace("controls: {gold: w, tfidf: side}\n", ""))
    return config


class RunAtWork:
    """`bt-ray run` in a process of its own, watched by what it writes into `run_dir`. `url`: the bucket that this is the copy of."""

    def __init__(
        self, config: Path, run_dir: Path, log: Path | None = None, more: Sequence[str] = (), url: str | None = None
    ) -> None:
        self.run_dir = run_dir
        self._output = (log or run_dir.with_suffix(".log")).open("a+")
        arguments = command("run", config, "--run-dir", url or run_dir, *more)
        self.driver = subprocess.Popen(arguments, stdout=self._output, stderr=subprocess.STDOUT, env=marked())

    def __enter__(self) -> RunAtWork:
        return self

    def __exit__(self, *_: object) -> None:
        """A driver that a failed test left goes, and all that it started."""
        if self.driver.poll() is None:
            self.kill_driver()

    def wait_for_rows(self, kind: str, count: int = 1) -> None:
        """Until a step of this kind that has no record has `count` rows."""
        self.wait_for(lambda: any(_num_rows(step) >= count for step in self._open_steps(kind)))

    def wait_for_step(self, kind: str) -> str:
        """Until a step of this kind has begun and has no record yet; its name."""
        found: list[Path] = []

        def look() -> bool:
            found[:] = self._open_steps(kind)
            return bool(found)

        self.wait_for(look)
        return found[0].name

    def wait_for_artifact(self, kind: str, name: str) -> None:
        """Until an attempt of a step of this kind that has no record has written this artifact."""
        self.wait_for(lambda: any(list(step.glob(f"files-*/{name}")) for step in self._open_steps(kind)))

    def wait_for_process(self, name: str) -> None:
        """Until a process of the run whose command line holds `name` is there."""
        self._process(name)

    def kill(self, name: str) -> None:
        """SIGKILL the first process of the run whose command line holds `name`, once there is one."""
        self._process(name).kill()

    def stop_job(self, stage: str) -> None:
        """Have the job server stop the stage's job, as anyone who holds the cluster's token can; returns once the driver has
        submitted another."""
        process = self._process("-m bt_ray.stages --address")
        words = " ".join(process.cmdline()).split()  # the stage's own, or the shell's around it
        job = self._submitted(stage)
        address = words[words.index("--address") + 1]
        stop = [sys.executable, "-c", STOP_JOB, address, job]  # the token is in the environment of whoever may submit jobs
        subprocess.run(stop, env=process.environ(), capture_output=True, check=True, timeout=120)
        self.wait_for(lambda: self._submitted(stage) != job)

    def kill_once_committed(self, stage: str) -> None:
        """SIGKILL the stage's process as soon as its record is there: the job server says that the job failed. A second or two
        are left to it then, for its workers, its connection to the cluster and Python's own end."""
        process = self._process(f"--stage {stage} ")
        self.wait_for((self.run_dir / "stages" / stage / "record.json").is_file, pause_s=0.002)
        assert process.status() != psutil.STATUS_ZOMBIE, "it came too late to show anything"
        process.kill()

    def attempt_at_work(self, kind: str) -> Step:
        """The step of this kind that has no record, as the process that is at it holds it."""
        folder = self.run_dir / "steps" / self.wait_for_step(kind)
        step = Step(self.run_dir, StepKey(kind, first_attempt(folder)["inputs"]))
        assert step.folder == folder
        step.attempt = latest_attempt(folder)
        return step

    def kill_in_checkpoint_write(self) -> None:
        """SIGKILL the training worker while it writes a checkpoint: the last of its files is not there yet."""
        pattern, begun = "scratch/train/trainer/*/checkpoint-*", list[Path]()
        before = set(self.run_dir.glob(pattern))
        worker = self._process("ray::RayTrainWorker")

        def look() -> bool:
            begun[:] = set(self.run_dir.glob(pattern)) - before
            return bool(begun)

        self.wait_for(look, pause_s=0.002)
        worker.kill()
        assert not (begun[0] / "trainer_state.json").exists(), "the checkpoint was whole already"

    def suspend(self, name: str) -> None:
        """Stop it with SIGSTOP: it lives, and does nothing any more."""
        self._process(name).suspend()

    def _process(self, name: str) -> psutil.Process:
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [process for process in family(self.driver.pid) if name in _command_line(process)]
            return bool(found)

        self.wait_for(look)
        return found[0]

    def kill_driver(self) -> None:
        """SIGKILL the driver; returns once all that it started is gone."""
        processes = family(self.driver.pid)
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        wait_until(lambda: not any(process.is_running() for process in processes), 90.0)

    def end(self, timeout_s: float = 500.0) -> tuple[int, str]:
        """Exit code, and everything that was printed."""
        code = self.driver.wait(timeout_s)
        return code, self.output()

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def _submitted(self, stage: str) -> str:
        return str(json.loads((self.run_dir / "stages" / stage / "job.json").read_text())["submission_id"])

    def _open_steps(self, kind: str) -> list[Path]:
        begun = {path.parent for path in self.run_dir.glob(f"steps/{kind}-*/attempt-*.json")}
        return sorted(step for step in begun if not (step / "record.json").exists())

    def wait_for(self, condition: Callable[[], bool], pause_s: float = 0.02) -> None:
        """Until `condition()` holds, while the run goes on."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while not condition():
            assert self.driver.poll() is None, f"the run ended too soon:\n{self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.output()[-3000:]}"
            time.sleep(pause_s)


def wait_for_training(run: RunAtWork) -> None:
    """Until the fine-tune's worker holds its rows and trains."""
    log = run.run_dir / "scratch" / "train" / "logs" / f"{run.wait_for_step('finetune')}-worker-0.log"
    before = log.read_text(errors="replace").count("batches as trees") if log.is_file() else 0
    run.wait_for(lambda: log.is_file() and log.read_text(errors="replace").count("batches as trees") > before)


@contextmanager
def damaged(path: Path, how: str) -> Iterator[None]:
    """One `bit` in the middle of the file is the other way, or it ends there (`half`), for as long as this lasts."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if how == "bit" else b""))
    try:
        yield
    finally:
        path.write_bytes(data)


def _num_rows(step: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in step.rglob("rows/**/*.jsonl"))


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


class Left(NamedTuple):
    """Rows, step records, and who tried each step that has a record."""

    rows: dict[str, bytes]
    records: dict[Path, bytes]
    attempts: dict[Path, list[str]]


def snapshot(run_dir: Path) -> Left:
    """What is there now; `assert_kept` compares with it."""
    records = {path: path.read_bytes() for path in (run_dir / "steps").rglob("record.json")}
    return Left(written_rows(run_dir), records, {path.parent: _attempts(path.parent) for path in records})


def _attempts(step: Path) -> list[str]:
    return sorted(path.name for path in step.glob("attempt-*.json"))


def assert_kept(run_dir: Path, before: Left) -> None:
    """No written row is lost or changed, no record is another, no step that had one was begun again."""
    now = written_rows(run_dir)
    for name, data in before.rows.items():
        kept = data.rpartition(b"\n")[0]  # a torn last line may have been cut off
        assert now[name].startswith(kept), name
    for path, data in before.records.items():
        assert path.read_bytes() == data, path
    for step, attempts in before.attempts.items():
        assert _attempts(step) == attempts, f"{step} was begun again"


def assert_as_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    """The stages' hashes are those of a run that nobody disturbed, no row was run twice, and nothing holds the run or a step."""
    whole = hashes(undisturbed)
    assert {name: found for name, found in hashes(run_dir).items() if name != "final"} == {name: whole[name] for name in STAGES}
    assert_no_row_twice(run_dir)
    assert not list(run_dir.rglob("lock.json"))


def assert_no_row_twice(run_dir: Path) -> None:
    """No sample of an example stands twice among the rows of a step or, in a search, of a candidate."""
    seen: dict[tuple[str, str, int], str] = {}
    for name, data in written_rows(run_dir).items():
        for row in map(json.loads, data.decode().splitlines()):
            key = (str(Path(name).parent), row["example_id"], row["sample"])
            assert key not in seen, f"row {key} stands in {name} and in {seen[key]}"
            seen[key] = name
