"""What a search at equal cost is given."""

import json
from types import SimpleNamespace

import pytest

from bt_ray.config import PromptStep
from bt_ray.report import build
from bt_ray.rollout import render
from bt_ray.runs.commit import Cost, Record
from bt_ray.runs.files import write_atomic
from bt_ray.runs.run_dir import RunDir
from bt_ray.stages import controls, steps
from bt_ray.stages.controls import EQUAL_COST, MAX_TIMES, candidates_for, path_seconds
from tests.support.plans import config
from tests.support.spending import plant

STEP = PromptStep.model_validate({"optimizer": "random_fewshot", "num_candidates": 6})


def searched(seconds, trials):
    return Record("search-a", "p", 1, {"trials": [{}] * trials}, Cost(seconds=seconds), {}, "")


def test_candidates_that_the_seconds_pay_for():
    assert candidates_for(300.0, searched(100.0, 10), STEP) == 6 + 20
    assert candidates_for(100.0, searched(100.0, 10), STEP) == 6
    assert candidates_for(1e6, searched(100.0, 10), STEP) == MAX_TIMES * 6
    assert candidates_for(300.0, searched(0.0, 0), STEP) == 6


SECONDS = {"evaluate-v": 50.0, "rollout-a": 60.0, "search-a": 100.0, "evaluate-p": 10.0, "finetune-a": 150.0, "evaluate-w": 20.0}
USED = {
    "vanilla": ["evaluate-v"],
    "p": ["rollout-a", "search-a", "evaluate-p"],  # it found the rollouts that w had run
    "w": ["rollout-a", "finetune-a", "evaluate-w"],
}


@pytest.fixture
def run(tmp_path):
    """Stages vanilla, p and w of a run whose steps are committed; w ran the rollouts that p used too."""
    for name, seconds in SECONDS.items():
        stage = next(stage for stage in ("vanilla", "w", "p") if name in USED[stage])
        plant(tmp_path, name, stage, {"seconds": seconds}, {"best": {"of": "p"}, "trials": [{}] * 10})
    made = RunDir(tmp_path)
    for stage, names in USED.items():
        record = {"id": stage, "status": "done", "steps": names, "search": "search-a", "cost": {"seconds": 0.0}}
        write_atomic(made.stage(stage) / "record.json", json.dumps(record))
    write_atomic(tmp_path / "pick.json", json.dumps({"id": "w", "why": "told so", "stages": {}}))
    return made


def test_a_path_costs_each_of_its_steps_once_whoever_ran_it(run):
    ctx = SimpleNamespace(run=run)
    assert path_seconds(ctx, "vanilla") == 50.0
    assert path_seconds(ctx, "w") == 50.0 + 60.0 + 150.0 + 20.0
    assert path_seconds(ctx, "p") == 50.0 + 60.0 + 100.0 + 10.0  # the rollouts are a part of its path
    (run.root / "stages" / "p.w").mkdir()
    write_atomic(run.stage("p.w") / "record.json", json.dumps({"status": "done", "steps": ["rollout-a", "evaluate-p"]}))
    assert path_seconds(ctx, "p.w") == path_seconds(ctx, "p")


def test_a_path_that_took_rows_over_costs_its_share_of_the_step_that_ran_them(run):
    """A quarter of another step's rows; of one on the path itself nothing is added."""
    plant(run.root, "rollout-b", "p", {"seconds": 200.0}, {"rows": 40})
    own = run.step("rollout-a")
    (own / "rows").mkdir(exist_ok=True)
    row = {"example_id": "e", "accept": True, "error": None, "calls": []}
    lines = [json.dumps({**row, "sample": index, "reused": "rollout-b" if index < 10 else "rollout-a"}) for index in range(13)]
    (own / "rows" / "reused.jsonl").write_text("".join(line + "\n" for line in lines))
    assert path_seconds(SimpleNamespace(run=run), "w") == 50.0 + 60.0 + 150.0 + 20.0 + 200.0 / 4


def test_the_search_at_equal_cost_gets_what_the_pick_paid_beyond_the_prompt_step(run, monkeypatch):
    asked = []

    def search(ctx, step, prompts, rollouts, weights):
        asked.append(step.num_candidates)
        return SimpleNamespace(result={"best": {"of": "more"}}, cost=SimpleNamespace(seconds=150.0))

    monkeypatch.setattr(controls, "search", search)
    monkeypatch.setattr(controls, "teacher_rollouts", lambda ctx, step, start: None)
    monkeypatch.setattr(steps, "evaluate", lambda *arguments: SimpleNamespace(record="evaluated"))
    monkeypatch.setattr(steps, "scores", lambda ctx, found: {"t1": 1.0})
    ctx = SimpleNamespace(run=run, config=config(controls={"equal_cost": "p"}), vanilla={}, base=None)
    records: list = []
    found = controls.equal_cost(ctx, records)
    # 280 s of the pick's path, less the 120 s that p takes beside its search: 60 s more than its 100, at 10 s a candidate
    assert asked == [12] and len(records) == 2
    assert (found["kind"], found["step"], found["test_scores"]) == (EQUAL_COST, "p", {"t1": 1.0})
    assert "12 candidates in place of" in found["note"] and ": 270 s, where the pick took 280 s" in found["note"]
    assert EQUAL_COST == build.EQUAL_COST
    write_atomic(run.root / "pick.json", json.dumps({"id": "vanilla", "why": "told so", "stages": {}}))
    assert controls.equal_cost(ctx, records)["test_scores"] is None and asked == [12]


def test_rows_without_the_label_are_left_out(monkeypatch):
    rows = {
        "train": [("a", {"side": "left"}), ("b", {}), ("c", {"side": "right"})],
        "test": [("d", {"side": "left"}), ("e", {})],
    }
    examples = {
        split: [{"id": name, "inputs": {"text": f"word {name}"}, "labels": labels} for name, labels in found]
        for split, found in rows.items()
    }
    ctx = SimpleNamespace(
        config=SimpleNamespace(controls=SimpleNamespace(tfidf="side")),
        examples=examples.get,
        spec=None,
        vanilla=None,
        identity={"signatures": {"one": {"outputs": ["side"]}}},
    )
    control = controls.tfidf(ctx)
    assert set(control["test_scores"]) == {"d"}
    assert control["note"] == "2 labelled rows"
    monkeypatch.setattr(render, "row_renderer", lambda spec, candidate: lambda predictor, inputs, gold: {"gold": gold})
    rollouts = [{"example_id": name, "calls": [{"predictor": "one", "inputs": {}}]} for name in "abc"]
    found = controls.gold_rows(ctx, rollouts, {"one": ["side"]})
    assert [(row["example_id"], row["gold"]) for row in found] == [("a", {"side": "left"}), ("c", {"side": "right"})]
