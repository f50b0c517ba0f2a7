"""The weight stage's own choices: whose prompts the training rows carry, and which prompts are carried on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.config import WeightStep
from bt_ray.rollout import render
from bt_ray.stages import weight
from tests.unit.test_training_rows import call, rollout
from tests.unit.test_training_rows import render as chat_row


def prompts(name: str) -> dict[str, Any]:
    return {"predictors": {"one": {"instructions": name, "demos": []}}}


VANILLA, INCOMING = prompts("vanilla"), prompts("incoming")


class Context:
    """Of a stage, what `weight` touches: it comes in with prompts that are not the vanilla ones."""

    vanilla = VANILLA
    examples = staticmethod(lambda split: [{"id": "a"}])
    run = SimpleNamespace(step=Path)
    incoming = staticmethod(lambda: SimpleNamespace(candidate=INCOMING, weights=SimpleNamespace(parts=())))
    relative = staticmethod(lambda weights: {"id": weights})
    publish = staticmethod(lambda outcome, records: {**outcome, "used": [record.name for record in records]})


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the stage; `scores` of each prompt on the new weights by its instructions."""
    seen: dict[str, Any] = {}

    def record(name: str, **result: Any) -> Any:
        return SimpleNamespace(record=SimpleNamespace(name=name, result={"errors": {}, **result}), rows=[])

    def training_rows(ctx: Any, config: Any, rollouts: Any, given: Any) -> Any:
        seen["prompts of the rows"] = given
        return [{"example_id": "a"}], {"rows_per_predictor": {"one": 1}}

    def run(scores: dict[str, float], **step: Any) -> dict[str, Any]:
        passed = {"passed": 3, "rows": 4, "examples": 4, "examples_passed": 3}
        monkeypatch.setattr(weight.steps, "rollout", lambda *_: record("rollout", **passed))
        monkeypatch.setattr(weight, "training_rows", training_rows)
        monkeypatch.setattr(weight.steps, "finetune_parts", lambda *_: ([record("finetune").record], "tuned"))
        monkeypatch.setattr(
            weight.steps, "evaluate", lambda ctx, given, weights: record(given["predictors"]["one"]["instructions"])
        )
        monkeypatch.setattr(weight.steps, "scores", lambda ctx, found: {"x": scores[found.record.name]})
        ctx: Any = Context()
        return {**weight.run(ctx, WeightStep.model_validate({"method": "sft", "deduplicate": False, **step})), **seen}

    return run


@pytest.mark.parametrize(("row_prompts", "expected"), [("vanilla", VANILLA), ("optimised", INCOMING)])
def test_rows_carry_the_vanilla_prompts_unless_the_optimised_ones_are_asked_for(
    stage: Any, row_prompts: str, expected: Any
) -> None:
    found = stage({"vanilla": 0.0, "incoming": 0.0}, row_prompts=row_prompts)
    assert found["prompts of the rows"] == expected


@pytest.mark.parametrize(
    ("vanilla", "incoming", "carried_on"), [(0.75, 0.25, VANILLA), (0.25, 0.75, INCOMING), (0.5, 0.5, VANILLA)]
)
def test_both_prompts_are_evaluated_and_the_better_is_carried_on(
    stage: Any, vanilla: float, incoming: float, carried_on: Any
) -> None:
    found = stage({"vanilla": vanilla, "incoming": incoming})
    name = carried_on["predictors"]["one"]["instructions"]
    assert found["candidate"] == carried_on and found["select_scores"] == {"x": max(vanilla, incoming)}
    assert found["alternatives"] == {"vanilla": vanilla, "incoming": incoming}
    assert f"carries on the {name} prompts (vanilla {vanilla:.2f}, incoming {incoming:.2f} on select)" in found["note"]
    assert found["used"] == ["rollout", "finetune", "vanilla", "incoming"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"samples_per_example": "all"}, ["first", "short", "good", "first"]),
        ({"samples_per_example": "all", "deduplicate": True}, ["first", "short", "good"]),
        ({"samples_per_example": "first"}, ["first", "first"]),
        ({"samples_per_example": "best"}, ["good", "first"]),
        ({"samples_per_example": "shortest"}, ["short", "first"]),
    ],
)
def test_the_step_chooses_which_passing_rollouts_give_rows(
    step: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "row_renderer", lambda spec, candidate: chat_row)
    samples = [
        ("a", "bad", 0.0, 1),
        ("a", "first", 0.5, 9),
        ("a", "short", 0.4, 2),
        ("a", "good", 0.9, 5),
        ("b", "first", 0.5, 9),
    ]
    rollouts = [
        rollout(example, number, score, score > 0, calls=[call("answer", "q", text, tokens)])
        for number, (example, text, score, tokens) in enumerate(samples)
    ]
    ctx: Any = SimpleNamespace(spec=None)
    rows, _ = weight.training_rows(
        ctx, WeightStep.model_validate({"method": "sft", "deduplicate": False, **step}), rollouts, VANILLA
    )
    assert [row["completion"][0]["content"] for row in rows] == expected
    pairs, _ = weight.training_rows(ctx, WeightStep.model_validate({"method": "dpo"}), rollouts, VANILLA)
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [("good", "bad")]


def test_without_a_pair_dpo_is_skipped_with_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rollout passes with the same score: nothing is better than anything."""
    monkeypatch.setattr(render, "row_renderer", lambda spec, candidate: chat_row)
    result = {"passed": 4, "rows": 4, "examples": 2, "examples_passed": 2}
    found = SimpleNamespace(
        record=SimpleNamespace(name="rollout", result=result), rows=[rollout(name, number) for name in "ab" for number in (0, 1)]
    )
    monkeypatch.setattr(weight.steps, "rollout", lambda *_: found)
    monkeypatch.setattr(weight.steps, "finetune_parts", lambda *_: pytest.fail("there is nothing to learn from"))
    ctx: Any = Context()
    ctx.spec = None
    outcome = weight.run(ctx, WeightStep.model_validate({"method": "dpo"}))
    assert outcome["status"] == "skipped" and outcome["used"] == ["rollout"]
    assert "2 of 2 examples have no" in outcome["note"]
