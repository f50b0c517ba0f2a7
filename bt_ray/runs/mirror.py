"""A run in a bucket: its driver works in a copy on this machine, and a thread keeps the bucket up with it.

Nothing is appended to an object and no two objects change together, so what a run needs of its folder is done in the copy,
and the bucket gets it in an order in which it can be read at any moment: what a record speaks of comes before the record.

    <home>/run/         the driver's copy; <home> is <BT_RAY_HOME>/buckets/<hash of the store's address and the URL>
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
from pathlib import Path, PurePosixPath
from typing import Any

from bt_ray.errors import BtRayError, CommitError, RunDirError, StorageError
from bt_ray.runs.bucket import Bucket, BusyError, TakenError
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.lock import STOP, ask_to_stop, is_held, owner_of
from bt_ray.runs.objects import belongs, fetch, file_of, rank, step_of_artifact
from bt_ray.runs.run_dir import PLACE
from bt_ray.runs.sent import Sent
from bt_ray.runs.writer import Writer

SYNC_S = 5.0
BEAT_S = 20.0
PATIENCE_S = 600.0  # a bucket that is silent for so long stops the run
RETRY_S = 2.0
HEADER = "run.json"  # without it a folder is no run


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
        self._sent = Sent(bucket, self.folder, self._remember)
        self._end, self._given_back = threading.Event(), threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep, self._listen)]
        self._why: StorageError | None = None

    def __enter__(self) -> Mirror:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder.parent / PLACE, json.dumps({"url": self._bucket.place.url}))
        self._patiently(self._writer.take)
        self._beating.start()  # to fetch a run may take long
        try:
            self._take_up()
        except BaseException:
            self._give_back()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def _take_up(self) -> None:
        """Make the copy the newest there is."""
        note = dict(read_json(self._note)) if self._note.is_file() else {"tokens": [], "sent": {}}
        is_whole = HEADER not in note["sent"] or (self.folder / HEADER).is_file()
        there = {file for name in self._patiently(self._bucket.names) if belongs(file := file_of(name))}
        nobody_since = self._writer.newest in note["tokens"] or (self._writer.newest is None and not there)
        if nobody_since and note["tokens"] and is_whole:
            self._sent.take_up({name: seen for name, seen in note["sent"].items() if name in there})
            self._patiently(self._restore)
        else:
            self._note.unlink(missing_ok=True)
            self._patiently(self._fetch)
        self._remember()

    def _restore(self) -> None:
        """Fetch what has gone from the copy, as where a cache is cleaned; a step whose whole folder is gone was deleted."""
        lost = {name for name in self._sent.names() if not (self.folder / name).exists() and not self._is_deleted(name)}
        if lost:
            fetch(self._bucket, self.folder, lambda name: file_of(name) in lost)
            self._sent.fetched(name for name in lost if (self.folder / name).exists())

    def _is_deleted(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return parts[0] == "stages" or (parts[0] == "steps" and not (self.folder / parts[0] / parts[1]).exists())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        try:
            if self._why is None:
                self._patiently(self._sync)
        except (StorageError, OSError) as lost:
            self._why = self._why or self._reason(lost)
        finally:
            self._give_back()
        if self._why is None:
            return
        first = f" The run itself ended with: {error}" if isinstance(error, BtRayError) else ""
        if isinstance(self._why, TakenError):
            raise TakenError(f"{self._why}{first}")
        raise StorageError(
            f"{self._why} What the run has done is in {self.folder} and may not all be in the bucket: run the same again on "
            f"this machine, which sends what is missing and repeats nothing.{first}"
        ) from self._why

    def _give_back(self) -> None:
        """Let the next driver in. Where the bucket is silent it waits for this one to be stale, or gone."""
        self._given_back.set()
        self._beating.join()
        with suppress(StorageError):
            self._writer.release()

    def _fetch(self) -> None:
        """Make the copy what the bucket has: another machine wrote last."""
        if is_held(self.folder):  # as with a bucket that was emptied by hand while its driver works
            raise RunDirError(
                f"{self.folder} has a driver at work, of which {self._bucket.place.url} says nothing. Stop it first."
            )
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        fetch(self._bucket, self.folder)
        self._sent.take_up({})
        self._sent.fetched(self._files())

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
            except Exception as error:  # raised at the exit: whatever it is, the run must not go on unseen
                self._why = self._reason(error)

    def _beat(self) -> None:
        """A thread of its own, from the first moment to the last, for a large file may take minutes: shows that this driver
        is at work."""
        while self._why is None and not self._given_back.wait(BEAT_S):
            try:
                self._writer.renew()
            except BusyError:
                continue  # the syncs have the patience
            except Exception as error:  # raised at the exit, as above
                self._why = self._reason(error)

    def _listen(self) -> None:
        """A thread of its own: stops the driver, whichever lock it holds, where that is asked for in the bucket, or where the
        bucket is lost."""
        asked = False
        while not self._end.wait(SYNC_S):
            with suppress(StorageError, CommitError, OSError, ValueError, AttributeError):  # asked again soon
                if self._why is None and not asked and (found := self._bucket.get(STOP)):
                    asked = json.loads(found.data or b"{}").get("token") == self._writer.token
                    self._bucket.delete(STOP)
                if (asked or self._why) and (owner := owner_of(self.folder)):
                    ask_to_stop(self.folder, owner)

    def _reason(self, error: Exception) -> StorageError:
        url = self._bucket.place.url
        if isinstance(error, TakenError):
            return TakenError(f"{url} was taken over by another driver; this one stops and leaves the run to it.")
        if isinstance(error, StorageError):
            return error
        if isinstance(error, OSError):
            return StorageError(f"{self.folder} cannot be read: {error}.")
        return StorageError(f"{url} is not kept up any more: {type(error).__name__}: {error}.")

    def _sync(self) -> None:
        """Bring the bucket what has changed: first what is gone, then the rest in the order of `rank`.

        Raises TakenError where this driver has been succeeded, before it changes anything.
        """
        files = self._files()
        gone = [name for name in self._sent.names() if not (self.folder / name).exists() and self._is_deleted(name)]
        if HEADER in self._sent and not (self.folder / HEADER).is_file():  # after that look: it may be on its way out
            raise StorageError(f"{self.folder} is no run any more; the bucket is left as it is.")
        changed = [name for name in files if self._sent.is_old(name)]
        if not gone and not changed and not self._to_join():
            return
        self._writer.renew(changes=True)
        for name in sorted(gone, key=rank, reverse=True):  # a record before what it speaks of
            self._sent.drop(name)
        self._each(self._sent.send, sorted(changed, key=lambda one: (rank(one), one)))
        self._each(self._sent.join, self._to_join())
        self._remember()

    def _to_join(self) -> list[str]:
        return [name for name in self._sent.in_parts() if self._is_done(name)]

    def _each(self, work: Callable[[str], None], names: list[str]) -> None:
        for name in names:
            if self._why is not None:
                return
            self._writer.confirm(BEAT_S)  # a machine that slept wakes in the middle of this
            with suppress(FileNotFoundError):  # removed since
                work(name)

    def _is_done(self, name: str) -> bool:
        """Whether a file is of a step that has committed, to which nothing is added."""
        parts = PurePosixPath(name).parts
        return parts[0] == "steps" and (self.folder / parts[0] / parts[1] / "record.json").is_file()

    def _files(self) -> list[str]:
        """Names of the files that belong into the bucket. The steps come last: what a stage's record in the list speaks of
        is in the list too."""

        def committed(name: str) -> bool:
            step = step_of_artifact(name)
            return step is None or (self.folder / step / "record.json").is_file()

        names = (str(path.relative_to(self.folder)) for path in _files_below(self.folder))
        return [name for name in names if belongs(name) and committed(name)]

    def _remember(self) -> None:
        # What was there when this driver came is in the copy too, and counts until this driver changes something.
        tokens = [self._writer.token, self._writer.newest]
        write_atomic(self._note, json.dumps({"tokens": [one for one in tokens if one], "sent": self._sent.as_json()}))

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


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort(key=lambda name: name == "steps")
        yield from (Path(root, name) for name in names)
