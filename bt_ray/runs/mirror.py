"""A run in a bucket: its driver works in a copy on this machine, and a thread keeps the bucket up with it.

Nothing is appended to an object and no two objects change together, so what a run needs of its folder is done in the copy,
and the bucket gets it in an order in which it can be read at any moment: what a record speaks of comes before the record.

    <home>/buckets/<hash of the URL>/run/         the driver's copy
    <home>/buckets/<hash of the URL>/place.json   the URL
    <home>/buckets/<hash of the URL>/copy.json    whose copy it is, and what of it the bucket has

Files that grow line by line lie in the bucket as parts: `rows/x.jsonl/000000000000`, named by the byte that they begin with.
Not kept there: scratch/, and artifacts of a step that has not committed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bt_ray.errors import StorageError
from bt_ray.runs.bucket import Bucket, BusyError, TakenError
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.inside import inside
from bt_ray.runs.lock import LOCK, STOP, owner_of
from bt_ray.runs.run_dir import PLACE
from bt_ray.runs.writer import WRITER, Writer

SYNC_S = 5.0
BEAT_S = 20.0
PATIENCE_S = 600.0  # a bucket that is silent for so long stops the run
RETRY_S = 2.0
OWN = (LOCK, STOP, WRITER)  # of one machine, or of the bucket: never copied
GROWS = ".jsonl"
PART_DIGITS = 12


@dataclass(frozen=True)
class Seen:
    """A file as it was when the bucket got it."""

    size: int
    mtime_ns: int


def rank(name: str) -> int:
    """When a file goes up: what others speak of before those that speak of it. Pure."""
    parts = PurePosixPath(name).parts
    if parts[-1] == "record.json":
        return 2 if parts[0] == "steps" else 3
    if name in ("run.json", "pick.json"):
        return 4
    return 0 if parts[0] in ("examples", "steps") else 1


def is_kept(name: str, committed: Callable[[str], bool]) -> bool:
    """Whether a file of a run goes into the bucket. `committed`: whether a step's folder has its record. Pure."""
    parts = PurePosixPath(name).parts
    if parts[0] == "scratch" or name in OWN or any(part.startswith(".") for part in parts):
        return False
    if parts[-1] in (LOCK, STOP):  # of a step that a stage is at
        return False
    if parts[0] == "steps" and len(parts) > 2 and parts[2].startswith("files-"):
        return committed("/".join(parts[:2]))
    return True


def grows(name: str) -> bool:
    """Whether a file is appended to, line by line. Pure."""
    parts = PurePosixPath(name).parts
    in_files = parts[0] == "steps" and len(parts) > 2 and parts[2].startswith("files-")
    return name.endswith(GROWS) and parts[0] != "examples" and not in_files


