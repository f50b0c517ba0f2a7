"""Weights of tiny models: random adapters, and what a pool needs to know of a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bt_ray.lm import canary
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import adapter_id, content_hash, merge_adapter


def weights_of(kind: str, folder: str, base_dir: str) -> Weights:
    """The weights in `folder`, with their canary."""
    found = content_hash(folder)
    return Weights(found, kind, folder, base_dir, embedding_id=found, canary=canary.compute(folder))  # type: ignore[arg-type]


def merged_adapter(base: Weights, adapter_dir: str, merged_dir: Path) -> Weights:
    """The weights of an adapter, merged into `merged_dir`, with their canary."""
    merge_adapter(base.base_dir, adapter_dir, merged_dir)
    merged = weights_of("lora", str(merged_dir), base.base_dir)
    own_id = adapter_id(base.id, content_hash(adapter_dir))
    return replace(merged, id=own_id, adapter_dir=adapter_dir, embedding_id=base.id, model_hash=content_hash(merged_dir))


def random_adapter(base_dir: str, out: Path, seed: int = 3) -> str:
    """Write a LoRA adapter that changes all linear layers at random; returns its path."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(out)
    return str(out)
