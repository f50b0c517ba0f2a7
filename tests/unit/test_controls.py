"""What a search at equal cost is given."""

from types import SimpleNamespace

from bt_ray.config import PromptStep
from bt_ray.rollout import render
from bt_ray.runs.commit import Cost, Record
from bt_ray.stages import controls
from bt_ray.stages.controls import MAX_TIMES, candidates_for, path_seconds

STEP = PromptStep.model_validate({"optimizer": "random_fewshot", "num_candidates": 6})


def searched(seconds, trials):
    return Record("search-a", "p", 1, {"trials": [{}] * trials}, Cost(seconds=seconds), {}, "")


def test_candidates_that_the_seconds_pay_for():
    assert candidates_for(300.0, searched(100.0, 10), STEP) == 30
    assert candidates_for(1e6, searched(100.0, 10), STEP) == MAX_TIMES * 6
    assert candidates_for(300.0, searched(0.0, 0), STEP) == 6


def test_a_path_costs_what_its_stages_cost():
    seconds = {"vanilla": 1.0, "p": 10.0, "w": 1000.0, "p.w": 100.0}
    run = SimpleNamespace(stage_record=lambda name: {"cost": {"seconds": seconds[name]}} if name in seconds else None)
    assert path_seconds(SimpleNamespace(run=run), "p.w") == 111.0
    assert path_seconds(SimpleNamespace(run=run), "vanilla") == 1.0


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
