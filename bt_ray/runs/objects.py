"""What of a run lies in a bucket, under which names, and how it comes back from there.

Files that grow line by line lie in the bucket as parts: `rows/x.jsonl/000000000000`, named by the byte that they begin with.
Not kept there: scratch/, and artifacts of a step that has not committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from bt_ray.errors import StorageError
from bt_ray.runs.bucket import Bucket
from bt_ray.runs.inside import inside
from bt_ray.runs.lock import LOCK, STOP
from bt_ray.runs.writer import WRITER

OWN = (LOCK, STOP, WRITER)  # of one machine, or of the bucket: never copied
PARTS = ("run.json", "plan.json", "pick.json", "config.yaml", "test_looks.jsonl", "examples", "steps", "stages")  # of a run
GROWS = ".jsonl"
PART_DIGITS = 12
DOWNLOADS = 16  # at a time: most objects are small


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
    if parts[0] not in PARTS or name in OWN or any(part.startswith(".") for part in parts):
        return False
    if parts[-1] in (LOCK, STOP):  # of a step that a stage is at
        return False
    if parts[0] == "steps" and len(parts) > 2 and parts[2].startswith("files-"):
        return committed("/".join(parts[:2]))
    return True


def grows(name: str) -> bool:
    """Whether a file is appended to, line by line. Pure."""
    parts = PurePosixPath(name).parts or ("",)
    in_files = parts[0] == "steps" and len(parts) > 2 and parts[2].startswith("files-")
    return name.endswith(GROWS) and parts[0] != "examples" and not in_files


def part_name(name: str, start: int) -> str:
    """Name of the part of a growing file that begins at byte `start`. Pure."""
    return f"{name}/{start:0{PART_DIGITS}d}"


def file_of(name: str) -> str:
    """Name of the file that an object holds, or holds a part of. Pure."""
    parent, _, last = name.rpartition("/")
    return parent if grows(parent) and last.isdecimal() else name


def remove(bucket: Bucket, name: str) -> None:
    """Remove a file's object, or all parts of one that grows."""
    names = [one for one in bucket.sizes() if one.startswith(f"{name}/")] if grows(name) else [name]
    for one in names:
        bucket.delete(one)


def fetch(bucket: Bucket, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy a run's objects into an empty folder; what grows is put together from its parts.

    An object that is removed meanwhile is passed over. Raises RunDirError for a name that leads out of the folder,
    StorageError where a part is missing.
    """
    # What is no part of a run stays there: a pickle that somebody put into scratch/ would be believed, and another run may lie below.
    whole: list[tuple[str, Path]] = []
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in bucket.sizes():
        if not name or name.endswith("/") or name in OWN or not wanted(name):  # consoles mark a folder by an empty object
            continue
        inside(folder, name)
        if not is_kept(file_of(name), lambda step: True):
            continue
        if (parent := file_of(name)) != name:
            parts.setdefault(parent, []).append((int(name.rpartition("/")[2]), name))
        else:
            whole.append((name, _made(folder, name)))
    try:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(lambda one: bucket.download(*one), whole))
            list(pool.map(lambda one: _join(bucket, one, sorted(parts[one]), _made(folder, one)), parts))
    except OSError as error:
        raise StorageError(f"{folder}: what {bucket.place.url} holds cannot be written there: {error}. Free some space.") from error


def _made(folder: Path, name: str) -> Path:
    path = inside(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _join(bucket: Bucket, name: str, found: list[tuple[int, str]], path: Path) -> None:
    draft = path.with_name(f".{path.name}")  # a file that is only begun must not pass for the whole
    with draft.open("wb") as file:
        for data in _in_order(bucket, name, found):
            file.write(data)
    draft.replace(path)


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
