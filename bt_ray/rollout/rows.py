"""Rollout rows on disk: each worker appends to a segment of its own, one JSON line per row."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, overload

import msgspec

from bt_ray.errors import CommitError
from bt_ray.rollout.tasks import Key, RolloutRow
from bt_ray.runs.files import append_durably, cut_torn_line, storage
from bt_ray.runs.inside import inside

SUFFIX = ".jsonl"
REUSED = "reused"  # segment of the rows that an earlier step of the run paid for, and their mark
Sealed = Mapping[str, Sequence[Any]]  # by segment, its bytes and their sha256: the rows that a record vouches for
_decode = msgspec.json.Decoder().decode  # keeps integers of any length, as Python writes them


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


def read_rows(folder: str | Path, sealed: Sealed | None = None) -> dict[Key, RolloutRow]:
    """All rows of a folder by (example_id, sample); of equal keys the first in file order. `sealed`: as of `StoredRows`.

    A torn last line of a segment is left out: its row was in flight. Damage anywhere else raises
    CommitError, because rows would be missing silently.
    """
    rows: dict[Key, RolloutRow] = {}
    for _, _, row in _scan(folder, sealed):
        rows.setdefault(_key(row), row)
    return rows


def done_keys(folder: str | Path) -> frozenset[Key]:
    """Keys of the rows that need not be run again."""
    return frozenset(_key(row) for _, _, row in _scan(folder))


def keys_in(segment: str) -> frozenset[Key]:
    """Keys of the rows of one segment, which need not be there. CommitError as of `read_rows`."""
    return frozenset(_key(row) for row in rows_in(segment))


def rows_in(segment: str | Path) -> Iterator[RolloutRow]:
    """Rows of one segment, which need not be there, one by one. CommitError as of `read_rows`."""
    path = Path(segment)
    return (_row(line[:-1], f"{path}, byte {start}") for start, line in _whole_lines(path))


class StoredRows(Sequence[RolloutRow]):
    """Rows of a folder in the order of `keys`, each read from the disk when it is asked for.

    The memory is a place of a few bytes per row, whatever the rows hold. Rows are as of `read_rows`; raises CommitError
    where one of `keys` has none. `sealed` of a committed step: what was written later, by an attempt that nobody waits for any
    more, is not looked at, and what was changed raises CommitError. The attribute `sealed` says what was read.
    """

    def __init__(self, folder: str | Path, keys: Iterable[Key], sealed: Sealed | None = None) -> None:
        order = {key: index for index, key in enumerate(keys)}
        self._segments: list[Path] = []
        self._segment_of, self._start_of = array("i", [-1]) * len(order), array("q", [0]) * len(order)
        self.sealed: dict[str, list[Any]] = {}
        for path, start, row in _scan(folder, sealed, self.sealed):
            if not self._segments or self._segments[-1] != path:
                self._segments.append(path)
            index = order.get(_key(row))
            if index is not None and self._segment_of[index] < 0:
                self._segment_of[index], self._start_of[index] = len(self._segments) - 1, start
        missing = [key for key, index in order.items() if self._segment_of[index] < 0]
        if missing:
            raise CommitError(
                f"{folder} lacks {len(missing)} of {len(order)} rows, the first of them example {missing[0][0]!r}, sample "
                f"{missing[0][1]}. Files were removed. Delete the step's folder to make the step again."
            )

    def __len__(self) -> int:
        return len(self._segment_of)

    @overload
    def __getitem__(self, index: int) -> RolloutRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[RolloutRow]: ...
    def __getitem__(self, index: int | slice) -> RolloutRow | list[RolloutRow]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        with self._segments[self._segment_of[index]].open("rb") as file:
            return self._at(file, index)

    def __iter__(self) -> Iterator[RolloutRow]:
        with ExitStack() as opened:
            files = [opened.enter_context(path.open("rb")) for path in self._segments]
            for index, segment in enumerate(self._segment_of):
                yield self._at(files[segment], index)

    def _at(self, file: BinaryIO, index: int) -> RolloutRow:
        file.seek(self._start_of[index])
        return _row(file.readline().rstrip(b"\n"), file.name)


def _key(row: RolloutRow) -> Key:
    return row["example_id"], row["sample"]


def _scan(
    folder: str | Path, sealed: Sealed | None = None, found: dict[str, list[Any]] | None = None
) -> Iterator[tuple[Path, int, RolloutRow]]:
    """Segment, first byte and row of each whole line, segments in order of their names. CommitError as of `read_rows`.

    `found` gets what was read: [bytes, sha256] by segment.
    """
    folder = Path(folder)
    for name in sorted(sealed) if sealed is not None else sorted(path.name for path in folder.glob(f"*{SUFFIX}")):
        path, end, digest = inside(folder, name), 0, hashlib.sha256()
        for number, (start, line) in enumerate(_whole_lines(path, sealed[name][0] if sealed is not None else None), 1):
            digest.update(line)
            end = start + len(line)
            yield path, start, _row(line[:-1], f"{path}, line {number}")
        if sealed is not None and [end, digest.hexdigest()] != list(sealed[name]):
            raise CommitError(f"{path} is gone, or differs from its record. Delete {folder.parent} to make the step again.")
        if found is not None:
            found[name] = [end, digest.hexdigest()]


def _whole_lines(path: Path, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """First byte and line, up to a torn one, or up to `size` bytes; none of a file that is not there."""
    start = 0
    if not path.is_file():
        return
    with path.open("rb") as file:
        while (size is None or start < size) and (line := file.readline()).endswith(b"\n"):
            yield start, line
            start += len(line)


def _is_row(row: dict[str, Any]) -> bool:
    """Whether what every reader needs is there: whose row it is, and how it ended."""
    error = row.get("error")
    ended = (
        "accept" in row and "error" in row and (error is None or (isinstance(error, dict) and isinstance(error.get("kind"), str)))
    )
    return ended and isinstance(row.get("example_id"), str) and type(row.get("sample")) is int


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _decode(line)
        if isinstance(row, dict) and _is_row(row):
            return row
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # said below, with the place
    raise CommitError(f"{where} is no rollout row. The file was damaged. Delete the step's folder to make the step again.")
