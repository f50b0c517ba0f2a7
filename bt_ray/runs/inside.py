"""Paths that a record names: they stay inside the folder that the record speaks of.

A run directory may come from another machine, or from another person. What it names is read, hashed, copied and shown, so
a name that leads elsewhere must not be followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bt_ray.errors import RunDirError

MAX_NAME_BYTES = 255  # of one part of a path, on every usual file system


def inside(root: Path, name: Any) -> Path:
    """`root / name`. Raises RunDirError where the name is absolute, has `..`, or leads out of `root` by a symbolic link."""
    why = None
    if not isinstance(name, str) or not name or "\0" in name or not _can_be_a_name(name):
        why = "it is no relative path"
    elif Path(name).is_absolute():
        why = "it is absolute, and a record's paths start at the record's folder"
    elif ".." in Path(name).parts:
        why = "it has `..`"
    elif not _resolved(root / name).is_relative_to(_resolved(root)):
        why = "a symbolic link leads out of there"
    if why:
        raise RunDirError(
            f"{root}: the path {str(name)[:200]!r} is not followed: {why}. Take the run directory from who made it anew."
        )
    return root / name


def _can_be_a_name(name: str) -> bool:
    try:
        return all(len(part) <= MAX_NAME_BYTES for part in name.encode().split(b"/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle, a name that is too long: nothing of ours
        return Path("/")
