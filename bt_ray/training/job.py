"""What goes into a fine-tune and what comes out of it; plain values that travel as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bt_ray.lm.types import Weights


@dataclass(frozen=True)
class TrainJob:
    """One fine-tune.

    `rows_path`: jsonl of chat rows (`prompt`, `completion`, `predictor`, `example_id`, `sample`), or
    of preference pairs (`chosen` and `rejected` in place of `completion`).
    `step`: the fields of config.WeightStep. `name` holds the content hash of everything that
    decides the result: a second job of the same name and scratch_dir goes on where the first
    stopped. `scratch_dir` (checkpoints, which hold pickles, and logs) and `out_dir` (JSON and
    safetensors) must be reachable from every training node. `max_length`: tokens of a row.
    `device`: auto takes GPUs if the cluster has one for each worker.
    """

    rows_path: str
    start: Weights
    step: dict[str, Any]
    out_dir: str
    scratch_dir: str
    name: str
    seed: int
    max_length: int
    device: Literal["auto", "cpu", "gpu"] = "auto"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainJob:
        return cls(**{**data, "start": Weights.from_json(data["start"])})


@dataclass(frozen=True)
class TrainResult:
    """`history`: one entry per optimiser step (`step`, `epoch`, `loss` in nats per answer token,
    `learning_rate`, `grad_norm`; at the end of an epoch `eval_loss` where rows are held out; for
    preference pairs the loss of the method, with `reward_margin`, `reward_accuracy`, `chosen_logp`,
    `rejected_logp`). `trained_tokens`: tokens of the rows, prompts included, summed over the epochs.
    `counts`: rows `trained` on in an epoch, `held_out`, and `left_out` by max_train_tokens.
    `seconds`: wall clock of the whole call, start-up included."""

    weights: Weights
    history: list[dict[str, Any]]
    trained_tokens: int
    counts: dict[str, int]
    seconds: float
