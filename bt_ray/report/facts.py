"""Reads a run directory into the plain facts that the report is built from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bt_ray import strategy
from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.report import estimate
from bt_ray.report.costs import engine_devices
from bt_ray.report.memory import Memory
from bt_ray.report.planned import TOTAL
from bt_ray.report.probes import kept_probe
from bt_ray.report.workload import FINAL
from bt_ray.rollout.rows import read_rows
from bt_ray.runs.commit import read_record
from bt_ray.runs.files import read_json, read_lines
from bt_ray.runs.run_dir import RunDir
from bt_ray.strategy import StageNode


def collect(run: RunDir, states: dict[str, str] | None = None) -> dict[str, Any]:
    """Facts of a run, finished or not, from its directory alone. `states` adds what a driver knows."""
    header = run.header()
    config, identity = run.config(), header["identity"]
    nodes = strategy.tree(config.strategy_steps())
    final = run.final_record()
    pick = run.pick()
    stages = [_stage(run, config, node, final, (states or {}).get(node.id)) for node in nodes]
    splits = ("train", "select", "test") if final else ("train", "select")
    states_now = {stage["status"] for stage in stages}
    opened = final is not None or (pick is not None and not config.data.test)
    complete = opened and states_now <= {"done", "skipped"}  # a longer strategy may have stages that are still to run
    return {
        "run_dir": run.shown,
        "status": "failed" if "failed" in states_now else "done" if complete else "unfinished",
        "task": config.program,
        "model": config.model,
        "metric": config.metric,
        "stages": stages,
        "controls": _controls(final),
        "pick": pick["id"] if pick else None,
        "pick_why": pick["why"] if pick else None,
        "test_looks": len(read_lines(run.root / "test_looks.jsonl")),
        "examples": {
            row["id"]: {"inputs": row["inputs"], "labels": row["labels"]} for split in splits for row in run.examples(split)
        },
        "estimates": estimates(run, config, identity),
        "plan": run.plan(),
        "again_scores": ((final or {}).get("again") or {}).get("scores"),
        "final_cost": final["cost"] if final else None,
        "devices": engine_devices(config.engines().values(), (final or {}).get("engine_devices")),
        "follow": identity["follow"],
        "follow_answers": {stage["id"]: stage["follow_answer"] for stage in stages if stage["follow_answer"]},
    }


def sizes_of(run: RunDir, identity: dict[str, Any]) -> estimate.Sizes:
    splits = {split: run.examples(split) for split in ("train", "search", "select", "test")}
    return estimate.sizes_from(splits, identity["signatures"])


def estimates(
    run: RunDir, config: RunConfig, identity: dict[str, Any], memory: Memory | None = None
) -> dict[str, dict[str, Any]]:
    """Expected cost by stage id, from the sizes and, where `bt-ray plan` measured one here, from a probe; what was
    planned when the run began stands.

    A stage that the plan lacks came later, and so did its part of the test and of the whole.
    """
    nodes = strategy.tree(config.strategy_steps())
    stored = run.plan() or {}
    names = [*(node.id for node in nodes), *([FINAL] if (run.root / "examples" / "test.jsonl").is_file() else []), TOTAL]
    if stored.keys() >= set(names):
        return {name: stored[name] for name in names}
    probe = kept_probe(config, identity)
    found = estimate.estimates(nodes, config, sizes_of(run, identity), probe, memory)
    if found.keys() - stored.keys():
        stored = {name: entry for name, entry in stored.items() if name not in (FINAL, TOTAL)}
    return {name: stored.get(name) or asdict(value) for name, value in found.items()}


def _stage(run: RunDir, config: RunConfig, node: StageNode, final: dict[str, Any] | None, state: str | None) -> dict[str, Any]:
    record = run.stage_record(node.id) or {}
    error = run.stage(node.id) / "error.json"
    failed = read_json(error) if error.is_file() and not record else {}
    evaluated = record.get("evaluate")
    rows = _rows(run, evaluated)
    follow = run.header()["identity"]["follow"]
    test = (final or {}).get("test", {}).get(node.id)
    shown = _rows(run, test["evaluate"]) if test else rows
    step = config.steps.get(node.name) if node.steps else None
    steps = _steps(run, record["steps"], step) if "steps" in record else None
    return {
        "id": node.id,
        "kind": "vanilla" if step is None else "p" if isinstance(step, PromptStep) else "w",
        "path": node.path,
        "parent": node.parent.id if node.parent else None,
        "status": record.get("status") or state or failed.get("status", "pending"),
        "note": record.get("note"),
        "error": failed.get("message"),
        "select_scores": record.get("select_scores"),
        "search_scores": record.get("search_scores"),
        "test_scores": test["scores"] if test else None,
        "cost": record.get("cost") or {"lm_calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0},
        "steps": steps,
        "tokens_per_example": _tokens_per_example(steps, evaluated, len(rows)),
        "row_errors": record.get("row_errors", 0),
        "candidate": record.get("candidate"),
        "rollouts": record.get("rollouts"),
        "rows": record.get("rows"),
        "prompts_on_select": record.get("alternatives"),
        "hash": record.get("hash"),
        "predictions": {name: value for name, value in shown.items() if name != follow},
        "follow_answer": rows.get(follow),
    }


def _steps(run: RunDir, names: list[str], step: PromptStep | WeightStep | None) -> list[dict[str, Any]] | None:
    """The committed steps that a stage used, with what each cost; None where one is not there to be read.

    `workers` are those of a fine-tune: it is a part of its identity, so a shared one had as many.
    """
    found = [read_record(run.step(name), verify_files=False) for name in names]
    workers = step.num_workers if isinstance(step, WeightStep) else 1
    steps = [
        {
            "name": record.name,
            "kind": record.name.split("-")[0],
            "stage": record.stage,
            "workers": workers,
            **record.cost.to_json(),
        }
        for record in found
        if record
    ]
    return steps if len(steps) == len(names) else None


def _tokens_per_example(steps: list[dict[str, Any]] | None, evaluated: str | None, examples: int) -> float | None:
    """Tokens of prompts and completions of an evaluation, per example; None where that is not known."""
    for step in steps or ():
        if step["name"] == evaluated and examples:
            return float(step["prompt_tokens"] + step["completion_tokens"]) / examples
    return None


def _rows(run: RunDir, step_name: str | None) -> dict[str, dict[str, Any]]:
    """Predictions of an evaluation by example id."""
    if not step_name:
        return {}
    record = read_record(run.step(step_name), verify_files=False)
    found = read_rows(run.step(step_name) / "rows", record.sealed if record else None)
    return {
        row["example_id"]: {
            "prediction": row["prediction"],
            "score": row["score"],
            "error": row["error"]["message"] if row["error"] else None,
        }
        for row in found.values()
    }


def _controls(final: dict[str, Any] | None) -> list[dict[str, Any]]:
    return list((final or {}).get("controls", []))
