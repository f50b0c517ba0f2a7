"""Rollout rows on disk: each worker appends to a segment of its own, one JSON line per row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bt_ray.errors import CommitError
from bt_ray.rollout.tasks import Key, RolloutRow
from bt_ray.runs.files import append_durably, cut_torn_line, storage
from bt_ray.runs.inside import inside

SUFFIX = ".jsonl"


class SegmentWriter:
    """Appends rows to one file; a row that was written survives the death of its writer.

    A line that an earlier writer left unfinished is cut off first: its row counts as not run.
    """

    def __init__(self, path: str) -> None:
        with storage(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - kept open between rows
        cut_torn_line(self._file)

    def write(self, row: RolloutRow) -> None:
        """Append one row and wait until it is on the disk. Raises StorageError, without half a row behind it."""
        append_durably(self._file, json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read_rows(folder: str | Path) -> dict[Key, RolloutRow]:
    """All rows of a folder by (example_id, sample); of equal keys the first in file order.

    A torn last line of a segment is left out: its row was in flight. Damage anywhere else raises
    CommitError, because rows would be missing silently.
    """
    rows: dict[Key, RolloutRow] = {}
    for found in sorted(Path(folder).glob(f"*{SUFFIX}")):
        path = inside(found.parent, found.name)
        data = path.read_bytes()
        complete, _, _ = data.rpartition(b"\n")
        for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
            row = _row(line, f"{path}, line {number}")
            rows.setdefault((row["example_id"], row["sample"]), row)
    return rows


def done_keys(folder: str | Path) -> frozenset[Key]:
    """Keys of the rows that need not be run again."""
    return frozenset(read_rows(folder))


def counts(rows: dict[Key, RolloutRow]) -> dict[str, int]:
    """Rows, accepted rows, and errors by kind (`error_parse`, ...)."""
    result = {"rows": len(rows), "accepted": sum(bool(row["accept"]) for row in rows.values())}
    for row in rows.values():
        if row["error"]:
            name = f"error_{row['error']['kind']}"
            result[name] = result.get(name, 0) + 1
    return result


def _is_row(row: dict[str, Any]) -> bool:
    """Whether what every reader needs is there: whose row it is, and how it ended."""
    error = row.get("error")
    ended = (
        "accept" in row and "error" in row and (error is None or (isinstance(error, dict) and isinstance(error.get("kind"), str)))
    )
    return ended and isinstance(row.get("example_id"), str) and type(row.get("sample")) is int


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and _is_row(row):
            return row
    except (ValueError, RecursionError):
        pass  # said below, with the place
    raise CommitError(f"{where} is no rollout row. The file was damaged; remove the step's folder and run the step again.")
