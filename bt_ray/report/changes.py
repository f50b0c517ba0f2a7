"""Which examples a stage fixed or broke against the stage before. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Changes:
    """Example ids by what the stage did to their score, the largest change first, and how many were compared."""

    fixed: tuple[str, ...]
    broken: tuple[str, ...]
    compared: int


def stage_changes(stage: Mapping[str, Any], parent: Mapping[str, Any]) -> Changes | None:
    """Examples that score higher (fixed) or lower (broken) than at the parent. None if they share none."""
    after, before = stage.get("predictions") or {}, parent.get("predictions") or {}
    gains = {}
    for key in sorted(after.keys() & before.keys()):
        new, old = after[key].get("score"), before[key].get("score")
        if new is not None and old is not None:
            gains[key] = new - old
    if not gains:
        return None
    fixed = sorted((key for key, gain in gains.items() if gain > 0), key=lambda key: -gains[key])
    broken = sorted((key for key, gain in gains.items() if gain < 0), key=lambda key: gains[key])
    return Changes(tuple(fixed), tuple(broken), len(gains))
