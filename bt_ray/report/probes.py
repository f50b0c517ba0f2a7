"""The probe that `bt-ray plan` measured, kept on this machine: a run of the same program begins with its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bt_ray.config import RunConfig
from bt_ray.errors import CommitError
from bt_ray.report.price import Probe
from bt_ray.resources import usable_cores
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.identity import content_hash

PARTS = ("program", "metric", "weights", "vanilla")  # of a run's identity: what a probe's calls and passes follow from


def keep_probe(config: RunConfig, identity: Mapping[str, Any], probe: Probe) -> None:
    """Write it down. A home that cannot be written keeps none: the run is then planned from its sizes."""
    try:
        write_atomic(_path(config, identity), json.dumps(asdict(probe)))
    except OSError:
        return


def kept_probe(config: RunConfig, identity: Mapping[str, Any]) -> Probe | None:
    """What was measured here of this program, metric, model and training examples, with these engines; None without."""
    path = _path(config, identity)
    try:
        return Probe(**read_json(path)) if path.is_file() else None
    except (CommitError, OSError, TypeError):  # damaged, or of another version: no probe
        return None


def _path(config: RunConfig, identity: Mapping[str, Any]) -> Path:
    from bt_ray.lm.models import home

    key = {
        **{name: identity.get(name) for name in PARTS},
        "train": (identity.get("splits") or {}).get("train"),
        "adapter": config.adapter,
        "rollout": config.rollout.model_dump(mode="json", exclude={"samples"}),
        "engine": config.engine.model_dump(mode="json"),
        "models": {name: model.model_dump(mode="json") for name, model in config.models.items()},
        "cores": usable_cores(),
    }
    return home() / "probes" / f"{content_hash(key)}.json"
