"""A LoRA adapter that changes nothing: to see whether engines load its shape before one is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from bt_ray.config import WeightStep
from bt_ray.lm.modules import adapted, linear_shapes
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import adapter_id, content_hash


def blank_adapter(step: WeightStep, base: Weights, folder: Path) -> Weights:
    """Write an adapter of the step's rank and targets into `folder`; its B is zero, so the base's canary is its own."""
    import numpy
    from safetensors.numpy import save_file

    tensors = {}
    for name, (rows, columns) in adapted(step, linear_shapes(base.model_dir)).items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = numpy.ones((step.lora_rank, columns), dtype=numpy.float32)
        tensors[f"{key}.lora_B.weight"] = numpy.zeros((rows, step.lora_rank), dtype=numpy.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    modules = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": step.lora_rank, "lora_alpha": step.lora_alpha}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": modules, "bias": "none"}))
    # Merged into the base it would be the base: an engine without run-time LoRA reloads those tensors.
    own_id = adapter_id(base.embedding_id, content_hash(folder))
    return replace(base, id=own_id, kind="lora", adapter_dir=str(folder), model_hash=base.id)
