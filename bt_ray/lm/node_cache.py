"""Each node's own copies of models and adapters: what lies on a network file system is copied once, and checked by its hash.

    <cache>/<content hash>-<hash of the small files>/    one folder of weights, whole or absent
    <cache>/<the same>.used                              touched at each use; locked (shared) by the processes that use the copy

BT_RAY_NODE_CACHE names the folder, on a disk of the node's own; it is a setting of the node, as each type of node has other
disks. Without it, folders on a network file system are copied below the system's temporary folder where that is a disk with
room, and others are used in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bt_ray.errors import CommitError, StorageError
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import adapter_id, content_hash, refuse_pickles, verify

log = logging.getLogger(__name__)

SETTING = "BT_RAY_NODE_CACHE"
COPIED = (".safetensors", ".json", ".jinja", ".txt", ".model")
# Types of file systems whose files are another machine's. Of FUSE, all but those named below it.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "9p", "afs", "wekafs", "virtiofs")
FUSE, LOCAL_FUSE = "fuse.", ("fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.lxcfs")
IN_MEMORY = ("tmpfs", "ramfs")
MOUNTS = Path("/proc/self/mounts")
SPARE_BYTES = 2 * 10**9  # left free on the cache's disk

_in_use: dict[Path, IO[str]] = {}  # marks that this process has locked


@dataclass(frozen=True)
class Place:
    """Where copies go. `asked_for`: the node's setting names it, so that what cannot be copied there is an error."""

    folder: Path
    asked_for: bool


def model_folder(weights: Weights) -> str:
    """Where this node reads whole weights from: `weights.model_dir`, or its copy. CommitError, StorageError."""
    own = weights.id if weights.kind in ("base", "full") else weights.model_hash
    return _nearest(weights.model_dir, own)


def base_folder(weights: Weights) -> str:
    """As `model_folder`, of the base that an adapter belongs to."""
    own = {"base": weights.id, "lora": weights.embedding_id}.get(weights.kind, "")
    return _nearest(weights.base_dir, own)


def adapter_folder(weights: Weights) -> str:
    """As `model_folder`, of an adapter. Raises CommitError where its files are not those that the weights' id names."""
    folder = Path(weights.adapter_dir or "")
    refuse_pickles(folder)
    found = content_hash(folder)
    if adapter_id(weights.embedding_id, found) != weights.id:
        raise CommitError(
            f"weights: the adapter in {folder} is not the one with the id {weights.id}: its files changed after they were "
            "committed. Delete the step's folder to have it made again."
        )
    return _nearest(str(folder), found)


def keep_only(folders: Collection[str]) -> None:
    """Let go of all copies but these, which this process still reads: the others may be removed where room is needed."""
    for mark in [mark for mark in _in_use if str(mark.with_suffix("")) not in folders]:
        _in_use.pop(mark).close()


def _nearest(folder: str, expected: str) -> str:
    """`folder`, or this node's copy of it; the first time it is copied. Without a hash to check it is used in place."""
    where = place(Path(folder), os.environ.get(SETTING), MOUNTS.read_text() if MOUNTS.is_file() else "")
    if where is None or not expected:
        return folder
    try:
        return str(_copy_of(Path(folder), where.folder, expected))
    except OSError as error:
        problem = f"weights: {folder} cannot be copied to {where.folder} ({error})"
    except StorageError as error:
        problem = str(error)
    if where.asked_for:
        raise StorageError(f"{problem}. Set {SETTING} on this node to a folder of a disk with room.")
    log.warning("%s; it is read where it lies", problem)
    return folder


def place(folder: Path, setting: str | None, mounts: str) -> Place | None:
    """Where this node's copy of `folder` goes, or None where that is used in place. Pure, but for links in `folder`.

    `mounts`: the text of /proc/self/mounts.
    """
    if setting:
        return Place(Path(setting).expanduser(), asked_for=True)
    if not is_remote(file_system(folder.resolve(), mounts)):
        return None
    own = Path(tempfile.gettempdir()) / f"bt_ray-{os.getuid()}" / "weights"
    kind = file_system(own, mounts)
    return None if is_remote(kind) or kind in IN_MEMORY else Place(own, asked_for=False)


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system that holds `path`. Pure."""
    found, kind = -1, ""
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = Path(words[1].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= found:  # of two at one point the later hides the earlier
            found, kind = len(point.parts), words[2]
    return kind


def is_remote(kind: str) -> bool:
    """Whether a file system of this type is a network's. Pure."""
    return kind in NETWORK or (kind.startswith(FUSE) and kind not in LOCAL_FUSE)


def _copy_of(folder: Path, cache: Path, expected: str) -> Path:
    """The copy of `folder` in `cache`, made if it is not there. Other processes of this node wait meanwhile."""
    files = _files(folder)
    final = cache / f"{expected}-{_small_files(files)}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise StorageError(f"weights: {cache} is another user's: what lies there is not trusted")
    with _locked(cache / ".lock"):
        for left in cache.glob(".*.draft"):  # the lock is ours: what is there is of dead processes
            shutil.rmtree(left, ignore_errors=True)
        _use(final)
        if not final.is_dir() or _sizes(_files(final)) != _sizes(files):
            _remove(final)
            make_room(cache, sum(path.stat().st_size for path in files))
            _publish(files, folder, final, expected)
    return final


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in COPIED and path.is_file()]


def _sizes(files: Collection[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files}


def _small_files(files: Collection[Path]) -> str:
    """8 hex digits over tokenizer, chat template and configs: the content hash leaves most of them out."""
    digest = hashlib.sha256()
    for path in files:
        if path.suffix != ".safetensors":
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _publish(files: Collection[Path], folder: Path, final: Path, expected: str) -> None:
    draft = final.with_name(f".{final.name}.draft")
    draft.mkdir()
    try:
        for path in files:
            shutil.copyfile(path, draft / path.name)
        verify(draft, expected)
        draft.rename(final)
    except CommitError as error:
        raise CommitError(f"weights: this node's copy of {folder} is not what was committed. {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("weights: copied %s to %s, hash checked", folder, final)


def make_room(cache: Path, needed_bytes: int) -> None:
    """Remove the copies that were not used for longest, and that no process uses, until there is room. StorageError."""
    for mark in sorted(cache.glob("*.used"), key=lambda path: path.stat().st_mtime):
        if shutil.disk_usage(cache).free >= needed_bytes + SPARE_BYTES:
            return
        with mark.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # a process uses it
            _remove(cache / mark.stem)
            mark.unlink()
    free = shutil.disk_usage(cache).free
    if free < needed_bytes + SPARE_BYTES:
        raise StorageError(
            f"weights: {cache} has {free / 1e9:.1f} GB free, and a copy needs {(needed_bytes + SPARE_BYTES) / 1e9:.1f} GB"
        )


def _remove(copy: Path) -> None:
    """At once for whoever looks for it: half a copy must not be taken for one."""
    if copy.is_dir():
        draft = copy.with_name(f".{copy.name}.draft")
        copy.rename(draft)
        shutil.rmtree(draft, ignore_errors=True)


def _use(copy: Path) -> None:
    """Hold a copy against removal by others."""
    mark = copy.with_name(f"{copy.name}.used")
    if mark not in _in_use:
        file = mark.open("a")
        fcntl.flock(file, fcntl.LOCK_SH)
        _in_use[mark] = file
    os.utime(mark)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