class Mirror:
    """The driver's side: takes the run, brings the copy up to date, and the bucket while the run is at work.

    A context manager. Entering raises RunDirError where another driver holds the run, StorageError where the bucket cannot
    be used. Leaving raises StorageError where something could not be brought there; the copy keeps it for the next time.
    """

    def __init__(self, bucket: Bucket, home: Path, patience_s: float = PATIENCE_S) -> None:
        self._bucket = bucket
        self.folder = home / "run"
        self._note = home / "copy.json"
        self._patience_s = patience_s
        self._writer = Writer(bucket)
        self._sent: dict[str, Seen] = {}
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep, self._beat)]
        self._why: StorageError | None = None

    def __enter__(self) -> Mirror:
        last = self._patiently(self._writer.take)
        try:
            self._take_up(last)
        except BaseException:
            with suppress(StorageError):
                self._writer.release()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def _take_up(self, last: str | None) -> None:
        """Make the copy the newest there is. `last`: token of whoever wrote last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder.parent / PLACE, json.dumps({"url": self._bucket.place.url}))
        note = read_json(self._note) if self._note.is_file() else {}
        if last is not None and note.get("token") == last:  # nobody has written since this copy did
            self._sent = {name: Seen(*value) for name, value in note["sent"].items()}
        else:
            self._patiently(self._fetch)
        self._remember()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        if self._why is not None:
            with suppress(StorageError):
                self._writer.release()
            raise self._why
        try:
            self._patiently(self._sync)
            self._patiently(self._writer.release)
        except StorageError as error:
            raise StorageError(
                f"{error} What the run has done is in {self.folder} and not all in the bucket: run the same again on this "
                "machine, which sends what is missing and repeats nothing."
            ) from error

    def _fetch(self) -> None:
        """Make the copy what the bucket has: another machine wrote last."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        fetch(self._bucket, self.folder)
        self._sent = {name: _seen(self.folder / name) for name in self._files()}

    def _keep(self) -> None:
        """A thread: syncs until the end, or until the bucket is lost."""
        silent_since = None
        while self._why is None and not self._end.wait(SYNC_S if silent_since is None else RETRY_S):
            try:
                self._take_request()
                self._sync()
                silent_since = None
            except BusyError as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > self._patience_s:
                    self._why = StorageError(f"{error} It has been silent for {self._patience_s:g} s, so the run was stopped.")
            except StorageError as error:
                self._why = error
        if self._why is not None:
            self._ask_to_stop()

    def _beat(self) -> None:
        """A thread of its own, for a large file may take minutes: shows that this driver is at work."""
        while not self._end.wait(BEAT_S):
            try:
                self._writer.renew()
            except BusyError:
                continue  # the other thread has the patience
            except TakenError:
                url = self._bucket.place.url
                self._why = StorageError(f"{url} was taken over by another driver; this one stops and leaves the run to it.")
                return
            except StorageError as error:
                self._why = error
                return

    def _ask_to_stop(self) -> None:
        """Stop the driver as `bt-ray stop` does. One that is only starting is asked again."""
        while not self._end.is_set():
            owner = owner_of(self.folder)
            if owner is not None:
                with suppress(OSError, StorageError):
                    write_atomic(self.folder / STOP, json.dumps({"token": owner["token"]}))
            self._end.wait(RETRY_S)

    def _take_request(self) -> None:
        """Hand a request to stop that lies in the bucket on to the driver."""
        found = self._bucket.get(STOP)
        owner = owner_of(self.folder)
        if found is None or owner is None:
            return
        with suppress(ValueError, AttributeError):
            if json.loads(found[0]).get("token") == self._writer.token:
                write_atomic(self.folder / STOP, json.dumps({"token": owner["token"]}))
        self._bucket.delete(STOP)

    def _sync(self) -> None:
        """Bring the bucket what has changed, in the order of `rank`."""
        files = self._files()
        changed = False
        for name in sorted(files, key=lambda one: (rank(one), one)):
            path = self.folder / name
            try:
                now = _seen(path)
                if now == self._sent.get(name):
                    continue
                self._sent[name] = self._send(name, path, now)
            except FileNotFoundError:  # removed since
                continue
            changed = True
        for name in [name for name in self._sent if name not in files and not (self.folder / name).exists()]:
            self._bucket.delete(name)
            del self._sent[name]
            changed = True
        if changed:
            self._remember()

    def _send(self, name: str, path: Path, now: Seen) -> Seen:
        if not grows(name):
            self._bucket.upload(name, path)
            return now
        sent = self._sent.get(name, Seen(0, 0)).size
        if sent > now.size:
            raise StorageError(f"{path} has become shorter than what the bucket has of it. Start the run in a new place.")
        with path.open("rb") as file:
            file.seek(sent)
            lines = file.read(now.size - sent)
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole:
            self._bucket.put(f"{name}/{sent:0{PART_DIGITS}d}", whole)
        return Seen(sent + len(whole), now.mtime_ns) if len(whole) < len(lines) else now

    def _files(self) -> list[str]:
        """Names of the files that belong into the bucket. The steps come last: what a stage's record in the list speaks of
        is in the list too."""

        def committed(step: str) -> bool:
            return (self.folder / step / "record.json").is_file()

        names = (str(path.relative_to(self.folder)) for path in _files_below(self.folder))
        return [name for name in names if is_kept(name, committed)]

    def _remember(self) -> None:
        sent = {name: [seen.size, seen.mtime_ns] for name, seen in self._sent.items()}
        write_atomic(self._note, json.dumps({"token": self._writer.token, "sent": sent}))

    def _patiently(self, action: Callable[[], str | None]) -> str | None:
        """The result of an action on the bucket, tried until it answers or the patience is at its end."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return action()
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)


def fetch(bucket: Bucket, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy a run's objects into an empty folder; what grows is put together from its parts.

    Raises RunDirError for a name that leads out of the folder, StorageError where a part is missing.
    """
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in bucket.sizes():
        if name in OWN or not wanted(name):
            continue
        parent, _, last = name.rpartition("/")
        if parent.endswith(GROWS) and last.isdigit():
            parts.setdefault(parent, []).append((int(last), name))
            continue
        path = inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        bucket.download(name, path)
    for name, found in parts.items():
        path = inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for data in _in_order(bucket, name, sorted(found)):
                file.write(data)


def _in_order(bucket: Bucket, name: str, found: list[tuple[int, str]]) -> Iterator[bytes]:
    end = 0
    for start, part in found:
        data = bucket.get(part)
        if data is None or start > end:
            raise StorageError(
                f"{bucket.place.url}/{name} lacks the bytes from {end} on. Delete {name}/ there to have its rows made again."
            )
        yield data[0][end - start :]  # a part that was sent twice may have grown in between
        end = max(end, start + len(data[0]))


def _seen(path: Path) -> Seen:
    stat = path.stat()
    return Seen(stat.st_size, stat.st_mtime_ns)


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort(key=lambda name: name == "steps")
        yield from (Path(root, name) for name in names)
