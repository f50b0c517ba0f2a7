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
Sealed = Mapping[str, Sequence[Any]]  # by segment, its bytes and their sha256: what a committed step consists of
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


def read_rows(folder: str | Path) -> dict[Key, RolloutRow]:
    """All rows of a folder by (example_id, sample); of equal keys the first in file order.

    A torn last line of a segment is left out: its row was in flight. Damage anywhere else raises
    CommitError, because rows would be missing silently.
    """
    rows: dict[Key, RolloutRow] = {}
    for _, _, row in _scan(folder):
        rows.setdefault(_key(row), row)
    return rows


def done_keys(folder: str | Path) -> frozenset[Key]:
    """Keys of the rows that need not be run again."""
    return frozenset(_key(row) for _, _, row in _scan(folder))


def keys_in(segment: str) -> frozenset[Key]:
    """Keys of the rows of one segment, which need not be there. CommitError as of `read_rows`."""
    path = Path(segment)
    return frozenset(_key(row) for _, row in _scan_segment(path)) if path.is_file() else frozenset()


def seal(folder: str | Path) -> dict[str, list[Any]]:
    """The segments of a folder as they are now: [bytes, sha256] by name, of whole lines."""
    sealed = {}
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        size, digest = 0, hashlib.sha256()
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    size += len(line)
                    digest.update(line)
        sealed[path.name] = [size, digest.hexdigest()]
    return sealed


class StoredRows(Sequence[RolloutRow]):
    """Rows of a folder in the order of `keys`, each read from the disk when it is asked for.

    The memory is a place of a few bytes per row, whatever the rows hold. Rows are as of `read_rows`; raises CommitError
    where one of `keys` has none. `sealed`: of `seal`; what was written later, by an attempt that nobody waits for any more,
    is not looked at, and what was changed raises CommitError.
    """

    def __init__(self, folder: str | Path, keys: Iterable[Key], sealed: Sealed | None = None) -> None:
        order = {key: index for index, key in enumerate(keys)}
        self._segments: list[Path] = []
        self._segment_of, self._start_of = array("i", [-1]) * len(order), array("q", [0]) * len(order)
        for path, start, row in _scan(folder) if sealed is None else _scan_sealed(folder, sealed):
            if not self._segments or self._segments[-1] != path:
                self._segments.append(path)
            index = order.get(_key(row))
            if index is not None and self._segment_of[index] < 0:
                self._segment_of[index], self._start_of[index] = len(self._segments) - 1, start
        missing = [key for key, index in order.items() if self._segment_of[index] < 0]
        if missing:
            raise CommitError(
                f"{folder} lacks {len(missing)} of {len(order)} rows, the first of them example {missing[0][0]!r}, sample "
                f"{missing[0][1]}. Files were removed; remove the step's folder and run the step again."
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


def _scan(folder: str | Path) -> Iterator[tuple[Path, int, RolloutRow]]:
    """Segment, first byte and row of each whole line, segments in order of their names. CommitError as of `read_rows`."""
    for found in sorted(Path(folder).glob(f"*{SUFFIX}")):
        path = inside(found.parent, found.name)
        for start, row in _scan_segment(path):
            yield path, start, row


def _scan_sealed(folder: str | Path, sealed: Sealed) -> Iterator[tuple[Path, int, RolloutRow]]:
    """As `_scan`, of the segments and bytes that were sealed."""
    for name, (size, sha256) in sorted(sealed.items()):
        path = inside(Path(folder), name)
        if not path.is_file() or _sha256(path, size) != sha256:
            raise CommitError(f"{path} is gone, or differs from its record. Delete {path.parent.parent} to make the step again.")
        start = 0
        with path.open("rb") as file:
            while start < size:
                line = file.readline()
                yield path, start, _row(line.rstrip(b"\n"), f"{path}, byte {start}")
                start += len(line)


def _sha256(path: Path, size: int) -> str:
    """Of the first bytes of a file, or of all where it is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _scan_segment(path: Path) -> Iterator[tuple[int, RolloutRow]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            yield start, _row(line[:-1], f"{path}, line {number}")
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
    raise CommitError(f"{where} is no rollout row. The file was damaged; remove the step's folder and run the step again.")
