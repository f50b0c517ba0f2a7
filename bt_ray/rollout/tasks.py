"""Plain values of a rollout step, and the file of its tasks. Imports neither ray nor dspy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.lm.types import Weights

Key = tuple[str, int]  # (example_id, sample)
RolloutRow = dict[str, Any]


def candidate_id(candidate: dict[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the candidate's canonical JSON; labels do not count."""
    form: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    text = json.dumps({"predictors": candidate["predictors"]}, **form)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RolloutTask:
    """One run of the program on one example."""

    example: dict[str, Any]  # {"id", "inputs", "labels"}
    sample: int
    candidate: dict[str, Any]
    weights: Weights
    temperature: float
    max_tokens: int
    seed: int  # example id and sample are mixed in, so one seed serves a whole step
    by_predictor: bool = False  # a metric that takes pred_name is asked about each predictor too, for `calls`

    @property
    def key(self) -> Key:
        return str(self.example["id"]), self.sample


@dataclass(frozen=True)
class RolloutBatch:
    """Tasks for one worker, and the file that it appends their rows to."""

    tasks: tuple[RolloutTask, ...]
    segment: str  # path of a jsonl file that only this worker writes
    done: frozenset[Key] = frozenset()  # tasks that are not run again
    alone: bool = False  # the worker runs nothing beside it


@dataclass(frozen=True)
class RolloutPlan:
    """One rollout step: the tasks of a file under one candidate and one set of weights."""

    tasks_path: str  # parquet of write_tasks
    segment_dir: str  # folder of the rows, a jsonl file per worker
    candidate: dict[str, Any]
    weights: Weights
    temperature: float
    max_tokens: int
    seed: int
    chunk_size: int = 16  # tasks of one request to a worker

    def task(self, example: dict[str, Any], sample: int) -> RolloutTask:
        """The task of one line of the tasks file."""
        return RolloutTask(example, sample, self.candidate, self.weights, self.temperature, self.max_tokens, self.seed)

    def read_tasks(self) -> list[RolloutTask]:
        """All tasks of the file, in its order."""
        return [self.task(example, sample) for example, sample in read_tasks(self.tasks_path)]


def write_tasks(path: str, examples: Sequence[dict[str, Any]], samples: int) -> None:
    """Write every example `samples` times: columns example_id, sample, example (JSON text)."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"example_id": str(example["id"]), "sample": sample, "example": json.dumps(example, ensure_ascii=False)}
        for example in examples
        for sample in range(samples)
    ]
    seen = {(row["example_id"], row["sample"]) for row in rows}
    if len(seen) != len(rows):
        raise ConfigError(f"{path}: two examples share an id; make the ids of the data unique.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([("example_id", "string"), ("sample", "int64"), ("example", "string")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def read_tasks(path: str) -> list[tuple[dict[str, Any], int]]:
    """(example, sample) of each line of a file of write_tasks."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return [(json.loads(row["example"]), int(row["sample"])) for row in table.to_pylist()]


def chunks(tasks: Iterable[RolloutTask], size: int) -> list[tuple[RolloutTask, ...]]:
    """Cut tasks into runs of `size`."""
    items = list(tasks)
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]
