"""Rows that appear on the disk, and the processors' time meanwhile. For benchmarks/scaling.py."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil

TENTH = 0.1
LOOK_S = 0.2
PROCESSES_EVERY = 10  # looks: to ask hundreds of processes for their time is work, too
# What the title of a process begins with; in this order.
KINDS = {
    "engines": "ray::ServeReplica",
    "program workers": "ray::ProgramWorker",
    "pipeline and trials": "ray::",
    "raylet": "raylet",
    "gcs": "gcs_server",
}


def kind_of(pid: int, words: list[str]) -> str:
    """What a process of Ray is there for. Pure but for this process's own number."""
    if pid == os.getpid():
        return "driver"
    title = words[0] if words else ""
    name = title if title.startswith("ray::") else Path(title).name
    return next((kind for kind, begin in KINDS.items() if name.startswith(begin)), "other")


def core_seconds() -> dict[str, float]:
    """Processor time of the processes that are there, by kind."""
    found: dict[str, float] = {}
    for process in psutil.process_iter(["pid", "cmdline", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:
            kind = kind_of(process.info["pid"], process.info["cmdline"] or [])
            found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


class Watch:
    """Rows over time, and the processor time of all of this machine meanwhile."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder, self._num_rows = folder, num_rows
        self._seen: list[tuple[float, int, float]] = []
        self._spent: list[tuple[int, dict[str, float]]] = []  # rows then, core_seconds() then
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        ends: dict[Path, tuple[int, int]] = {}  # bytes read and rows found, by segment
        for look in itertools.count():
            if self._ended.wait(LOOK_S):
                return
            for path in self._folder.rglob("*.jsonl"):
                size, rows = ends.get(path, (0, 0))
                with path.open("rb") as file:
                    file.seek(size)
                    data = file.read()
                ends[path] = (size + len(data), rows + data.count(b"\n"))
            times = psutil.cpu_times()
            busy = times.user + times.nice + times.system
            so_far = sum(rows for _, rows in ends.values())
            self._seen.append((time.monotonic(), so_far, busy))
            if look % PROCESSES_EVERY == 0:
                self._spent.append((so_far, core_seconds()))

    def found(self) -> dict[str, Any]:
        """Rows per second, busy cores and milliseconds of a core per row between the first and the last tenth."""
        inside = [one for one in self._seen if TENTH * self._num_rows <= one[1] <= (1 - TENTH) * self._num_rows]
        if len(inside) < 2:
            raise SystemExit("The run was too short for a steady state; ask for more --rows.")
        (start_s, start, start_busy), (end_s, end, end_busy) = inside[0], inside[-1]
        return {
            "seconds": round(self.seconds, 1),
            "rows_per_s": round((end - start) / (end_s - start_s), 2),
            "cores_busy": round((end_busy - start_busy) / (end_s - start_s), 2),
            "core_ms_per_row": self._core_ms_per_row(),
        }

    def _core_ms_per_row(self) -> dict[str, float]:
        """By kind of process, but for kinds of which processes ended; empty where too little of that time was seen."""
        inside = [one for one in self._spent if TENTH * self._num_rows <= one[0] <= (1 - TENTH) * self._num_rows]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            return {}
        (start, before), (end, after) = inside[0], inside[-1]
        spent = {kind: after[kind] - before.get(kind, 0.0) for kind in after if kind != "other"}
        return {kind: round(1000 * seconds / (end - start), 3) for kind, seconds in sorted(spent.items()) if seconds >= 0}
