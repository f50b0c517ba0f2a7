"""SIGKILL of the driver at random moments, then `run` again, with a tiny random model and a fixed schedule.

    python benchmarks/resume.py --kills 5

Counts committed steps and written rows that were run again, and compares the final hashes with
those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import bt_ray, show

from tests.support.tiny_run import hashes, write_run, written_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        bt_ray("run", str(write_run(whole)), "--run-dir", str(whole / "run"))
        config, run_dir = write_run(killed), killed / "run"
        moments = random.Random(args.seed)
        records: dict[Path, bytes] = {}
        rows: dict[str, bytes] = {}
        for _ in range(args.kills):
            run_and_kill(config, run_dir, moments.uniform(12.0, 60.0))
            rows, records = written_rows(run_dir), {path: path.read_bytes() for path in run_dir.glob("steps/*/record.json")}
        bt_ray("run", str(config), "--run-dir", str(run_dir))
        now = written_rows(run_dir)
        show(
            "SIGKILL of the driver",
            kills=args.kills,
            records_changed=sum(path.read_bytes() != data for path, data in records.items()),
            rows_lost=sum(not now[name].startswith(data.rpartition(b"\n")[0]) for name, data in rows.items()),
            rows_run_twice=repeated(now),
            same_hashes=hashes(run_dir) == hashes(whole / "run"),
            stages=len(hashes(run_dir)),
        )


def run_and_kill(config: Path, run_dir: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "bt_ray.cli", "run", str(config), "--run-dir", str(run_dir)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        driver.send_signal(signal.SIGKILL)
        driver.wait()


def repeated(segments: dict[str, bytes]) -> int:
    """Rows that stand twice among the segments of one step or candidate."""
    seen: set[tuple[str, str, int]] = set()
    twice = 0
    for name, data in segments.items():
        for row in map(json.loads, data.decode().splitlines()):
            key = (str(Path(name).parent), row["example_id"], row["sample"])
            twice += key in seen
            seen.add(key)
    return twice


if __name__ == "__main__":
    main()
