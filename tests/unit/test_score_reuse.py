"""A candidate and example that an earlier search of the run has scored is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.lm.types import Weights
from bt_ray.rollout import evaluator as evaluators
from bt_ray.rollout.candidates import candidate_id
from bt_ray.rollout.evaluator import RowEvaluator
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.stages.searching import GREEDY, TRAIN, earlier_rows, num_scored
from tests.support.budgeted_search import SPLITS, Search, run_rows, search_step

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
    return RowEvaluator((), {}, BASE, 8, str(tmp_path / "own"), known, timeout_s=9.0)


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


def step(root: Path, name: str, train: str | None = "same", commit: bool = True, **changes: Any) -> Step:
    """A search; without `train` one of before that was written down."""
    made = Step(root, StepKey("search", {**dict.fromkeys(GREEDY, "same"), "place": name, **changes}))
    made.begin(**({} if train is None else {TRAIN: train}))
    if commit:
        made.commit("p", {}, Cost())
    return made


def test_only_committed_searches_over_the_same_things_lend_their_rows(tmp_path: Path) -> None:
    first = step(tmp_path, "first")
    for number, name in enumerate(GREEDY):
        step(tmp_path, f"other {number}", **{name: "another"})
    step(tmp_path, "running", commit=False)
    assert earlier_rows(step(tmp_path, "second", commit=False)) == (str(first.rows),)


def test_rows_on_training_examples_are_lent_where_these_are_the_same(tmp_path: Path) -> None:
    first = step(tmp_path, "first")
    others = [step(tmp_path, "other", train="another"), step(tmp_path, "old", train=None)]
    step(tmp_path, "weights", weights="another")
    second = step(tmp_path, "second", commit=False)
    assert earlier_rows(second, "same") == (str(first.rows / "train"),)
    assert set(earlier_rows(second)) == {str(one.rows) for one in (first, *others)}


def test_rows_on_search_and_on_training_examples_are_not_mixed(tmp_path: Path) -> None:
    """One lies below the other, and an example of each may have the same id."""
    first, second = step(tmp_path, "first", commit=False), step(tmp_path, "second", commit=False)
    for folder, score in ((first.rows, 1.0), (first.rows / "train", 0.0)):
        segment = SegmentWriter(str(folder / candidate_id(CANDIDATE) / "one.jsonl"))
        segment.write(row("x", score))
        segment.close()
    first.commit("p", {}, Cost())
    scored = RowEvaluator((), {}, BASE, 8, str(second.rows), earlier_rows(second), timeout_s=9.0)
    trained = RowEvaluator((), {}, BASE, 8, str(second.rows / "train"), earlier_rows(second, "same"), timeout_s=9.0)
    assert trained.evaluate(CANDIDATE, ["x"]) == {"x": 0.0} and scored.evaluate(CANDIDATE, ["x"]) == {"x": 1.0}
    assert [len(one.all_rows()) for one in (scored, trained)] == [1, 1]


def test_a_row_that_failed_in_an_earlier_search_is_still_to_be_scored(tmp_path: Path) -> None:
    first = step(tmp_path, "first", commit=False)
    segment = SegmentWriter(str(first.rows / candidate_id(CANDIDATE) / "one.jsonl"))
    for each in (row("x", 1.0), row("y", 0.0, {"kind": "timeout", "message": "slow"})):
        segment.write(each)
    segment.close()
    first.commit("p", {}, Cost())
    assert num_scored(step(tmp_path, "second", commit=False), CANDIDATE) == 1


def test_a_row_that_is_lent_is_not_paid_for(tmp_path: Path) -> None:
    failed = row("z", 0.0, {"kind": "timeout", "message": "slow"})
    lent = evaluator(tmp_path, earlier(tmp_path, row("x", 1.0), row("y", 1.0), failed))
    assert lent.lacking(CANDIDATE, ["x", "y", "z", "new"]) == {"z", "new"}
    lent.run(CANDIDATE, ["x"])
    assert lent.lacking(CANDIDATE, ["x", "y", "x"]) == set()
    assert {key[0] for key in read_rows(tmp_path / "own" / candidate_id(CANDIDATE))} == {"x"}  # to ask writes nothing


@pytest.mark.parametrize("others", [False, True])
def test_a_second_gepa_on_the_same_weights_runs_no_training_row_again(
    others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `others` the training examples are not the same, though they have the same ids."""
    monkeypatch.setattr(evaluators, "run_direct", run_rows)
    lent = Search(tmp_path, "gepa", 1000)
    first = search_step(lent, tmp_path, monkeypatch, None)
    lent.ctx.node = SimpleNamespace(steps=("p", "p"))
    if others:
        lent.ctx.examples = {**SPLITS, "train": [{**row, "labels": {"intent": "card_late"}} for row in SPLITS["train"]]}.get
    second = search_step(lent, tmp_path, monkeypatch, None)
    assert first.name != second.name
    rows = {
        record.name: [(path.parent.name, json.loads(line)) for path in train_rows(tmp_path, record.name) for line in path.open()]
        for record in (first, second)
    }
    ran = [{(name, row["example_id"]) for name, row in found if not row.get("reused")} for found in rows.values()]
    lent_rows = [row for _, row in rows[second.name] if row.get("reused")]
    assert ran[0] and bool(lent_rows) is not others and bool(ran[0] & ran[1]) is others
    paid = sum(len(row["calls"]) for _, row in rows[second.name] if not row.get("reused"))
    assert second.cost.lm_calls >= paid and (not lent_rows or paid < sum(len(row["calls"]) for _, row in rows[second.name]))


def train_rows(root: Path, step: str) -> list[Path]:
    return sorted((root / "steps" / step / "rows" / "train").rglob("*.jsonl"))
