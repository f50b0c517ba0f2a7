"""From trained tensors to Weights: the adapter or the model, merged, hashed, with its canary.

Everything is computed from the files on disk, so what is checked later is what was written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.lm import canary
from bt_ray.lm.types import CanaryCase, Weights
from bt_ray.lm.weights import adapter_id, content_hash, merge_adapter
from bt_ray.training.job import TrainJob

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def export(job: TrainJob, step: WeightStep, draft: Path) -> Weights:
    """Turn the trainer's saved `draft` into `out_dir/adapter` and `out_dir/merged`, or `out_dir/model`.

    Raises TrainingError if the trained model does not compute finite numbers. An earlier export in
    `out_dir` is replaced; each folder appears complete or not at all.
    """
    out = Path(job.out_dir)
    if step.tuning == "full":
        return _export_full(job, draft, out / "model")
    start = job.start
    on_tuned = start.kind == "full" and step.init == "current"
    base_dir = start.model_dir if on_tuned else start.base_dir
    if start.kind == "full" and not on_tuned:
        base_id = content_hash(base_dir)  # a fully tuned model does not know the id of the base it came from
    else:
        base_id = start.embedding_id or content_hash(base_dir)
    for name in [path.name for path in draft.iterdir() if path.name not in ADAPTER_FILES]:
        _remove(draft / name)
    _normalise(draft / "adapter_config.json", Path(base_dir).name)
    adapter, merged = out / "adapter", out / "merged"
    _remove(merged)
    _publish(draft, adapter)
    merge_adapter(base_dir, str(adapter), str(merged))
    return Weights(
        id=adapter_id(base_id, content_hash(adapter)),
        kind="lora",
        model_dir=str(merged),
        base_dir=base_dir,
        adapter_dir=str(adapter),
        embedding_id=base_id,
        canary=_canary(merged),
        model_hash=content_hash(merged),
    )


def _export_full(job: TrainJob, draft: Path, model: Path) -> Weights:
    for path in draft.glob("*.bin"):
        _remove(path)  # training_args.bin: a pickle that nobody needs
    _publish(draft, model)
    own_id = content_hash(model)
    return Weights(
        id=own_id,
        kind="full",
        model_dir=str(model),
        base_dir=job.start.base_dir,
        embedding_id=own_id,
        canary=_canary(model),
    )


def _canary(model_dir: Path) -> tuple[CanaryCase, ...]:
    cases = canary.compute(str(model_dir))
    if not all(math.isfinite(margin) for case in cases for margin in case.margins):
        raise TrainingError(
            f"fine-tune: the trained model in {model_dir} gives logits that are not finite: the last update broke it. "
            "Lower learning_rate."
        )
    return cases


def _normalise(path: Path, base_name: str) -> None:
    """Make equal adapters equal files: no absolute path, and module names in a fixed order."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(draft: Path, final: Path) -> None:
    _remove(final)
    os.replace(draft, final)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
