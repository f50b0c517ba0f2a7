"""What each stage cost: devices' time, steps that another stage ran, and the control at equal cost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bt_ray.config import EngineConfig
from bt_ray.report import text
from bt_ray.report.build import build_report
from bt_ray.report.costs import device_seconds, engine_devices
from bt_ray.report.facts import collect
from bt_ray.report.html import render_html
from bt_ray.runs.files import write_atomic
from bt_ray.runs.run_dir import RunDir
from tests.support.plans import config
from tests.support.report_facts import demo_facts
from tests.support.spending import plant

KEYS = ("name", "kind", "stage", "seconds", "workers", "lm_calls")


def step(name: str, stage: str, seconds: float, workers: int = 1, lm_calls: int = 0) -> dict[str, Any]:
    return dict(zip(KEYS, (name, name.split("-")[0], stage, seconds, workers, lm_calls), strict=True))


ROLLOUT = step("rollout-a", "p", 56.0, lm_calls=384)
SEARCH, EVALUATE = step("search-a", "p", 95.0, lm_calls=576), step("evaluate-p", "p", 8.0, lm_calls=66)
FINETUNE, TESTED = step("finetune-a", "w", 100.0, workers=2), step("evaluate-w", "w", 20.0, lm_calls=66)
TWO_BY_TWO = {"held": 4, "exact": True}


def shared_facts() -> dict[str, Any]:
    """`w` used the rollouts that `p` ran."""
    facts = demo_facts() | {"devices": TWO_BY_TWO}
    steps = {"vanilla": [step("evaluate-v", "vanilla", 50.0)], "p": [ROLLOUT, SEARCH, EVALUATE], "w": [ROLLOUT, FINETUNE, TESTED]}
    for stage in facts["stages"]:
        stage["steps"] = steps.get(stage["id"])
    return facts


def printed(facts: dict[str, Any]) -> str:
    file = io.StringIO()
    text.render_report(build_report(facts), facts, Console(file=file, width=120, force_terminal=False))
    return file.getvalue()


def test_engines_and_training_workers_are_counted_apart() -> None:
    stages = {stage["id"]: stage for stage in build_report(shared_facts())["stages"]}
    assert stages["p"]["device_seconds"] == {"engine": 4 * 159.0, "training": 0.0, "total": 636.0, "exact": True}
    # Its own evaluation on four devices and two training workers; the rollouts are in p's.
    assert stages["w"]["device_seconds"] == {"engine": 80.0, "training": 200.0, "total": 280.0, "exact": True}
    assert stages["p.w"]["device_seconds"] is None


def test_the_totals_hold_devices_where_every_stage_knows_them() -> None:
    facts = shared_facts()
    assert build_report(facts)["totals"]["device_seconds"] is None
    facts["stages"] = facts["stages"][:3]
    assert build_report(facts)["totals"]["device_seconds"] == {"engine": 916.0, "training": 200.0, "total": 1116.0, "exact": True}


@pytest.mark.parametrize(
    ("replicas", "recorded", "held", "exact"),
    [((1, 1), None, 2, True), ((1, 4), None, 2, False), ((1, 4), 6, 6, True), ((0, 2), None, 2, False)],
)
def test_devices_are_those_of_the_record_else_of_the_config(
    replicas: tuple[int, int], recorded: int | None, held: int, exact: bool
) -> None:
    engine = EngineConfig.model_validate(
        {"tensor_parallel_size": 2, "replicas": dict(zip(("min", "max"), replicas, strict=True))}
    )
    devices = engine_devices([engine], recorded)
    assert devices == {"held": held, "exact": exact}
    found = device_seconds([TESTED], devices)
    assert found and found["exact"] is exact
    trained = device_seconds([FINETUNE], devices)
    assert trained and trained["exact"] and trained["total"] == 200.0


def test_the_facts_read_each_step_that_a_stage_used(tmp_path: Path) -> None:
    run, row = RunDir(tmp_path), {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    identity = {"follow": "a", "signatures": {"one": {"inputs": ["x"], "outputs": ["z"]}}, "weights": {}}
    steps: dict[str, Any] = {"p": {"optimizer": "random_fewshot"}, "w": {"method": "sft", "num_workers": 2}}
    run.create(config(steps=steps, strategy=["p", "w"]), identity, {name: [row] for name in ("train", "search", "select")})
    evaluated = [
        {"example_id": name, "sample": 0, "accept": True, "prediction": {}, "score": 1.0, "error": None} for name in ("a", "b")
    ]
    write_atomic(tmp_path / "steps" / "evaluate-w" / "rows" / "a.jsonl", "".join(json.dumps(row) + "\n" for row in evaluated))
    for item in (ROLLOUT, FINETUNE, {**TESTED, "prompt_tokens": 180, "completion_tokens": 20}):
        cost = {key: item[key] for key in ("seconds", "lm_calls", "prompt_tokens", "completion_tokens") if key in item}
        plant(tmp_path, item["name"], item["stage"], cost)
    cost = {"lm_calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 100.0}
    record = {"id": "w", "status": "done", "note": None, "hash": "w", "cost": cost, "evaluate": "evaluate-w"}
    write_atomic(run.stage("w") / "record.json", json.dumps({**record, "steps": ["rollout-a", "finetune-a", "evaluate-w"]}))
    facts = collect(run)
    found = next(stage for stage in facts["stages"] if stage["id"] == "w")["steps"]
    assert [(item["name"], item["kind"], item["stage"], item["seconds"]) for item in found] == [
        ("rollout-a", "rollout", "p", 56.0),
        ("finetune-a", "finetune", "w", 100.0),
        ("evaluate-w", "evaluate", "w", 20.0),
    ]
    report = {stage["id"]: stage for stage in build_report(facts)["stages"]}
    assert report["w"]["device_seconds"] == {"engine": 20.0, "training": 200.0, "total": 220.0, "exact": True}
    assert report["w"]["tokens_per_example"] == 100.0, "of the two examples of its evaluation, whatever else it ran"
    assert report["p"]["device_seconds"] is None and report["p"]["tokens_per_example"] is None
    (tmp_path / "steps" / "rollout-a" / "record.json").unlink()
    assert next(stage for stage in collect(run)["stages"] if stage["id"] == "w")["steps"] is None


def test_the_table_says_where_a_shared_step_is_counted() -> None:
    assert "A step counts where it ran: w used the rollouts of p (384 calls, 56 s)." in printed(shared_facts())
    assert "A step counts" not in printed(demo_facts())


def test_the_page_shows_devices_and_shared_steps() -> None:
    facts = shared_facts()
    page = render_html(build_report(facts), facts)
    assert "device-seconds: engines, training" in page and "80 + 200" in page
    assert "w used the rollouts of p (384 calls, 56 s)" in page
    facts["devices"] = {**TWO_BY_TWO, "exact": False}
    assert "≥ 80 + 200" in render_html(build_report(facts), facts)


def equal_cost(scores: dict[str, float] | None) -> dict[str, Any]:
    return {"name": "p at equal cost", "kind": "equal_cost", "step": "p", "test_scores": scores, "note": None}


def test_the_pick_is_set_against_the_search_at_equal_cost() -> None:
    facts = demo_facts()
    before = {item["name"]: item for item in build_report(facts)["contrasts"]}
    pick = next(stage for stage in facts["stages"] if stage["id"] == "p.w")["test_scores"]
    facts["controls"].append(equal_cost(dict.fromkeys(pick, 0.0)))
    report = build_report(facts)
    after = {item["name"]: item for item in report["contrasts"]}
    assert list(after) == [*list(before)[:3], "pick - equal-cost p", *list(before)[3:]], "after the rivals, before the mixes"
    found = after["pick - equal-cost p"]
    assert (found["on"], found["n"]) == ("test", len(pick))
    assert found["difference"] == pytest.approx(sum(pick.values()) / len(pick))
    # Holm is over all of them: the smallest p of five before is now adjusted for six.
    smallest = min(report["contrasts"], key=lambda item: item["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, smallest["p"] * len(report["contrasts"])))
    assert "  pick - equal-cost p: +" in printed(facts)


def test_a_control_at_equal_cost_that_did_not_run_is_no_contrast() -> None:
    facts = demo_facts()
    facts["controls"].append(equal_cost(None))
    assert "pick - equal-cost p" not in [item["name"] for item in build_report(facts)["contrasts"]]
