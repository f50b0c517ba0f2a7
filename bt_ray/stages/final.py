"""After the pick: test is opened once, for all stages that have an outcome and for the controls."""

from __future__ import annotations

import time
from typing import Any

from bt_ray.planning import held_devices
from bt_ray.resources import reachable
from bt_ray.runs.commit import Record
from bt_ray.runs.files import append_line, read_lines
from bt_ray.runs.run_dir import RunDir
from bt_ray.stages import steps
from bt_ray.stages.context import StageContext
from bt_ray.stages.controls import equal_cost, gold, tfidf

LOOKS = "test_looks.jsonl"


def run(ctx: StageContext, stage_ids: list[str]) -> dict[str, Any]:
    """Evaluate every named stage on test, weights by weights, then the controls. The pick is run on
    select once more, for its flip rate. Publishes the record."""
    _note_look(ctx.run, stage_ids)
    outcomes = {stage_id: record for stage_id in stage_ids if (record := ctx.run.stage_record(stage_id))}
    records: list[Record] = []
    scored: dict[str, Any] = {}
    again: dict[str, Any] | None = None
    picked = (ctx.run.pick() or {}).get("id")
    by_weights = sorted(outcomes.items(), key=lambda item: item[1]["weights"]["id"])  # few swaps of the engines
    for stage_id, record in by_weights:
        candidate, weights = record["candidate"], ctx.absolute(record["weights"])
        found = steps.evaluate(ctx, candidate, weights, "test")
        records.append(found.record)
        scored[stage_id] = {
            "evaluate": found.record.name,
            "scores": steps.scores(ctx, found),
            "errors": found.record.result["errors"],
        }
        if stage_id == picked:  # here, while the engines hold its weights
            second = steps.evaluate(ctx, candidate, weights, "select", again=True)
            records.append(second.record)
            again = {"id": stage_id, "evaluate": second.record.name, "scores": steps.scores(ctx, second)}
    controls = [control for control in (gold(ctx, records), tfidf(ctx), equal_cost(ctx, records)) if control]
    opened = {stage_id: record["hash"] for stage_id, record in outcomes.items()}
    outcome = {"kind": "final", "status": "done", "note": None, "test": scored, "controls": controls, "opened": opened}
    devices = held_devices(ctx.config, reachable())  # for the report's device-seconds
    return ctx.publish({**outcome, "again": again, "engine_devices": devices}, records)


def _note_look(run: RunDir, stage_ids: list[str]) -> None:
    """Count an opening of test, unless exactly these outcomes were opened before."""
    opened = {name: (run.stage_record(name) or {}).get("hash") for name in stage_ids}
    if any(look["stages"] == opened for look in read_lines(run.root / LOOKS)):
        return
    append_line(run.root / LOOKS, {"time": time.time(), "stages": opened})
