"""Scores of candidates for a search: rows through the program workers, committed as they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray.lm.types import Weights
from bt_ray.rollout.pipeline import run_direct
from bt_ray.rollout.rows import read_rows
from bt_ray.rollout.tasks import RolloutRow, RolloutTask, candidate_id


def row_score(row: RolloutRow) -> float | None:
    """Score of a row: a program that failed scores 0, a metric that failed gives none."""
    if row["error"]:
        return None if row["error"]["kind"] == "metric" else 0.0
    return None if row["score"] is None else float(row["score"])


@dataclass(frozen=True)
class RowEvaluator:
    """Greedy scores of candidates, one folder of rows per candidate. Picklable; blocks.

    A row that a folder holds is read, not run: that is how a search goes on after a crash, and how
    a candidate that was seen before costs nothing.
    """

    workers: tuple[Any, ...]
    examples: dict[str, dict[str, Any]] = field(repr=False)
    weights: Weights
    max_tokens: int
    rows_dir: str

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        """Scores by example id; ids whose metric failed are left out. PoolError, CanaryError."""
        scores = {row["example_id"]: row_score(row) for row in self.run(candidate, example_ids)}
        return {name: score for name, score in scores.items() if score is not None}

    def run(self, candidate: dict[str, Any], example_ids: Sequence[str]) -> list[RolloutRow]:
        """Greedy rows in the order of the ids. PoolError, CanaryError."""
        folder = self._folder(candidate)
        rows = {key[0]: row for key, row in read_rows(folder).items()}
        missing = [name for name in dict.fromkeys(example_ids) if name not in rows]
        if missing:
            tasks = [RolloutTask(self.examples[name], 0, candidate, self.weights, 0.0, self.max_tokens, 0) for name in missing]
            rows |= {key[0]: row for key, row in run_direct(tasks, self.workers, folder).items()}
        return [rows[name] for name in example_ids]

    def rows_of(self, candidate: dict[str, Any]) -> dict[str, RolloutRow]:
        """Committed rows of one candidate by example id."""
        return {key[0]: row for key, row in read_rows(self._folder(candidate)).items()}

    def all_rows(self) -> list[RolloutRow]:
        """Committed rows of all candidates."""
        folders = sorted(path for path in Path(self.rows_dir).glob("*") if path.is_dir())
        return [row for folder in folders for row in read_rows(str(folder)).values()]

    def _folder(self, candidate: dict[str, Any]) -> str:
        return str(Path(self.rows_dir) / candidate_id(candidate))
