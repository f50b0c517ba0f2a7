"""What of a run lies in a bucket, under which names, and how it comes back from there.

Files that grow line by line lie in the bucket as parts: `rows/x.jsonl/000000000000`, named by the byte that they begin with.
Not kept there: scratch/, and artifacts of a step that has not committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from bt_ray.errors import StorageError
from bt_ray.runs.bucket import Bucket
from bt_ray.runs.inside import inside
from bt_ray.runs.lock import LOCK, STOP

# Of a run. What else lies there stays there: the lock of a machine, a pickle that somebody put into scratch/, another run below.
PARTS = ("run.json", "plan.json", "pick.json", "config.yaml", "test_looks.jsonl", "examples", "steps", "stages")
GROWS = ".jsonl"
PART_DIGITS = 12
REQUESTS = 16  # at a time: most objects are small


def rank(name: str) -> int:
    """When a file goes up: what others speak of before those that speak of it. Pure."""
    parts = PurePosixPath(name).parts
    if parts[-1] == "record.json":
        return 2 if parts[0] == "steps" else 3
    if name in ("run.json", "pick.json"):
        return 4
    return 0 if parts[0] in ("examples", "steps") else 1


def belongs(name: str) -> bool:
    """Whether a file is a part of a run that all machines share. Pure."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] not in PARTS:
        return False
    return step_of_artifact(name) is not None or not (
        parts[-1] in (LOCK, STOP) or any(part.startswith(".") for part in parts)  # of a step that a stage is at; drafts
    )


def step_of_artifact(name: str) -> str | None:
    """The step's folder where a file is an artifact of one of its attempts. Pure."""
    parts = PurePosixPath(name).parts
    is_artifact = len(parts) > 3 and parts[0] == "steps" and parts[2].startswith("files-")
    return "/".join(parts[:2]) if is_artifact else None


def grows(name: str) -> bool:
    """Whether a file is appended to, line by line. Pure."""
    return name.endswith(GROWS) and not name.startswith("examples/") and step_of_artifact(name) is None


def part_name(name: str, start: int) -> str:
    """Name of the part of a growing file that begins at byte `start`. Pure."""
    return f"{name}/{start:0{PART_DIGITS}d}"


def file_of(name: str) -> str:
    """Name of the file that an object holds, or holds a part of. Pure."""
    parent, _, last = name.rpartition("/")
    return parent if grows(parent) and last.isdecimal() else name


def remove(bucket: Bucket, name: str) -> None:
    """Remove a file's object, or all parts of one that grows."""
    delete(bucket, parts_of(bucket, name) if grows(name) else [name])


def delete(bucket: Bucket, names: Iterable[str]) -> None:
    """Remove objects, many at a time; return once all are gone."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(bucket.delete, names))


def parts_of(bucket: Bucket, name: str) -> list[str]:
    """Names of the parts of a growing file, in their order."""
    return sorted(one for one in bucket.names(f"{name}/") if file_of(one) == name)


def fetch(bucket: Bucket, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy a run's objects into an empty folder; what grows is put together from its parts.

    An object that is removed meanwhile is passed over. Raises RunDirError for a name that leads out of the folder,
    StorageError where a part is missing.
    """
    whole: list[tuple[str, Path]] = []
    parts: dict[str, list[str]] = {}
    for name in bucket.names():
        file = file_of(name)
        if not name or name.endswith("/") or not wanted(name):  # consoles mark a folder by an empty object
            continue
        path = inside(folder, file)
        if not belongs(file):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if file == name:
            whole.append((name, path))
        else:
            parts.setdefault(file, []).append(name)
    try:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda one: bucket.download(*one), whole))
            list(pool.map(lambda one: _put_together(bucket, one, sorted(parts[one]), folder / one), parts))
    except OSError as error:
        raise StorageError(
            f"{folder}: what {bucket.place.url} holds cannot be written there: {error}. Free some space."
        ) from error


def _put_together(bucket: Bucket, name: str, parts: list[str], path: Path) -> None:
    draft = path.with_name(f".{path.name}")  # a file that is only begun must not pass for the whole
    while True:
        try:
            with draft.open("wb") as file:
                for data in _in_order(bucket, name, parts):
                    file.write(data)
            break
        except StorageError:
            again = parts_of(bucket, name)  # its writer makes many parts one, in which the first has all
            if again == parts:
                raise
            parts = again
    draft.replace(path)


def _in_order(bucket: Bucket, name: str, parts: list[str]) -> Iterator[bytes]:
    end = 0
    for part in parts:
        found, start = bucket.get(part), int(part.rpartition("/")[2])
        if found is None or start > end:
            raise StorageError(
                f"{bucket.place.url}/{name} lacks the bytes from {end} on. Delete {name}/ there to have its rows made again."
            )
        yield found.data[end - start :]  # a part that was sent twice may have grown in between
        end = max(end, start + len(found.data))
