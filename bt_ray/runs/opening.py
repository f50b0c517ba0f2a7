"""Opens a run directory for a config, and says whether all of its run is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from bt_ray import strategy
from bt_ray.config import RunConfig
from bt_ray.errors import RunDirError
from bt_ray.runs.lock import RunLock
from bt_ray.runs.run_dir import IDENTITY_PARTS, RunDir, check_writable, differences


class Startable(Protocol):
    """What a run begins with: a checked config, its examples, the identity of its parts."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def splits(self) -> dict[str, list[dict[str, Any]]]: ...
    @property
    def identity(self) -> dict[str, Any]: ...


def open_run(root: str | Path, prepared: Startable) -> RunDir:
    """The run directory for this config: new, or an old one that the config may go on with.

    Raises RunDirError with the differences where the directory holds another config.
    """
    run = RunDir(root)
    check_writable(run.root)
    if not run.exists():
        with RunLock(run.root):
            if not run.exists():  # another process may have made it between that look and the lock
                run.create(prepared.config, prepared.identity, prepared.splits)
                return run
    if _accepted(run, prepared) != run.header():
        with RunLock(run.root):  # another driver reads the header while it runs
            run.write_header(prepared.config, _accepted(run, prepared)["identity"])
    return run


def _accepted(run: RunDir, prepared: Startable) -> dict[str, Any]:
    """The header that the run would go on with. Raises RunDirError where a result would depend on the change."""
    old = run.header()
    follow = old["identity"]["follow"]  # chosen once: evaluations hold its row
    identity = json.loads(json.dumps({**prepared.identity, "follow": follow}))
    new = {"config": prepared.config.model_dump(mode="json"), "identity": identity}
    changed = differences(old["config"], new["config"])
    for part in IDENTITY_PARTS:
        if old["identity"][part] != new["identity"][part]:
            changed.append(f"{part}: its content changed since the run began")
    changed += [f"steps.{name}.optimizer: its source changed since its search" for name in changed_searchers(run, identity)]
    if changed:
        raise RunDirError(
            f"{run.root} holds a run of another config. {'; '.join(changed)}. Name another --run-dir, or undo the change."
        )
    return new


def changed_searchers(run: RunDir, identity: dict[str, Any]) -> list[str]:
    """Prompt steps whose own searcher has another source than in a run that has an outcome of theirs already."""
    old, new = (one.get("searchers") or {} for one in (run.header()["identity"], identity))
    ended = {name for path in (run.root / "stages").glob("*/record.json") for name in path.parent.name.split(".")}
    return [name for name, source in old.items() if name in ended and new.get(name, source) != source]


def is_complete(run: RunDir) -> bool:
    """Whether every stage has its record, the pick is committed and, where there is a test, it was run."""
    nodes = strategy.tree(run.config().strategy_steps())
    if any(_settled(run, node) is None for node in nodes):
        return False
    pick = run.pick()
    if pick is None or pick["stages"] != stage_hashes(run):
        return False
    return run.final_record() is not None or not run.config().data.test


def _settled(run: RunDir, node: strategy.StageNode) -> str | None:
    record = run.stage_record(node.id)
    if record:
        return str(record["status"])
    if node.parent and _settled(run, node.parent) == "skipped":
        return "skipped"
    return None


def stage_hashes(run: RunDir) -> dict[str, str]:
    """Hashes of the records that the stages of the present strategies have."""
    nodes = strategy.tree(run.config().strategy_steps())
    records = {node.id: run.stage_record(node.id) for node in nodes}
    return {name: record["hash"] for name, record in records.items() if record}
