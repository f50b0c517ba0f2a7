"""SIGKILL of the driver at random moments, then `run` again, with a tiny random model and a fixed schedule.

    python benchmarks/resume.py --kills 5

After every kill it compares what is on disk with what was there after the kill before: records that
changed, rows that were lost, rows that stand twice. Only kills that met a run at work count; a run that ended
is compared with one that nobody disturbed, by its final hashes, and the next kills meet a new one.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import MAX_SAID, bt_ray, show

from tests.support.tiny_run import hashes, write_run, written_rows

EARLIEST_S, LATEST_S = 12.0, 60.0  # when a kill may come; before, there is hardly a cluster yet
CLUSTER_END_S = 90.0  # seconds that the processes of a killed driver's cluster have to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        bt_ray("run", str(write_run(whole)), "--run-dir", str(whole / "run"))
        show("SIGKILL of the driver", **kill_often(Path(folder), hashes(whole / "run"), args.kills, random.Random(args.seed)))


def kill_often(folder: Path, expected: dict[str, str], kills: int, moments: random.Random) -> dict[str, int | bool | list[float]]:
    """Runs that are killed until `kills` met one at work, each then run to its end. Returns the figure's values."""
    count: Counter[str] = Counter()
    latest, same, runs = LATEST_S, True, 0
    resumed: list[float] = []
    while count["kills"] < kills:
        config = write_run(folder / f"killed-{runs}")
        run_dir, runs = config.parent / "run", runs + 1
        seen = Snapshot.of(run_dir)
        while count["kills"] < kills:
            killed = run_and_kill(run_command(config, run_dir), moments.uniform(min(EARLIEST_S, latest / 2), latest))
            seen = seen.compared(run_dir, count)
            if not killed:  # the moment lay behind the run's end: the next ones come sooner
                latest *= 0.7
                break
            count["kills"] += 1
        with FirstNew(run_dir) as first:
            bt_ray("run", str(config), "--run-dir", str(run_dir))
        resumed += [first.after_s] if first.after_s is not None else []
        seen.compared(run_dir, count)
        count["rows_run_twice"] += repeated(written_rows(run_dir))
        same = same and hashes(run_dir) == expected
    names = ("kills", "records_changed", "rows_lost", "rows_run_twice")
    found = {**{name: count[name] for name in names}, "same_hashes": same, "runs": runs, "stages": len(expected)}
    return {**found, "resume_s": resumed}


class FirstNew:
    """Seconds from the start of a driver to the first row or record that it adds: cluster, engine and canary are in them."""

    def __init__(self, run_dir: Path) -> None:
        self.after_s: float | None = None
        self._run_dir, self._ended = run_dir, threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._size(), time.monotonic()), daemon=True)

    def __enter__(self) -> FirstNew:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self, before: int, began_s: float) -> None:
        while not self._ended.wait(0.2):
            if self._size() > before:
                self.after_s = round(time.monotonic() - began_s, 1)
                return

    def _size(self) -> int:
        files = [*self._run_dir.glob("steps/*/rows/**/*.jsonl"), *self._run_dir.glob("steps/*/record.json")]
        return sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class Snapshot:
    """What a run had committed and written at one moment."""

    records: dict[str, bytes]
    rows: dict[str, bytes]

    @classmethod
    def of(cls, run_dir: Path) -> Snapshot:
        records = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.glob("steps/*/record.json")}
        return cls(records, written_rows(run_dir))

    def compared(self, run_dir: Path, count: Counter[str]) -> Snapshot:
        """What is there now. Counts the records of before that differ or are gone, and the rows of before that are gone."""
        now = Snapshot.of(run_dir)
        count["records_changed"] += sum(now.records.get(name) != data for name, data in self.records.items())
        for name, data in self.rows.items():
            kept = lines(now.rows.get(name, b""))
            count["rows_lost"] += sum(kept[number : number + 1] != [line] for number, line in enumerate(lines(data)))
        return now


def run_command(config: Path, run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "bt_ray.cli", "run", str(config), "--run-dir", str(run_dir)]


def run_and_kill(command: Sequence[str], seconds: float) -> bool:
    """Kill the driver after so long, and wait until its cluster has ended too. False where it had ended by itself."""
    with tempfile.TemporaryFile("w+") as said:  # no pipe: the cluster's processes outlive the driver, and may write
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            code = driver.wait(seconds)
        except subprocess.TimeoutExpired:
            family = psutil.Process(driver.pid).children(recursive=True)
            driver.kill()
            code = driver.wait()
            wait_for_end(family, CLUSTER_END_S)
        if code not in (0, -signal.SIGKILL):
            said.seek(0)
            raise SystemExit(f"{said.read()[-MAX_SAID:]}\nThe run ended by itself, with {code}; its last words are above.")
    return code != 0


def wait_for_end(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Wait until none of them runs. SystemExit with those that are left: what a live cluster does would count as lost."""
    until = time.monotonic() + timeout_s
    while left := [process for process in processes if is_alive(process)]:
        if time.monotonic() > until:
            pids = ", ".join(str(process.pid) for process in left)
            raise SystemExit(
                f"{timeout_s:g} s after its driver was killed, these processes of the cluster still run: {pids}. End them."
            )
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # an orphan may have nobody who reaps it
    except psutil.NoSuchProcess:
        return False


def lines(data: bytes) -> list[bytes]:
    """The whole lines of a segment. One that a kill tore is not yet a row: a later attempt cuts it off and runs it."""
    return data.split(b"\n")[:-1]


def repeated(segments: dict[str, bytes]) -> int:
    """Rows that stand twice among the segments of one step or candidate."""
    seen: set[tuple[str, str, int]] = set()
    twice = 0
    for name, data in segments.items():
        for row in map(json.loads, lines(data)):
            key = (str(Path(name).parent), row["example_id"], row["sample"])
            twice += key in seen
            seen.add(key)
    return twice


if __name__ == "__main__":
    main()
