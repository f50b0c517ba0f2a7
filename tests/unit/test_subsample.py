"""A prompt step that draws its examples runs, scores and shows no others; rollouts on some of train are shared with those on all."""

from __future__ import annotations

import functools
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.config import PromptStep
from bt_ray.data import subsample
from bt_ray.rollout import evaluator as evaluators
from bt_ray.rollout import pipeline
from bt_ray.rollout.rows import SegmentWriter, done_keys, read_rows
from bt_ray.rollout.tasks import RolloutPlan
from bt_ray.runs import claim
from bt_ray.runs.commit import Record, Step, StepKey
from bt_ray.search import experiment
from bt_ray.search.racing import StopRule
from bt_ray.stages import prompt, steps
from bt_ray.stages.context import Incoming
from bt_ray.stages.lent import lenders
from bt_ray.stages.steps import split_hash
from tests.support.budgeted_search import SPLITS, Search, run_rows, search_step
from tests.support.compiling import SEARCH, STUDENT, TRAIN
from tests.support.plans import config
from tests.support.stub_pool import BASE

DRAWN = {"train": subsample(TRAIN, 5, 0, "train"), "search": subsample(SEARCH, 3, 0, "search")}


# --- the search -----------------------------------------------------------------------------------


def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[Search, Record, dict[str, Any]]:
    """A search of gepa, its record, and what its step follows from."""
    monkeypatch.setattr(evaluators, "run_direct", run_rows)
    lent = Search(tmp_path, "gepa", None, **keys)
    record = search_step(lent, tmp_path, monkeypatch, None)
    attempt = json.loads((tmp_path / "steps" / record.name / "attempt-0001.json").read_text())
    return lent, record, attempt


def ids(rows: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in rows}


def test_candidates_are_scored_on_the_draw_and_the_optimiser_sees_no_other_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent, record, attempt = searched(tmp_path, monkeypatch, max_train_examples=5, max_search_examples=3)
    assert record.result["scores"].keys() == ids(DRAWN["search"]) < ids(SEARCH)
    rows = tmp_path / "steps" / record.name / "rows"
    ran = {key[0] for folder in (rows / "train").iterdir() for key in read_rows(folder)}
    assert ran and ran <= ids(DRAWN["train"])
    assert (attempt["inputs"]["examples"], attempt["train"]) == tuple(split_hash(DRAWN[name]) for name in ("search", "train"))
    context = lent.parts.context((STUDENT, STUDENT), lent.teacher)
    assert context.examples == DRAWN["train"] and context.search_ids == tuple(row["id"] for row in DRAWN["search"])
    *_, train, search = context.compile.args
    assert (train, search) == (DRAWN["train"], DRAWN["search"])


def test_the_plan_of_a_search_and_its_check_of_the_context_have_the_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_search(optimizer: str, context: Any, evaluator: Any, plan: Any) -> Any:
        seen["ids"], seen["rule"] = plan.example_ids, plan.stop_rule
        return SimpleNamespace(best=STUDENT, label="incoming", score=0.0, trials=[], notes=[], lineage=[])

    lent = Search(tmp_path, "opro", None, max_search_examples=3, racing_error=0.2, racing_regret=0.03)
    monkeypatch.setattr(experiment, "run_search", run_search)
    search_step(lent, tmp_path, monkeypatch, None)
    assert seen["ids"] == [row["id"] for row in DRAWN["search"]] and lent.checked_on == DRAWN["search"]
    assert seen["rule"] == StopRule(0.2, 0.03)


def test_a_step_that_draws_all_is_the_one_that_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, attempt = searched(tmp_path / "plain", monkeypatch)
    _, large, _ = searched(tmp_path / "large", monkeypatch, max_train_examples=99, max_search_examples=len(SEARCH))
    _, fewer, _ = searched(tmp_path / "fewer", monkeypatch, max_train_examples=7)
    assert plain.name == large.name != fewer.name
    assert not [name for name in attempt["inputs"]["step"] if "examples" in name] and "train" not in attempt["inputs"]


# --- its rollouts ---------------------------------------------------------------------------------


def test_demos_come_from_rollouts_on_the_drawn_training_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(steps, "rollout", lambda ctx, candidate, weights, train: asked.append(train))
    ctx: Any = SimpleNamespace(config=config(), examples=SPLITS.get, vanilla=STUDENT)
    for number in (5, None):
        step = PromptStep(optimizer="random_fewshot", max_train_examples=number)
        prompt.teacher_rollouts(ctx, step, Incoming(STUDENT, BASE))
    assert asked == [DRAWN["train"], TRAIN]


