"""A new run from an old one: another config, with all committed work that the change does not touch.

Steps are content-addressed, so every committed one can be taken along: those that the new config
asks for again are found, the others lie unused. Stages whose path holds no changed part keep their
records.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from bt_ray import strategy
from bt_ray.config_file import with_overrides
from bt_ray.errors import RunDirError
from bt_ray.preflight import Prepared
from bt_ray.running import prepare_in
from bt_ray.runs.inside import inside
from bt_ray.runs.opening import changed_searchers, open_run
from bt_ray.runs.run_dir import IDENTITY_PARTS, RunDir, changed_keys


@dataclass(frozen=True)
class Fork:
    """What a fork keeps, by stage path, and what is run anew; `changed` are the keys that differ."""

    config_path: Path
    kept: tuple[str, ...]
    anew: tuple[str, ...]
    changed: tuple[str, ...]


def fork(source: RunDir, target: Path, overrides: tuple[str, ...]) -> Fork:
    """Make the run `target` of the source's config with `key.sub=value` overrides, and link the committed steps.

    Raises RunDirError where `target` is not empty, ConfigError for overrides that make no config.
    """
    if target.exists() and any(target.iterdir()):
        raise RunDirError(f"{target} is not empty. Name a new folder for the fork.")
    config = with_overrides(source.config(), overrides)
    # Rows and programs from Python are taken from the source. Files are read again, as `bt-ray run` will read them.
    run = open_run(target, _with_own_pickle(prepare_in(config, source), target))
    changed = changed_keys(source.header()["config"], run.header()["config"])
    old, new = source.header()["identity"], run.header()["identity"]
    changed += [part for part in IDENTITY_PARTS if old[part] != new[part]]
    changed += [f"steps.{name}.optimizer" for name in changed_searchers(source, new)]
    for step in sorted((source.root / "steps").glob("*/record.json")):
        _link_tree(step.parent, run.root / "steps" / step.parent.name)
    nodes = strategy.tree(config.strategy_steps())
    kept = [node for node in nodes if not touched(node, changed) and _keep_record(source, run, node)]
    path = run.root / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Fork(path, tuple(node.path for node in kept), tuple(n.path for n in nodes if n not in kept), tuple(changed))


def _with_own_pickle(prepared: Prepared, target: Path) -> Prepared:
    """A pickled program, which `prepare` has checked and loaded, is copied: the source may be deleted later."""
    pickle_path = prepared.identity["pickle_path"]
    if not pickle_path:
        return prepared
    copy = target.resolve() / "scratch" / Path(pickle_path).name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(pickle_path, copy)  # with its mode: only the owner may read it
    return replace(prepared, identity={**prepared.identity, "pickle_path": str(copy)})


def touched(node: strategy.StageNode, changed: list[str]) -> bool:
    """Whether a changed key can change the outcome of a stage: a step on its path, or what all stages share."""
    for key in changed:
        parts = key.split(".")
        if parts[0] == "controls":  # beside the stages
            continue
        if parts[0] != "steps" or parts[1] in node.steps:
            return True
    return False


def _keep_record(source: RunDir, run: RunDir, node: strategy.StageNode) -> bool:
    record = source.stage(node.id) / "record.json"
    if not record.is_file():
        return False
    run.stage(node.id).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(record, run.stage(node.id) / "record.json")
    return True


def _link_tree(source: Path, target: Path) -> None:
    """Hard links, which take no space; copies where the file system has none. The record last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == "record.json")
    for path in files:
        inside(source, str(path.relative_to(source)))
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, new)
        except OSError:
            shutil.copyfile(path, new)
