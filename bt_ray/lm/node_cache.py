"""Each node's own copies of models and adapters: what lies on a network file system is read once, and checked by its hash.

    <cache>/<content hash>/           one folder of weights, whole or absent
    <cache>/<content hash>.used       touched at each use; locked (shared) by the processes that use the copy

BT_RAY_NODE_CACHE names the folder, on a disk of the node's own; it is a setting of the node, as each type of node has other
disks. Without it, folders on a network file system are copied below the system's temporary folder, others are used in place.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bt_ray.errors import CommitError, StorageError
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import adapter_id, content_hash, refuse_pickles, verify
from bt_ray.runs.files import storage

log = logging.getLogger(__name__)

SETTING = "BT_RAY_NODE_CACHE"
COPIED = (".safetensors", ".json", ".jinja", ".txt", ".model")
# Types of file systems whose files are another machine's. Of FUSE, all but those named below it.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "9p", "afs", "wekafs", "virtiofs")
FUSE, LOCAL_FUSE = "fuse.", ("fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.lxcfs")
MOUNTS = Path("/proc/self/mounts")
SPARE_BYTES = 2 * 10**9  # left free on the cache's disk
KEPT = 16  # copies that one process holds against removal: the last that it used

_in_use: OrderedDict[Path, IO[str]] = OrderedDict()


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


def _nearest(folder: str, expected: str) -> str:
    """`folder`, or this node's copy of it; the first time it is copied. Without a hash to check it is used in place."""
    cache = place(Path(folder), os.environ.get(SETTING), MOUNTS.read_text() if MOUNTS.is_file() else "")
    if cache is None or not expected:
        return folder
    return str(_copy_of(Path(folder), cache, expected))


def place(folder: Path, setting: str | None, mounts: str) -> Path | None:
    """Folder for this node's copy of `folder`, or None where that is used in place. Pure, but for links in `folder`.

    `mounts`: the text of /proc/self/mounts.
    """
    if setting:
        return Path(setting).expanduser()
    if not is_remote(folder.resolve(), mounts):
        return None
    own = Path(tempfile.gettempdir()) / f"bt_ray-{os.getuid()}" / "weights"
    return None if is_remote(own, mounts) else own


def is_remote(path: Path, mounts: str) -> bool:
    """Whether the file system that holds `path` is a network's. Pure."""
    found, kind = -1, ""
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = Path(words[1].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= found:  # of two at one point the later hides the earlier
            found, kind = len(point.parts), words[2]
    return kind in NETWORK or (kind.startswith(FUSE) and kind not in LOCAL_FUSE)


def _copy_of(folder: Path, cache: Path, expected: str) -> Path:
    """The copy of `folder` in `cache`, made if it is not there. Other processes of this node wait meanwhile."""
    final = cache / expected
    with storage(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / ".lock"):
            _use(cache / f"{expected}.used")
            if not final.is_dir():
                files = [path for path in sorted(folder.iterdir()) if path.suffix in COPIED and path.is_file()]
                make_room(cache, sum(path.stat().st_size for path in files))
                _publish(files, folder, final)
    return final


def _publish(files: list[Path], folder: Path, final: Path) -> None:
    draft = final.with_name(f".{final.name}.draft")  # the lock is ours: what is there is of a dead process
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        for path in files:
            shutil.copyfile(path, draft / path.name)
        verify(draft, final.name)
    except CommitError as error:
        raise CommitError(f"weights: this node's copy of {folder} is not what was committed. {error}") from None
    else:
        draft.rename(final)
        log.info("weights: copied %s to %s, hash checked", folder, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
            shutil.rmtree(cache / mark.stem, ignore_errors=True)
            mark.unlink()
    free = shutil.disk_usage(cache).free
    if free < needed_bytes + SPARE_BYTES:
        raise StorageError(
            f"{cache} has {free / 1e9:.1f} GB free, a copy of the weights needs {(needed_bytes + SPARE_BYTES) / 1e9:.1f} GB. "
            f"Free some space, or set {SETTING} on this node to a folder of a larger disk."
        )


def _use(mark: Path) -> None:
    """Hold the copy that `mark` belongs to against removal."""
    if mark not in _in_use:
        file = mark.open("a")
        fcntl.flock(file, fcntl.LOCK_SH)
        _in_use[mark] = file
    _in_use.move_to_end(mark)
    os.utime(mark)
    while len(_in_use) > KEPT:
        _in_use.popitem(last=False)[1].close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
