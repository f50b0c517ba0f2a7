"""Plain values of a rollout step, and the file of its tasks. Imports neither ray nor dspy."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray.lm.types import Weights

Key = tuple[str, int]  # (example_id, sample)
BATCHES_PER_WORKER = 2  # one runs, one waits, so that a worker never idles
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
    alone: bool = False  # the worker runs nothing beside it, and leaves a mark while it does

    @property
    def mark(self) -> Path:
        """File that is there while the first task runs alone: it tells a worker that died of it from one that died before."""
        key = hashlib.sha256(json.dumps(self.tasks[0].key).encode()).hexdigest()[:16]
        return Path(self.segment).parent / f".alone-{key}"


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
    timeout_s: float = field(kw_only=True)  # of the workers' ProgramSpec: one that is silent for much longer is ended

    @property
    def group_size(self) -> int:
        """Tasks of a group of the file: what keeps one worker busy."""
        return self.chunk_size * BATCHES_PER_WORKER

    def task(self, example: dict[str, Any], sample: int) -> RolloutTask:
        """The task of one line of the tasks file."""
        return RolloutTask(example, sample, self.candidate, self.weights, self.temperature, self.max_tokens, self.seed)

    def num_groups(self) -> int:
        """Groups of tasks in the file."""
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(self.tasks_path).num_row_groups)

    def read_group(self, index: int) -> list[RolloutTask]:
        """The tasks of one group."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.tasks_path) as file:
            rows = file.read_row_group(index).to_pylist()
        return [self.task(json.loads(row["example"]), int(row["sample"])) for row in rows]

    def read_tasks(self) -> list[RolloutTask]:
        """All tasks of the file, in its order."""
        return [task for index in range(self.num_groups()) for task in self.read_group(index)]


def write_tasks(path: str, examples: Iterable[dict[str, Any]], samples: int, group_size: int) -> None:
    """Write every example `samples` times, `group_size` tasks a row group: columns sample, example (JSON text).

    Takes the memory of one group, however many examples come. Their ids are their own: `bt_ray.data` makes them.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("sample", "int64"), ("example", "string")])
    lines = (
        {"sample": sample, "example": json.dumps(example, ensure_ascii=False)}
        for example in examples
        for sample in range(samples)
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        while group := list(itertools.islice(lines, group_size)):
            file.write_table(pyarrow.Table.from_pylist(group, schema=schema), row_group_size=group_size)


def chunks(tasks: Iterable[RolloutTask], size: int) -> list[tuple[RolloutTask, ...]]:
    """Cut tasks into runs of `size`."""
    items = list(tasks)
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]
