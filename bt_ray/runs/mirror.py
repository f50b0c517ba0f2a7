"""A run in a bucket: its driver works in a copy on this machine, and a thread keeps the bucket up with it.

Nothing is appended to an object and no two objects change together, so what a run needs of its folder is done in the copy,
and the bucket gets it in an order in which it can be read at any moment: what a record speaks of comes before the record.

    <home>/run/         the driver's copy; <home> is <BT_RAY_HOME>/buckets/<hash of the URL>
    <home>/place.json   the URL
    <home>/copy.json    whose copy it is, and what of it the bucket has
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
from typing import Any

from bt_ray.errors import CommitError, StorageError
from bt_ray.runs.bucket import Bucket, BusyError, TakenError
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.lock import STOP, owner_of
from bt_ray.runs.objects import OWN, file_of, fetch, grows, is_kept, part_name, rank, remove
from bt_ray.runs.run_dir import PLACE
from bt_ray.runs.writer import Writer

SYNC_S = 5.0
BEAT_S = 20.0
PATIENCE_S = 600.0  # a bucket that is silent for so long stops the run
RETRY_S = 2.0
HEADER = "run.json"  # without it a folder is no run


@dataclass(frozen=True)
class Seen:
    """A file as it was when the bucket got it."""

    size: int
    mtime_ns: int


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
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep, self._beat, self._listen)]
        self._why: StorageError | None = None

    def __enter__(self) -> Mirror:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder.parent / PLACE, json.dumps({"url": self._bucket.place.url}))
        self._patiently(self._writer.take)
        try:
            self._take_up()
        except BaseException:
            with suppress(StorageError):
                self._writer.release()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def _take_up(self) -> None:
        """Make the copy the newest there is."""
        note = dict(read_json(self._note)) if self._note.is_file() else {"tokens": [], "sent": {}}
        is_whole = HEADER not in note["sent"] or (self.folder / HEADER).is_file()
        there = {file_of(name) for name in self._patiently(self._bucket.sizes)} - set(OWN)
        nobody_since = self._writer.newest in note["tokens"] or (self._writer.newest is None and not there)
        if nobody_since and note["tokens"] and is_whole:
            self._sent = {name: Seen(*value) for name, value in note["sent"].items() if name in there}
            self._patiently(self._restore)
        else:
            self._note.unlink(missing_ok=True)
            self._patiently(self._fetch)
        self._remember()

    def _restore(self) -> None:
        """Fetch what has gone from the copy, as where a cache is cleaned; a step whose whole folder is gone was deleted."""
        lost = {name for name in self._sent if not (self.folder / name).exists() and not self._is_deleted(name)}
        if lost:
            fetch(self._bucket, self.folder, lambda name: file_of(name) in lost)
            self._sent |= {name: _seen(self.folder / name) for name in lost if (self.folder / name).exists()}

    def _is_deleted(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return parts[0] == "stages" or (parts[0] == "steps" and not (self.folder / parts[0] / parts[1]).exists())

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
        except (StorageError, OSError) as error:
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
                self._sync()
                silent_since = None
            except BusyError as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > self._patience_s:
                    self._why = StorageError(f"{error} It has been silent for {self._patience_s:g} s, so the run was stopped.")
            except Exception as error:  # whatever it is, the run must not go on unseen
                self._why = self._reason(error)
        if self._why is not None:
            self._ask_to_stop()

    def _beat(self) -> None:
        """A thread of its own, for a large file may take minutes: shows that this driver is at work."""
        while self._why is None and not self._end.wait(BEAT_S):
            try:
                self._writer.renew()
            except BusyError:
                continue  # the other thread has the patience
            except Exception as error:  # as above
                self._why = self._reason(error)

    def _listen(self) -> None:
        """A thread of its own: hands a request to stop that lies in the bucket on to the driver, whichever lock it holds."""
        asked = False
        while not self._end.wait(SYNC_S):
            with suppress(StorageError, CommitError, OSError, ValueError, AttributeError):  # asked again soon
                if not asked and (found := self._bucket.get(STOP)):
                    asked = json.loads(found[0] or b"{}").get("token") == self._writer.token
                    self._bucket.delete(STOP)
                if asked and (owner := owner_of(self.folder)):
                    write_atomic(self.folder / STOP, json.dumps({"token": owner["token"]}))

    def _reason(self, error: Exception) -> StorageError:
        url = self._bucket.place.url
        if isinstance(error, TakenError):
            return StorageError(f"{url} was taken over by another driver; this one stops and leaves the run to it.")
        if isinstance(error, StorageError):
            return error
        if isinstance(error, OSError):
            return StorageError(f"{self.folder} cannot be read: {error}. Mend it, and run the same again.")
        return StorageError(f"{url} is not kept up any more: {type(error).__name__}: {error}. Run the same again.")

    def _ask_to_stop(self) -> None:
        """Stop the driver as `bt-ray stop` does. One that is only starting is asked again."""
        while not self._end.is_set():
            with suppress(OSError, StorageError, CommitError):
                if owner := owner_of(self.folder):
                    write_atomic(self.folder / STOP, json.dumps({"token": owner["token"]}))
            self._end.wait(RETRY_S)

    def _sync(self) -> None:
        """Bring the bucket what has changed: first what is gone, then the rest in the order of `rank`.

        Raises TakenError where this driver has been succeeded, before it changes anything.
        """
        files = self._files()
        gone = [name for name in self._sent if not (self.folder / name).exists() and self._is_deleted(name)]
        if HEADER in self._sent and not (self.folder / HEADER).is_file():  # after that look: it may be on its way out
            raise StorageError(f"{self.folder} is no run any more, and the bucket is left as it is. Run the same again.")
        changed = [name for name in files if self._is_new(name)]
        if not gone and not changed:
            return
        self._writer.renew(changes=True)
        for name in sorted(gone, key=rank, reverse=True):  # a record before what it speaks of
            self._drop(name)
        for name in sorted(changed, key=lambda one: (rank(one), one)):
            if self._why is not None:
                return
            with suppress(FileNotFoundError):  # removed since
                self._sent[name] = self._send(name, self.folder / name)
        self._remember()

    def _is_new(self, name: str) -> bool:
        with suppress(FileNotFoundError):
            return _seen(self.folder / name) != self._sent.get(name)
        return False

    def _drop(self, name: str) -> None:
        remove(self._bucket, name)
        del self._sent[name]

    def _send(self, name: str, path: Path) -> Seen:
        now = _seen(path)
        if not grows(name):
            self._bucket.upload(name, path)
            return now
        sent = self._sent.get(name, Seen(0, 0)).size
        if sent > now.size:  # a line was taken back: the disk had not kept it
            self._sent[name], sent = Seen(0, 0), 0
            self._remember()
            remove(self._bucket, name)
        with path.open("rb") as file:
            file.seek(sent)
            lines = file.read(now.size - sent)
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole:
            self._bucket.put(part_name(name, sent), whole)
        return Seen(sent + len(whole), now.mtime_ns)

    def _files(self) -> list[str]:
        """Names of the files that belong into the bucket. The steps come last: what a stage's record in the list speaks of
        is in the list too."""

        def committed(step: str) -> bool:
            return (self.folder / step / "record.json").is_file()

        names = (str(path.relative_to(self.folder)) for path in _files_below(self.folder))
        return [name for name in names if is_kept(name, committed)]

    def _remember(self) -> None:
        sent = {name: [seen.size, seen.mtime_ns] for name, seen in self._sent.items()}
        # What was there when this driver came is in the copy too, and counts until this driver changes something.
        tokens = [self._writer.token, self._writer.newest]
        write_atomic(self._note, json.dumps({"tokens": [one for one in tokens if one], "sent": sent}))

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """The result of an action on the bucket, tried until it answers or the patience is at its end."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return action()
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)


def _seen(path: Path) -> Seen:
    stat = path.stat()
    return Seen(stat.st_size, stat.st_mtime_ns)


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort(key=lambda name: name == "steps")
        yield from (Path(root, name) for name in names)
