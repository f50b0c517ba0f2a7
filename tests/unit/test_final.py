"""The evaluation on test, and the second run of the pick that its flip rate follows from."""

import json
from types import SimpleNamespace

import pytest

from bt_ray.report.build import build_report
from bt_ray.report.facts import collect
from bt_ray.runs.files import write_atomic
from bt_ray.runs.run_dir import RunDir
from bt_ray.stages import final, steps
from tests.support.plans import config

COST = {"lm_calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0}


@pytest.fixture
def run(tmp_path):
    row = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    identity = {"follow": "a", "signatures": {"one": {"inputs": ["x"], "outputs": ["z"]}}, "weights": {}}
    made = RunDir(tmp_path)
    data = {"train": "t", "val": "v", "test": "t", "inputs": ["x"]}
    plan = config(strategy=["p", "w"], data=data, engine={"replicas": {"min": 1, "max": 3}})
    made.create(plan, identity, {name: [row] for name in ("train", "search", "select", "test")})
    for number, name in enumerate(("vanilla", "p", "w")):
        record = {
            "id": name, "status": "done", "note": None, "hash": name, "candidate": {"of": name}, "cost": COST,
            "weights": {"id": "tuned" if name == "w" else "base"}, "select_scores": {"r1": 1.0, "r2": 0.0, "r3": float(number)},
        }  # fmt: skip
        write_atomic(made.stage(name) / "record.json", json.dumps(record))
    return made


def run_final(run, monkeypatch):
    """Run the final stage over evaluations that are made up; returns them in their order."""
    asked = []

    def evaluate(ctx, candidate, weights, split="select", again=False):
        asked.append((candidate["of"], weights["id"], split, again))
        scores = {"r1": 1.0, "r2": 1.0} if again else {"t1": 1.0}
        name = f"evaluate-{len(asked)}"
        return SimpleNamespace(record=SimpleNamespace(name=name, result={"errors": {}}), scores=scores)

    def publish(outcome, records):
        write_atomic(run.stage("final") / "record.json", json.dumps({"id": "final", "cost": COST, **outcome}))
        return {**outcome, "steps": [record.name for record in records]}

    monkeypatch.setattr(final, "reachable", lambda: {"GPU": 4.0})
    monkeypatch.setattr(steps, "evaluate", evaluate)
    monkeypatch.setattr(steps, "scores", lambda ctx, found: found.scores)
    ctx = SimpleNamespace(run=run, config=run.config(), absolute=lambda weights: weights, publish=publish)
    return asked, final.run(ctx, ["vanilla", "p", "w"])


def test_the_pick_is_run_on_select_again_while_the_engines_hold_its_weights(run, monkeypatch):
    write_atomic(run.root / "pick.json", json.dumps({"id": "p", "why": "told so", "stages": {}}))
    asked, outcome = run_final(run, monkeypatch)
    assert asked == [
        ("vanilla", "base", "test", False),
        ("p", "base", "test", False),
        ("p", "base", "select", True),
        ("w", "tuned", "test", False),
    ]
    assert outcome["steps"] == [f"evaluate-{number}" for number in (1, 2, 3, 4)], "its cost is counted"
    assert outcome["again"] == {"id": "p", "evaluate": "evaluate-3", "scores": {"r1": 1.0, "r2": 1.0}}
    assert build_report(collect(run))["flip_rate"] == 0.5


def test_without_a_pick_nothing_is_run_again(run, monkeypatch):
    asked, outcome = run_final(run, monkeypatch)
    assert [split for _, _, split, _ in asked] == ["test"] * 3 and outcome["again"] is None
    assert build_report(collect(run))["flip_rate"] is None


def test_it_writes_down_how_many_devices_the_engines_hold(run, monkeypatch):
    assert collect(run)["devices"] == {"held": 1, "exact": False}
    _, outcome = run_final(run, monkeypatch)
    assert outcome["engine_devices"] == 3
    assert collect(run)["devices"] == {"held": 3, "exact": True}
