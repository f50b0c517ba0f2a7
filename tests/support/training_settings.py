"""Settings and rows of the fine-tunes that `tests/ray/test_training.py` makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bt_ray.lm.types import Weights
from bt_ray.training.job import TrainJob
from tests.support.tiny_model import make_tiny_model
from tests.support.training_runs import chat_rows, pair_rows

LORA: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 8, "lora_rank": 8, "lora_alpha": 16, "zero_stage": 2}
# The first epoch (one step, at learning rate 0 while warming up) is sound; the next updates are not.
DIVERGING = {**LORA, "learning_rate": 1e30, "epochs": 6, "global_batch_size": 8, "warmup_share": 0.4, "scheduler": "constant"}
FULL = {"tuning": "full", "learning_rate": 1e-3, "epochs": 4}
DPO = {"method": "dpo", "epochs": 6}
IPO = {**DPO, "dpo_loss": "ipo", "dpo_beta": 0.25}
FULL_DPO = {**DPO, "tuning": "full", "learning_rate": 1e-3}
# A start at learning rate 0, then steps so large that what is not trained on gets worse.
HELD_OUT: dict[str, Any] = {
    **DIVERGING,
    "learning_rate": 1.0,
    "epochs": 8,
    "validation_share": 0.25,
    "early_stopping_patience": 2,
}


def held_out_rows() -> list[dict[str, Any]]:
    """The chat rows, in which the examples that will be held out have an answer that no other has."""
    from bt_ray.training.choices import hold_out

    rows = list(chat_rows())
    held = hold_out([row["example_id"] for row in rows], HELD_OUT["validation_share"], seed=0)
    other = [{"role": "assistant", "content": "Natalia sold 48 clips in April and half as many in May"}]
    return [{**row, "completion": other} if row["example_id"] in held else row for row in rows]


ROWS: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {"chat": chat_rows, "pairs": pair_rows, "held_out": held_out_rows}


def tiny_weights(folder: Path) -> Weights:
    """The tiny model, written to `folder`."""
    from bt_ray.lm.weights import content_hash

    path = make_tiny_model(folder)
    own_id = content_hash(path)
    return Weights(id=own_id, kind="base", model_dir=path, base_dir=path, embedding_id=own_id)


def job_maker(root: Path, base: Weights) -> Callable[..., TrainJob]:
    """Makes jobs below `root` by their name, what their step has beside LORA's values, and the start weights.

    Further: `rows`, a name of ROWS, and `max_length`.
    """
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")

    def make(name: str, step: dict[str, Any] | None = None, start: Weights | None = None, **more: Any) -> TrainJob:
        return TrainJob(
            rows_path=str(root / f"{more.get('rows', 'chat')}.jsonl"),
            start=start or base,
            step={**LORA, **(step or {})},
            out_dir=str(root / "out" / name),
            scratch_dir=str(root / "scratch"),
            name=name,
            seed=0,
            max_length=more.get("max_length", 128),
            device="cpu",
        )

    return make
