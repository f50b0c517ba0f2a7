"""Steps and their commit: content-addressed folders, published by `record.json`, fenced by attempt.

    steps/<kind>-<hash>/attempt-0001.json   who tried, in order
    steps/<kind>-<hash>/rows/*.jsonl        rows, appended as they end; kept over attempts. Of a search:
                                            rows/<candidate>/*.jsonl, and rows/train/<candidate>/*.jsonl for those
                                            of training examples that its optimiser asked for
    steps/<kind>-<hash>/proposer_calls.jsonl, compile_calls.jsonl
                                            of a search: what LMs answered to its optimiser, kept as rows are
    steps/<kind>-<hash>/files-0001/         artifacts of one attempt
    steps/<kind>-<hash>/record.json         the commit marker, written last

`hash` covers everything that the result follows from, so equal work has one folder, whoever
asks for it, and a step that has a record is never run again.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray.errors import CommitError
from bt_ray.runs.files import publish_once, read_json
from bt_ray.runs.identity import content_hash, file_sha256
from bt_ray.runs.inside import inside


@dataclass(frozen=True)
class Cost:
    """What a step consumed. Adds up."""

    lm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    train_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class StepKey:
    """Identity of a step: its kind and all that its result follows from (plain JSON)."""

    kind: str
    inputs: dict[str, Any] = field(hash=False)

    @property
    def hash(self) -> str:
        return content_hash({"kind": self.kind, "inputs": self.inputs})

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.hash}"


@dataclass(frozen=True)
class Record:
    """A committed step. `result` is what later steps may depend on; `cost` and times are not."""

    name: str
    stage: str
    attempt: int
    result: dict[str, Any]
    cost: Cost
    files: dict[str, str]
    result_hash: str
    sealed: dict[str, list[Any]] = field(default_factory=dict)  # the rows of a rollout or an evaluation: see `StoredRows`


class Step:
    """One step's folder: read its record, or try it and commit."""

    def __init__(self, root: Path, key: StepKey):
        self.key = key
        self.folder = root / "steps" / key.name
        self.rows = self.folder / "rows"
        self.attempt = 0

    @property
    def files(self) -> Path:
        """Folder for the artifacts of this attempt."""
        return self.folder / f"files-{self.attempt:04d}"

    def record(self) -> Record | None:
        """The committed record, or None. Raises CommitError where a committed file is damaged."""
        return read_record(self.folder)

    def begin(self, **beside: Any) -> None:
        """Take the next attempt number; later attempts fence this one off. `beside`: what the attempt's file says, too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows.mkdir(exist_ok=True)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "inputs": self.key.inputs, **beside}
        number = latest_attempt(self.folder) + 1
        while not publish_once(self.folder / f"attempt-{number:04d}.json", json.dumps(owner, indent=1)):
            number += 1
        self.attempt = number
        self.files.mkdir(exist_ok=True)

    def commit(self, stage: str, result: dict[str, Any], cost: Cost, sealed: dict[str, list[Any]] | None = None) -> Record:
        """Publish the record, with the rows that it vouches for. Raises CommitError if a newer attempt exists or one has committed."""
        newest = latest_attempt(self.folder)
        if newest != self.attempt:
            raise CommitError(
                f"step {self.key.name}: attempt {self.attempt} ended after attempt {newest} had begun; its result is dropped. "
                "Nothing is to be done: the newer attempt commits."
            )
        files = {
            str(path.relative_to(self.folder)): file_sha256(path) for path in sorted(self.files.rglob("*")) if path.is_file()
        }
        data = {
            "name": self.key.name, "stage": stage, "attempt": self.attempt, "result": result, "cost": cost.to_json(),
            "files": files, "sealed": sealed or {}, "result_hash": content_hash(result), "time": time.time(),
        }  # fmt: skip
        data["checksum"] = content_hash(data)  # of all of it: a cost that changed would be believed
        if not publish_once(self.folder / "record.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)):
            raise CommitError(f"step {self.key.name}: another attempt committed first; this result is dropped.")
        record = read_record(self.folder, verify_files=False)
        assert record is not None
        return record


def latest_attempt(folder: Path) -> int:
    numbers = [int(path.stem.split("-")[1]) for path in folder.glob("attempt-*.json")]
    return max(numbers, default=0)


def first_attempt(folder: Path) -> dict[str, Any]:
    """What the first attempt at the step in `folder` wrote down as it began: in `inputs` all that the result follows from.
    Raises CommitError."""
    path = folder / "attempt-0001.json"
    attempt = read_json(path) if path.is_file() else None
    if not isinstance(attempt, dict) or not isinstance(attempt.get("inputs"), dict):
        raise CommitError(f"{path} is gone, or damaged: it lacks `inputs`. Delete {folder} to make the step again.")
    return attempt


def read_record(folder: Path, verify_files: bool = True) -> Record | None:
    """The record in `folder`, checked against its hashes; None where there is none."""
    path = inside(folder.parent, f"{folder.name}/record.json")
    if not path.is_file():
        return None
    record = _parsed(read_json(path))
    if record is None:
        raise CommitError(
            f"{path} does not match its own hash: it was changed or damaged, or is of another version of bt_ray. "
            f"Delete {folder} to make the step again."
        )
    for name, expected in record.files.items() if verify_files else ():
        file = inside(folder, name)
        if not file.is_file() or file_sha256(file) != expected:
            raise CommitError(f"{file} is missing or differs from its record. Delete {folder} to make the step again.")
    return record


def _parsed(data: Any) -> Record | None:
    """A record from its JSON value, if that is whole; None for anything else that a damaged file may hold."""
    try:
        cost = Cost(**data["cost"])
        named = {name: data[name] for name in ("name", "stage", "attempt", "result", "files", "sealed", "result_hash")}
        record = Record(**named, cost=cost)
        is_whole = content_hash(record.result) == record.result_hash and _unchanged(data)
    except (KeyError, TypeError, ValueError):  # the last: numbers and text that no record of ours holds
        return None
    words = (record.name, record.stage, record.result_hash)
    tables = all(isinstance(table, dict) for table in (record.result, record.files, record.sealed))
    numbers = isinstance(record.attempt, int) and all(isinstance(value, (int, float)) for value in cost.to_json().values())
    return record if is_whole and tables and numbers and all(isinstance(word, str) for word in words) else None


def _unchanged(data: dict[str, Any]) -> bool:
    """Whether a record's values are those that were written. KeyError for one without a checksum."""
    rest = {name: value for name, value in data.items() if name != "checksum"}
    return bool(data["checksum"] == content_hash(rest))


def spent_cost(root: Path) -> Cost:
    """Cost of all committed steps of a run. Raises CommitError for a damaged record."""
    records = (read_record(path.parent, verify_files=False) for path in (root / "steps").glob("*/record.json"))
    return sum((record.cost for record in records if record), Cost())