class Stage:
    """Rollout steps in `folder` over stub rows of two calls; `ran` has the keys of those that were run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.ran: list[tuple[str, int]] = []
        self.checked: list[int] = []
        self.train = TRAIN
        self.ctx: Any = SimpleNamespace(
            config=config(rollout={"samples": 2}), stage_id="p", workers=[], run=SimpleNamespace(scratch=folder / "scratch"),
            examples=lambda split: self.train, key=key_of, step=functools.partial(Step, folder),
            check_budget=self.checked.append, progress=self._started, begin_workers=lambda: None, ensure=lambda weights: None,
        )  # fmt: skip
        self.starts = 0
        monkeypatch.setattr(pipeline, "begin_data", lambda: None)
        monkeypatch.setattr(pipeline, "run_rollouts", self._run)

    def rollout(self, train: list[dict[str, Any]]) -> steps.Rollouts:
        self.ran.clear()
        return steps.rollout(self.ctx, STUDENT, BASE, train)

    def _started(self, *_: Any) -> None:
        self.starts += 1

    def _run(self, plan: RolloutPlan, workers: Any, large: bool) -> None:
        done, writer = done_keys(plan.segment_dir), SegmentWriter(f"{plan.segment_dir}/stub.jsonl")
        for task in plan.read_tasks():
            if task.key in done:
                continue
            self.ran.append(task.key)
            call = {"predictor": "route", "inputs": {}, "outputs": {}, "text": "", "prompt_token_ids": [1], "token_ids": [2]}
            made = {"calls": [call, call], "score": 1.0, "accept": True, "error": None}
            writer.write({"example_id": task.key[0], "sample": task.key[1], **made, "run": self.starts})
        writer.close()


def key_of(kind: str, **inputs: Any) -> StepKey:
    return StepKey(kind, inputs)


def keys(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["id"], sample) for row in rows for sample in range(2)]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_rollouts_on_a_draw_take_over_those_on_all(stage: Stage) -> None:
    whole = stage.rollout(TRAIN)
    assert stage.ran == keys(TRAIN) and whole.record.cost.lm_calls == 2 * 16
    some = stage.rollout(DRAWN["train"])
    assert (stage.ran, stage.starts, stage.checked) == ([], 1, [16, 0]), "no engine takes the weights for nothing"
    assert some.record.cost.lm_calls == 0 and some.record.result["rows"] == 10
    assert [(row["example_id"], row["sample"]) for row in some.rows] == keys(DRAWN["train"])
    assert [row["run"] for row in some.rows] == [1] * 10
    assert lenders(stage.folder / "steps" / some.record.name) == {whole.record.name: 10} and not lenders(
        stage.folder / "steps" / whole.record.name
    )
    stage.ctx.run.step = (stage.folder / "steps").joinpath
    assert steps.taken_over(stage.ctx, some.record) == f"; 10 of them were run by {whole.record.name}"
    assert steps.taken_over(stage.ctx, whole.record) == ""


def test_rollouts_on_all_run_what_a_draw_lacks_and_it_matters_not_who_came_first(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, whole = stage.rollout(DRAWN["train"]), stage.rollout(TRAIN)
    assert stage.ran == [key for key in keys(TRAIN) if key[0] not in ids(DRAWN["train"])] and stage.checked == [10, 6]
    assert (some.record.cost.lm_calls, whole.record.cost.lm_calls) == (2 * 10, 2 * 6)
    other = Stage(tmp_path / "other", monkeypatch)
    again = [other.rollout(TRAIN), other.rollout(DRAWN["train"])]
    assert [(one.record.name, one.record.result) for one in again] == [
        (one.record.name, one.record.result) for one in (whole, some)
    ]


def test_rows_of_other_training_examples_with_the_same_ids_are_not_taken_over(stage: Stage) -> None:
    stage.rollout(TRAIN)
    stage.train = [{**row, "labels": {}} for row in TRAIN]  # a fork that reads other fields as labels
    stage.rollout(stage.train[:3])
    assert stage.ran == keys(TRAIN[:3])


def test_a_damaged_step_lends_nothing(stage: Stage) -> None:
    whole = stage.rollout(TRAIN)
    (stage.folder / "steps" / whole.record.name / "attempt-0001.json").write_text("{")
    stage.rollout(DRAWN["train"])
    assert stage.ran == keys(DRAWN["train"])


def test_stages_side_by_side_run_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "POLL_S", 0.01)
    stages, began = [Stage(tmp_path, monkeypatch) for _ in range(2)], threading.Barrier(2)

    def run(plan: RolloutPlan, workers: Any, large: bool) -> None:
        time.sleep(0.2)  # the other one is at it too by now, if it may
        stages[0]._run(plan, workers, large)

    monkeypatch.setattr(pipeline, "run_rollouts", run)

    def made(index: int, train: list[dict[str, Any]]) -> None:
        began.wait()
        steps.rollout(stages[index].ctx, STUDENT, BASE, train)

    threads = [threading.Thread(target=made, args=pair) for pair in enumerate((TRAIN, DRAWN["train"]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stages[0].ran) == sorted(keys(TRAIN))


def test_rows_of_other_prompts_are_not_taken_over(stage: Stage) -> None:
    stage.rollout(TRAIN)
    stage.ran.clear()
    other = {"predictors": {name: {**state, "instructions": "Other."} for name, state in STUDENT["predictors"].items()}}
    steps.rollout(stage.ctx, other, BASE, DRAWN["train"])
    assert stage.ran == keys(DRAWN["train"])
