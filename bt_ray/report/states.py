"""The state of every stage of a run, finished or not, from its directory: what the live view and `status` show."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bt_ray import strategy
from bt_ray.report.facts import estimates
from bt_ray.report.live import StageState
from bt_ray.report.meter import RowMeter
from bt_ray.report.planned import expected
from bt_ray.runs.files import read_json
from bt_ray.runs.inside import inside
from bt_ray.runs.lock import is_held
from bt_ray.runs.run_dir import RunDir


class Watcher:
    """Looks at a run again and again. Reads every row once: it works beside the engines."""

    def __init__(self, run: RunDir):
        self._run = run
        nodes = strategy.tree(run.config().strategy_steps())
        self._paths = {node.id: node.path for node in nodes}
        found = estimates(run, run.config(), run.header()["identity"])
        self._estimate_s = {name: expected(value, "seconds") for name, value in found.items()}
        self._meter = RowMeter()

    def states(self, known: Mapping[str, str]) -> list[StageState]:
        """All stages, parents first. `known`: the driver's words; without them they are read from the files."""
        paths = dict(self._paths)
        if known.get("final") or (self._run.stage("final") / "job.json").is_file():
            paths["final"] = "test, once"
        return [self._state(stage_id, path, known.get(stage_id)) for stage_id, path in paths.items()]

    def _state(self, stage_id: str, path: str, state: str | None) -> StageState:
        record = self._run.stage_record(stage_id)
        if record:
            return _ended(stage_id, path, record)
        error = self._run.stage(stage_id) / "error.json"
        told = read_json(error) if error.is_file() else {}
        status = state or ("running" if self._is_running(stage_id) else told.get("status", "pending"))
        running = self._running(stage_id) if status == "running" else {}
        note = told.get("message") if told.get("status") == status else None  # else of an earlier driver's try
        return StageState(id=stage_id, path=path, status=status, **{"note": note, **running})

    def _is_running(self, stage_id: str) -> bool:
        """For a watcher that is not the driver: a driver that is alive holds the lock, and the stage was submitted."""
        stage = self._run.stage(stage_id)
        return is_held(self._run.root) and (stage / "job.json").is_file() and not (stage / "error.json").is_file()

    def _running(self, stage_id: str) -> dict[str, Any]:
        """What a running stage does now, from its progress and the rows that its workers have written."""
        estimate_s = self._estimate_s.get(stage_id)
        empty = {"step": "starting", "lm_calls": 0, "tokens_per_s": None, "seconds": 0.0, "seconds_left": estimate_s}
        submitted = self._run.submitted_at(stage_id)
        if submitted is None:
            return empty
        seconds = max(0.0, time.time() - submitted)
        progress = self._run.progress(stage_id)
        if progress is None:
            return {**empty, "seconds": seconds}
        lm_calls, rate = self._meter.read(stage_id, inside(self._run.root, progress["rows"]) if progress["rows"] else None)
        return {
            "step": f"{progress['step']} ({progress['note']})" if progress["note"] else progress["step"],
            "lm_calls": lm_calls,
            "tokens_per_s": rate,
            "seconds": seconds,
            "seconds_left": max(0.0, estimate_s - seconds) if estimate_s else None,
        }


def _ended(stage_id: str, path: str, record: dict[str, Any]) -> StageState:
    scores = [score for score in record.get("select_scores", {}).values() if score is not None]
    cost = record["cost"]
    return StageState(
        id=stage_id,
        path=path,
        status=record["status"],
        score=sum(scores) / len(scores) if scores else None,
        lm_calls=cost["lm_calls"],
        seconds=cost["seconds"],
        note=record["note"],
    )
