"""Rows that appear on the disk, and the processors' time meanwhile. For benchmarks/scaling.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psutil

TENTH = 0.1
LOOK_S = 0.2


class Watch:
    """Rows over time, and the processor time of all of this machine meanwhile."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder, self._num_rows = folder, num_rows
        self._seen: list[tuple[float, int, float]] = []
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
        while not self._ended.wait(LOOK_S):
            for path in self._folder.rglob("*.jsonl"):
                size, rows = ends.get(path, (0, 0))
                with path.open("rb") as file:
                    file.seek(size)
                    data = file.read()
                ends[path] = (size + len(data), rows + data.count(b"\n"))
            times = psutil.cpu_times()
            busy = times.user + times.nice + times.system
            self._seen.append((time.monotonic(), sum(rows for _, rows in ends.values()), busy))

    def found(self) -> dict[str, Any]:
        """Rows per second and busy cores between the first and the last tenth."""
        inside = [one for one in self._seen if TENTH * self._num_rows <= one[1] <= (1 - TENTH) * self._num_rows]
        if len(inside) < 2:
            raise SystemExit("The run was too short for a steady state; ask for more --rows.")
        (start_s, start, start_busy), (end_s, end, end_busy) = inside[0], inside[-1]
        return {
            "seconds": round(self.seconds, 1),
            "rows_per_s": round((end - start) / (end_s - start_s), 2),
            "cores_busy": round((end_busy - start_busy) / (end_s - start_s), 2),
        }
