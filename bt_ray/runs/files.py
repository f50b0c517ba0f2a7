"""Small durable file operations: what is published is whole, or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bt_ray.errors import CommitError, StorageError

# What is wrong, and what to do.
STORAGE_FAULTS = {
    errno.ENOSPC: "its disk is full. Free some space",
    errno.EDQUOT: "the quota of its disk is used up. Free some space",
    errno.EFBIG: "no file may grow that large there. Raise the limit (`ulimit -f`)",
    errno.EROFS: "its disk can only be read. Make it writable",
    errno.EIO: "its disk gives errors. See to the disk",
}


FULL_BYTES = 1 << 16  # with no more than this left, a disk counts as full
FULL = re.compile(r"No space left on device|os error 28\b|code: 28\b|Disk quota exceeded")  # in libraries' own words


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Raise faults of the disk that `path` is written to as StorageError, which says what to do; other errors as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise _fault(path, error.errno) from error


def full_disk(path: Path, error: BaseException) -> StorageError | None:
    """What to raise for an error of a library that wrote below `path`, where it comes from a full disk. Else None."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    told = any(FULL.search(str(one)) for one in causes)
    return _fault(path, errno.ENOSPC) if told or shutil.disk_usage(path).free < FULL_BYTES else None


def _fault(path: Path, number: int) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {STORAGE_FAULTS[number]}, or move the run's folder to another disk, "
        "and run again: what was committed is kept, and no written row is run again."
    )


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; a reader sees the old or the new file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with storage(path):
        try:
            _write_synced(temporary, text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def publish_once(path: Path, text: str) -> bool:
    """Create `path` with `text` if it does not exist. False: somebody else published first."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with storage(path):
        try:
            _write_synced(temporary, text)
            os.link(temporary, path)  # atomic, and fails where the name exists
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return True


def read_json(path: Path) -> Any:
    """The JSON value of a file. Raises CommitError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, a tower of brackets
        raise CommitError(f"{path} is damaged ({error}). Delete it to have that piece made again.") from None


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and make it durable. A torn last line, left by a crash, is cut off first. StorageError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        cut_torn_line(file)
        append_durably(file, json.dumps(value, ensure_ascii=False).encode() + b"\n")


def append_durably(file: Any, data: bytes) -> None:
    """Append to an unbuffered file, whole or not at all, and wait for the disk. Raises StorageError."""
    size = file.seek(0, os.SEEK_END)
    with storage(Path(file.name)):
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)  # half a line would spoil the one that comes after it
            raise


def cut_torn_line(file: BinaryIO) -> None:
    """Remove what stands after the last line end of a file that is open for reading and appending."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def read_lines(path: Path) -> list[Any]:
    """The JSON lines of a file; a torn last line, left by a crash, is passed over."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    values = []
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            if number < len(lines) - 1:
                raise CommitError(f"{path}, line {number + 1} is damaged. Delete the line to have its row made again.") from None
    return values


def _write_synced(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
