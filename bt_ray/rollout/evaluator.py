"""Scores of candidates for a search: rows through the program workers, committed as they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_ray.lm.types import Weights
from bt_ray.rollout.pipeline import run_direct
from bt_ray.rollout.rows import REUSED, SUFFIX, SegmentWriter, read_rows
from bt_ray.rollout.tasks import RolloutRow, RolloutTask, candidate_id


def row_score(row: RolloutRow) -> float | None:
    """Score of a row: a program that failed scores 0, a metric that failed gives none, nor does a process that died."""
    if row["error"]:
        return None if row["error"]["kind"] in ("metric", "crash") else 0.0
    return None if row["score"] is None else float(row["score"])


@dataclass(frozen=True)
class RowEvaluator:
    """Greedy scores of candidates, one folder of rows per candidate. Picklable; blocks.

    A row that a folder holds is read, not run: that is how a search goes on after a crash, and how
    a candidate that was seen before costs nothing. `known`: such folders of earlier searches with the
    same weights; a row that is found there is copied, marked as `reused`.
    """

    workers: tuple[Any, ...]
    examples: dict[str, dict[str, Any]] = field(repr=False)
    weights: Weights
    max_tokens: int
    rows_dir: str
    known: tuple[str, ...] = ()
    by_predictor: bool = False  # as of RolloutTask
    timeout_s: float = field(kw_only=True)  # as of RolloutPlan

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        """Scores by example id; ids without a score (see `row_score`) are left out. PoolError, CanaryError."""
        scores = {row["example_id"]: row_score(row) for row in self.run(candidate, example_ids)}
        return {name: score for name, score in scores.items() if score is not None}

    def run(self, candidate: dict[str, Any], example_ids: Sequence[str]) -> list[RolloutRow]:
        """Greedy rows in the order of the ids. PoolError, CanaryError."""
        folder = self._folder(candidate)
        rows = {key[0]: row for key, row in read_rows(folder).items()}
        missing = [name for name in dict.fromkeys(example_ids) if name not in rows]
        if missing and self.known:
            rows |= self._reuse(candidate, missing)
            missing = [name for name in missing if name not in rows]
        if missing:
            draw = (self.weights, 0.0, self.max_tokens, 0)
            tasks = [RolloutTask(self.examples[name], 0, candidate, *draw, by_predictor=self.by_predictor) for name in missing]
            rows |= {key[0]: row for key, row in run_direct(tasks, self.workers, folder, self.timeout_s).items()}
        return [rows[name] for name in example_ids]

    def lacking(self, candidate: dict[str, Any], example_ids: Sequence[str]) -> set[str]:
        """Examples of these that `run` would run the program on."""
        return {*example_ids} - self.rows_of(candidate).keys() - self._lent(candidate, example_ids).keys()

    def _lent(self, candidate: dict[str, Any], example_ids: Sequence[str]) -> dict[str, RolloutRow]:
        """What earlier searches have of these rows. An error is no answer to rely on: that row is run again."""
        found: dict[str, RolloutRow] = {}
        for folder in self.known:
            earlier = read_rows(Path(folder) / candidate_id(candidate))
            for row in earlier.values():
                if row["example_id"] in example_ids and not row["error"]:
                    found.setdefault(row["example_id"], {**row, REUSED: True})
        return found

    def _reuse(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, RolloutRow]:
        """Copy what is lent of these rows."""
        found = self._lent(candidate, example_ids)
        if found:
            segment = SegmentWriter(str(Path(self._folder(candidate)) / f"{REUSED}{SUFFIX}"))
            for row in found.values():
                segment.write(row)
            segment.close()
        return found

    def rows_of(self, candidate: dict[str, Any]) -> dict[str, RolloutRow]:
        """Committed rows of one candidate by example id."""
        return {key[0]: row for key, row in read_rows(self._folder(candidate)).items()}

    def all_rows(self) -> list[RolloutRow]:
        """Committed rows of all candidates."""
        folders = sorted(path for path in Path(self.rows_dir).glob("*") if path.is_dir())
        return [row for folder in folders for row in read_rows(str(folder)).values()]

    def _folder(self, candidate: dict[str, Any]) -> str:
        return str(Path(self.rows_dir) / candidate_id(candidate))
