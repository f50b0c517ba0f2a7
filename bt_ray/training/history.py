"""What the trainer's log says: one entry per optimiser step, and when to stop. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Key in the trainer's log -> name in the history.
KEYS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
}


def history(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per optimiser step, from the trainer's log; the last step of an epoch that was
    followed by a measurement on the held-out rows has its `eval_loss` too."""
    entries: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "loss" in entry:
            values = {name: float(entry[key]) for key, name in KEYS.items() if key in entry}
            entries[entry["step"]] = {"step": entry["step"], "epoch": float(entry["epoch"]), **values}
        elif "eval_loss" in entry and entry["step"] in entries:
            entries[entry["step"]]["eval_loss"] = float(entry["eval_loss"])
    return list(entries.values())


def held_out_losses(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """The held-out losses of a trainer's log, one per epoch."""
    return [float(entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def stops_early(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` held-out losses (one per epoch) are all no lower than the best before them."""
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
