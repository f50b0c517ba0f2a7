"""Which bytes of a run's copy its bucket has, and how the others go there.

A file that grows goes up in parts as its lines come; once nothing more will come, its parts become one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bt_ray.runs.bucket import Bucket
from bt_ray.runs.objects import delete, grows, part_name, parts_of, remove

TAIL_BYTES = 256
TAKEN_BACK = "taken back"  # no file has this for its hash
PART_BYTES = 64 << 20  # of one part, about: all of it is in memory once


@dataclass(frozen=True)
class Seen:
    """A file as it was when the bucket got it. Of one that grows: how many bytes of it that were, in how many parts at
    least, and a hash of their end, by which a file that was cut and grew again is told from one that only grew."""

    size: int
    mtime_ns: int
    sent: int = 0
    tail: str = ""
    parts: int = 0


class Sent:
    """What the bucket has of the copy in `folder`. `remember` is called before lines are taken back from the bucket.

    The methods that send raise BusyError and StorageError, and FileNotFoundError for a file that was removed.
    """

    def __init__(self, bucket: Bucket, folder: Path, remember: Callable[[], None]) -> None:
        self._bucket = bucket
        self._folder = folder
        self._remember = remember
        self._seen: dict[str, Seen] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def names(self) -> list[str]:
        """Names of the files that the bucket has."""
        return list(self._seen)

    def as_json(self) -> dict[str, Any]:
        """For `take_up`."""
        return {name: astuple(seen) for name, seen in self._seen.items()}

    def take_up(self, noted: dict[str, Any]) -> None:
        """Go on from what `as_json` gave."""
        self._seen = {name: Seen(*value) for name, value in noted.items()}

    def fetched(self, names: Iterable[str]) -> None:
        """These files just came from the bucket, whole."""
        self._seen |= {name: self._whole(name) for name in names}

    def is_old(self, name: str) -> bool:
        """Whether a file is there and has changed since the bucket got it."""
        before = self._seen.get(name)
        with suppress(FileNotFoundError):
            now = _seen(self._folder / name)
            return before is None or (now.size, now.mtime_ns) != (before.size, before.mtime_ns)
        return False

    def drop(self, name: str) -> None:
        """Remove a file from the bucket."""
        remove(self._bucket, name)
        del self._seen[name]

    def send(self, name: str) -> None:
        """Bring the bucket a file, or what came to it since."""
        path = self._folder / name
        now = _seen(path)
        if grows(name):
            with path.open("rb") as file:
                now = self._send_lines(name, file, now)
        else:
            self._bucket.upload(name, path)
        self._seen[name] = now

    def _send_lines(self, name: str, file: BinaryIO, now: Seen) -> Seen:
        before = self._seen.get(name, Seen(0, 0))
        if _tail(file, before.sent) != before.tail:  # lines were taken back: the disk had not kept them, or somebody's hand
            self._seen[name] = Seen(0, 0, tail=TAKEN_BACK)  # until all is gone: this may be cut off, and is then begun again
            self._remember()
            remove(self._bucket, name)
            before = Seen(0, 0)
        sent, parts = before.sent, before.parts
        while lines := _whole_lines(file, sent):
            self._bucket.put(part_name(name, sent), lines)
            sent, parts = sent + len(lines), parts + 1
        return Seen(now.size, now.mtime_ns, sent, _tail(file, sent), parts)

    def in_parts(self) -> list[str]:
        """Files that lie in the bucket in more parts than they need to."""
        return [name for name, seen in self._seen.items() if seen.parts > 1 and seen.sent <= PART_BYTES]

    def join(self, name: str) -> None:
        """Put a file that grows no more in one part. Whoever reads meanwhile finds all of its bytes at any moment."""
        before = self._seen[name]
        with (self._folder / name).open("rb") as file:
            if _tail(file, before.sent) != before.tail:
                return  # the next `send` sees to it
            file.seek(0)
            self._bucket.put(part_name(name, 0), file.read(before.sent))
        delete(self._bucket, [part for part in parts_of(self._bucket, name) if part != part_name(name, 0)])
        self._seen[name] = Seen(before.size, before.mtime_ns, before.sent, before.tail, parts=1)

    def _whole(self, name: str) -> Seen:
        now = _seen(self._folder / name)
        if not grows(name):
            return now
        with (self._folder / name).open("rb") as file:
            return Seen(now.size, now.mtime_ns, now.size, _tail(file, now.size))


def _whole_lines(file: BinaryIO, start: int) -> bytes:
    """The lines from a byte on, of one part at most. What comes after a line that is being written waits for it."""
    file.seek(start)
    whole: list[bytes] = []
    for line in file.readlines(PART_BYTES):
        if not line.endswith(b"\n"):
            break
        whole.append(line)
    return b"".join(whole)


def _seen(path: Path) -> Seen:
    stat = path.stat()
    return Seen(stat.st_size, stat.st_mtime_ns)


def _tail(file: BinaryIO, end: int) -> str:
    """Hash of the last bytes before `end`; of a shorter file that of what there is."""
    start = max(0, end - TAIL_BYTES)
    file.seek(start)
    return hashlib.sha256(file.read(end - start)).hexdigest()[:16] if end else ""
