"""Reading source folders and writing task folders. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = ("train", "val", "test")


def cut_command(
    task_dir: Path, build: Callable[[str], Mapping[str, Sequence[Row]]], source: str | None, argv: list[str] | None
) -> None:
    """The command line of a task's data: `build(SOURCE)`, written into OUT with the task's config.

    `source` says what the folder SOURCE holds; None: the task needs none, and `build` is given "".
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bt_ray.tasks.{task_dir.name}.data", description="Make the data of the task."
    )
    if source:
        parser.add_argument("source", help=source)
    parser.add_argument("out", help="folder to write train, val, test and config.yaml into")
    args = parser.parse_args(argv)
    splits = build(args.source if source else "")
    write_task(args.out, splits, task_dir)
    print(f"{args.out}: " + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()))


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[Row]:
    """The rows of a JSON-lines file, each cut to `fields`.

    Raises FileNotFoundError if there is no such file, and ValueError with the line number if a
    line is no JSON object or lacks a field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; the source folder must hold it")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no valid JSON ({error.msg})") from None
            missing = [name for name in fields if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{path}, line {number}: the field {missing[0]!r} is missing")
            rows.append({name: row[name] for name in fields})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def write_task(out: str | Path, splits: Mapping[str, Sequence[Row]], task_dir: str | Path) -> None:
    """Write train, val and test into `out`, and the task's config.yaml beside them.

    The config names its data by relative paths, so the copy in `out` can be run as it is. A
    config.yaml that is already there is kept: it may have been edited.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        write_jsonl(out / f"{name}.jsonl", splits[name])
    config = out / "config.yaml"
    if not config.exists():
        shutil.copyfile(Path(task_dir) / "config.yaml", config)
