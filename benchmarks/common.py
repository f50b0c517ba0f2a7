"""What the benchmark scripts share: one JSON line a figure, with the machine and the date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

MAX_SAID = 3000  # characters of either stream that are shown of a command that failed


def machine() -> str:
    """Processor and cores of this machine, in a few words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} x {name}"


class Stolen:
    """Share of the processors' time since it was made that the host of a virtual machine gave to others (Linux)."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except OSError:
            return 0, 0
        return fields[7], sum(fields)

    def share(self) -> float:
        stolen, total = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return round(stolen / total, 3) if total else 0.0


def show(figure: str, **values: Any) -> None:
    """Print one figure as a JSON line."""
    print(json.dumps({"figure": figure, **values, "machine": machine(), "date": datetime.date.today().isoformat()}), flush=True)


def bt_ray(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line tool of this environment. With `check`, a failure ends the script and shows what the tool said last."""
    done = subprocess.run([sys.executable, "-m", "bt_ray.cli", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = f"{done.stdout[-MAX_SAID:]}\n{done.stderr[-MAX_SAID:]}".strip()
        raise SystemExit(f"{said}\n`bt-ray {' '.join(arguments)}` ended with {done.returncode}; its last words are above.")
    return done


def stage_table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One small row per stage of a report."""
    return [
        {
            "path": stage["path"],
            "status": stage["status"],
            "test": stage["test"],
            "lm_calls": stage["lm_calls"],
            "seconds": round(stage["seconds"], 1),
            "paid": stage["paid"],
        }
        for stage in report["stages"]
    ]
