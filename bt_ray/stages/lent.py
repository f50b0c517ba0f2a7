"""Rows of one rollout step that another has: the program is run once on an example and sample, prompts and weights.

A prompt step may run on some of the training examples that a weight step runs on. Each has a step of its own, whose hash
follows from its examples, and whichever comes second takes the rows of the first: both then hold the same ones. An error is
taken over as well, as it is where two stages share a whole step. Such steps are made one after the other, also by stages that run side
by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from bt_ray.errors import CommitError
from bt_ray.rollout.rows import REUSED, SUFFIX, SegmentWriter, StoredRows, done_keys, keys_in, rows_in
from bt_ray.rollout.tasks import Key
from bt_ray.runs.commit import Step, first_attempt, read_record
from bt_ray.runs.identity import content_hash

TRAIN = "train"  # name, in an attempt's file, of a hash of training examples that the step's own hash need not cover


def lend_rollouts(step: Step, keys: Iterable[Key], train: str) -> int:
    """Copy into a rollout step that this process holds those of its rows that committed ones have; the mark `reused` names
    the step that each is from.

    `train`: hash of all training examples; only steps over the same lend, as equal ids alone do not make equal examples.
    Returns how many rows of the step are such. Raises CommitError where one of those steps is damaged.
    """
    segment = step.rows / f"{REUSED}{SUFFIX}"
    wanted: list[Key] | None = None
    for folder in _alike(step, train):
        if wanted is None:  # in most runs there is no such step, and nothing is held for each row
            done = done_keys(step.rows)
            wanted = [key for key in keys if key not in done]
        record, there = read_record(folder, verify_files=False), done_keys(folder / "rows")
        found = [key for key in wanted if key in there]
        if record is None or not found:
            continue
        writer = SegmentWriter(str(segment))
        for row in StoredRows(folder / "rows", found, record.sealed):
            writer.write({**row, REUSED: row.get(REUSED) or folder.name})
        writer.close()
        wanted = [key for key in wanted if key not in there]
    return len(keys_in(str(segment)))


def lenders(folder: Path) -> Counter[str]:
    """By the steps that rows of the rollout step in `folder` were taken over from, how many. Empty where none was."""
    return Counter(str(row[REUSED]) for row in rows_in(folder / "rows" / f"{REUSED}{SUFFIX}"))


def sharing(step: Step, scratch: Path) -> Path:
    """The folder that is held while a rollout step is made, the same one for all that could lend each other rows."""
    return scratch / f"sharing-{content_hash({**step.key.inputs, 'examples': None})[:16]}"


def _alike(step: Step, train: str) -> Iterator[Path]:
    """Folders of the run's committed rollout steps that differ from this one only in which training examples they use."""
    for path in sorted(step.folder.parent.glob(f"{step.key.kind}-*/record.json")):
        try:
            begun = first_attempt(path.parent)
        except CommitError:  # damaged: it lends nothing, and whoever needs that step says so
            continue
        same = {**begun["inputs"], "examples": None} == {**step.key.inputs, "examples": None}
        if same and begun.get(TRAIN) == train:
            yield path.parent
