"""The run directory: what is where, and whether a config may go on with it.

run.json                     identity of the run, resolved config; written again (opening.py) where the run goes on with other
                             values of keys on which no result depends (FREE_KEYS)
examples/{train,search,select,test}.jsonl
plan.json                    what each stage was expected to cost, from before the run began
steps/<kind>-<hash>/         see commit.py
stages/<id>/record.json      what a stage ended with; progress.json beside it: what it does while it runs
stages/<id>/job.json         the Ray job that the driver submitted last for it, and when
stages/<id>/error.json       why it failed or was left out; job.log beside it: what a job without an outcome printed
pick.json                    the pick, committed before test is opened
test_looks.jsonl             one line for each opening of test; a run that goes on with the same outcomes adds none
lock.json, stop.json         the driver, and a request that it stop: see lock.py
scratch/                     checkpoints and logs of libraries, locks; may be deleted when nothing runs
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bt_ray import strategy
from bt_ray.config import RunConfig
from bt_ray.errors import CommitError, ConfigError, RunDirError
from bt_ray.runs.files import read_json, read_lines, write_atomic
from bt_ray.runs.inside import inside

IDENTITY_PARTS = ("program", "metric", "model", "splits", "vanilla")  # what a run's stages follow from, beside its config
IN_MEMORY = "(rows from Python)"  # in place of a data file: the rows are in the run directory alone
PICKLED = "pickled:"  # begins the reference of a program or metric that only a file of the run directory holds
# Parts of the config that change how a run is carried out, never what a step's result is; and names of
# program, metric and data, whose content is compared by its hash.
FREE_KEYS = ("strategy", "budget", "cluster", "base_dir", "program", "metric", "data", "engine.stall_timeout_s")


URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # also what pathlib leaves of `s3://bucket/run`
PLACE = "place.json"  # beside a folder that is a copy of a run in a bucket: {"url": ...}


class RunDir:
    """Paths and small reads of one run."""

    def __init__(self, root: str | Path):
        refuse_urls(root)
        self.root = Path(root).resolve()

    @property
    def shown(self) -> str:
        """What its user calls it: the folder, or the URL of the bucket that it is a copy of."""
        place = self.root.parent / PLACE
        return str(read_json(place)["url"]) if place.is_file() else str(self.root)

    @property
    def scratch(self) -> Path:
        """Folder of what may be deleted when nothing runs."""
        return self.root / "scratch"

    def stage(self, stage_id: str) -> Path:
        """Folder of a stage. RunDirError for a name that leads out of the run directory, here as below."""
        return inside(self.root, f"stages/{stage_id}")

    def step(self, name: str) -> Path:
        """Folder of a step that a record names."""
        return inside(self.root, f"steps/{name}")

    def progress(self, stage_id: str) -> dict[str, Any] | None:
        """What the stage's present job is at: {"since", "name", "step", ...} of `StageContext.progress`. None before
        its first step, also where an earlier job left word of one."""
        folder = self.stage(stage_id)
        if not (folder / "progress.json").is_file():
            return None
        found, submitted = read_json(folder / "progress.json"), self.submitted_at(stage_id)
        return dict(found) if submitted is not None and found["since"] >= submitted and "name" in found else None

    def submitted_at(self, stage_id: str) -> float | None:
        """When the stage's present job was submitted, in seconds since the epoch by the driver's clock; None before that."""
        word = self.stage(stage_id) / "job.json"
        since = read_json(word).get("since") if word.is_file() else None
        return None if since is None else float(since)

    def seconds_in_step(self, stage_id: str) -> float:
        """Seconds since the step that a stage is at began, while no record has them; 0 between two steps."""
        progress = self.progress(stage_id)
        if progress is None or (self.step(progress["name"]) / "record.json").is_file():
            return 0.0
        return max(0.0, time.time() - float(progress["since"]))

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.root / "run.json").is_file()

    def header(self) -> dict[str, Any]:
        """run.json: {"config", "identity"}. RunDirError where there is none or it lacks one of them."""
        if not self.exists():
            raise RunDirError(
                f"{self.root} is no run directory (it has no run.json). Start one with `bt-ray run CONFIG --run-dir DIR`."
            )
        header = _mapping(inside(self.root, "run.json"))
        if not isinstance(header.get("config"), dict) or not isinstance(header.get("identity"), dict):
            raise RunDirError(
                f"{self.root / 'run.json'} is damaged: it lacks `config` or `identity`. Start the run in a new folder."
            )
        return header

    def config(self) -> RunConfig:
        """The run's config, with every default that it began with. RunDirError where it is no config of this version."""
        try:
            return RunConfig.model_validate(self.header()["config"])
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except ConfigError as error:  # of its strategies
            why = str(error)
        raise RunDirError(
            f"{self.root / 'run.json'}: its config is damaged or of another version of bt_ray ({why}). Start the run in a new folder."
        )

    def create(self, config: RunConfig, identity: dict[str, Any], splits: dict[str, list[dict[str, Any]]]) -> None:
        """Write examples, then run.json, which makes the directory a run."""
        for name, rows in splits.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(self.root / "examples" / f"{name}.jsonl", text)
        self.write_header(config, identity)

    def write_header(self, config: RunConfig, identity: dict[str, Any]) -> None:
        """Write run.json, or put another in its place at once."""
        data = {"config": config.model_dump(mode="json"), "identity": identity}
        write_atomic(self.root / "run.json", json.dumps(data, indent=1, ensure_ascii=False))

    def examples(self, split: str) -> list[dict[str, Any]]:
        """Rows of a split: train, search, select or test, each {"id", "inputs", "labels"}."""
        return read_lines(inside(self.root, f"examples/{split}.jsonl"))

    def stage_record(self, stage_id: str) -> dict[str, Any] | None:
        """What a stage ended with; None where it has not, or was skipped for want of a budget that the run no longer has."""
        path = inside(self.stage(stage_id), "record.json")
        record = _mapping(path) if path.is_file() else None
        if record is not None and not isinstance(record.get("status"), str):
            raise CommitError(f"{path} is damaged: it has no status. Delete it to have the stage made again.")
        outgrown = record and "budget" in record and record["budget"] != self.header()["config"]["budget"]
        return None if outgrown else record

    def opened(self) -> dict[str, str]:
        """Hashes of the stages of the present strategies that have an outcome: what test is opened for."""
        nodes = strategy.tree(self.config().strategy_steps())
        records = {node.id: self.stage_record(node.id) for node in nodes}
        return {name: record["hash"] for name, record in records.items() if record and record["status"] == "done"}

    def final_record(self) -> dict[str, Any] | None:
        """The evaluation on test, if it covers exactly the present outcomes."""
        record = self.stage_record("final")
        return record if record and record.get("opened") == self.opened() else None

    def plan(self) -> dict[str, Any] | None:
        """Expected cost by stage id, as the run began with it."""
        path = self.root / "plan.json"
        return _mapping(path) if path.is_file() else None

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Keep what each stage is expected to cost, in place of an earlier plan."""
        write_atomic(self.root / "plan.json", json.dumps(plan, indent=1))

    def pick(self) -> dict[str, Any] | None:
        """The committed pick, or None before it."""
        path = self.root / "pick.json"
        pick = _mapping(path) if path.is_file() else None
        if pick is not None and not (
            isinstance(pick.get("id"), str) and isinstance(pick.get("why"), str) and isinstance(pick.get("stages"), dict)
        ):
            raise CommitError(f"{path} is damaged: it lacks `id`, `why` or `stages`. Delete it to have the pick made again.")
        return pick


def _mapping(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises CommitError where it holds anything else."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise CommitError(f"{path} is damaged: it holds a {type(data).__name__}. Delete it to have that piece made again.")
    return data


def refuse_urls(root: str | Path) -> None:
    """Raise RunDirError for a place in an object store, which would else become a folder of that name."""
    if URL.match(str(root)):
        raise RunDirError(
            f"{root} is no folder, and of object stores only S3-compatible ones are known, for `run`, `submit`, `status`, "
            "`report`, `ask`, `fork` and `stop`. Name a folder, local or on storage that all nodes mount, or s3://BUCKET/FOLDER."
        )


def check_writable(root: Path) -> None:
    """Raise RunDirError where the directory cannot be written."""
    refuse_urls(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunDirError(f"{root} cannot be written ({error.strerror}). Name another folder with --run-dir.") from None


def _is_free(key: str) -> bool:
    # Resources also of a step, and of the engines of a proposer, a teacher or another model; of a proposer where its key lies.
    own = re.search(r"(^|\.)(resources|proposer\.api_key_file)(\.|$)", key)
    return bool(own) or any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configs where a result may depend on it, in words."""
    leaves = _leaves(old, new, "")
    return [
        f"{key}: the run has {_short(leaves[key][0])}, you ask for {_short(leaves[key][1])}" for key in changed_keys(old, new)
    ]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys, dotted, in which two configs differ where a result may depend on it. A step that is new changes none."""
    return [
        key
        for key, (a, b) in sorted(_leaves(old, new, "").items())
        if a != b and not _is_free(key) and not (_is_step(key) and a is None)
    ]


def _is_step(key: str) -> bool:
    return key.startswith("steps.") and key.count(".") == 1


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def _leaves(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {*old, *new}:
            found.update(_leaves(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key))
        return found
    return {prefix: (old, new)}
