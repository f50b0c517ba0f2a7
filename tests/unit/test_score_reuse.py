"""A candidate and example that an earlier search of the run has scored is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bt_ray.lm.types import Weights
from bt_ray.rollout.candidates import candidate_id
from bt_ray.rollout.evaluator import RowEvaluator
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.stages.searching import GREEDY, earlier_rows

CANDIDATE: dict[str, Any] = {"predictors": {"a": {"instructions": "Say.", "demos": []}}}
BASE = Weights("w", "base", "/m", "/m")


def row(example: str, score: float, error: dict[str, str] | None = None) -> dict[str, Any]:
    return {"example_id": example, "sample": 0, "score": score, "error": error, "accept": True, "calls": []}


def earlier(tmp_path: Path, *rows: dict[str, Any]) -> str:
    folder = tmp_path / "earlier"
    segment = SegmentWriter(str(folder / candidate_id(CANDIDATE) / "one.jsonl"))
    for each in rows:
        segment.write(each)
    segment.close()
    return str(folder)


def evaluator(tmp_path: Path, *known: str) -> RowEvaluator:
    """Without workers: whatever would be run fails the test."""
    return RowEvaluator((), {}, BASE, 8, str(tmp_path / "own"), known)


def test_known_rows_are_copied_once_with_their_mark(tmp_path: Path) -> None:
    lent = evaluator(tmp_path, earlier(tmp_path, row("x", 1.0), row("y", 0.0), row("z", 1.0)))
    assert lent.evaluate(CANDIDATE, ["x", "y"]) == {"x": 1.0, "y": 0.0}
    assert lent.evaluate(CANDIDATE, ["y", "x"]) == {"x": 1.0, "y": 0.0}
    own = [line for path in (tmp_path / "own").rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert [json.loads(line)["reused"] for line in own] == [True, True]  # z was not asked for
    assert {each["example_id"] for each in lent.all_rows()} == {"x", "y"}


def test_an_error_is_run_again(tmp_path: Path) -> None:
    lent = evaluator(tmp_path, earlier(tmp_path, row("x", 0.0, {"kind": "timeout", "message": "slow"}), row("y", 1.0)))
    assert set(lent._reuse(CANDIDATE, ["x", "y"])) == {"y"}
    assert {key[0] for key in read_rows(tmp_path / "own" / candidate_id(CANDIDATE))} == {"y"}


def test_only_committed_searches_over_the_same_things_lend_their_rows(tmp_path: Path) -> None:
    def step(name: str, commit: bool = True, **changes: Any) -> Step:
        made = Step(tmp_path, StepKey("search", {**dict.fromkeys(GREEDY, "same"), "place": name, **changes}))
        made.begin()
        if commit:
            made.commit("p", {}, Cost())
        return made

    first = step("first")
    for number, name in enumerate(GREEDY):
        step(f"other {number}", **{name: "another"})
    step("running", commit=False)
    assert earlier_rows(step("second", commit=False)) == (str(first.rows),)
