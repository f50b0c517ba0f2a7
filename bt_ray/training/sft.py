"""Settings of fine-tuning: from a WeightStep to TRL, PEFT and DeepSpeed. Pure.

The training loop is one of TRL's trainers; what is decided here is every value that it is given.
`trainer_kwargs` are those of every method, `sft_kwargs` those of supervised fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError

# Architectures whose every layer is plain causal self-attention with rotary positions: a custom mask and custom
# positions then describe a tree of tokens exactly. (A sliding window or a recurrent state would not.)
TREE_MODEL_TYPES = ("llama", "qwen2", "qwen3")
# A tree of T tokens costs T * T attention scores; beyond this the saving in the linear layers is used up.
MAX_TREE_TOKENS = 8192


@dataclass(frozen=True)
class TrainShape:
    """What of a fine-tune does not come from the config: where it runs, and from which seed."""

    output_dir: str
    seed: int
    gpu: bool


def micro_batch_size(step: WeightStep) -> int:
    """Rows of one forward pass of one worker."""
    return step.micro_batch_size or step.global_batch_size // step.num_workers


def accumulation_steps(step: WeightStep) -> int:
    """Forward passes of one worker per optimiser step."""
    return step.global_batch_size // step.num_workers // micro_batch_size(step)


def deepspeed_config(step: WeightStep, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's JSON. It holds no optimizer block: that would compile DeepSpeed's own Adam, and the
    same torch AdamW under every stage is what makes the stages' losses equal."""
    zero: dict[str, Any] = {"stage": step.zero_stage}
    if step.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # in whatever dtype, despite its name
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size(step),
        "gradient_accumulation_steps": accumulation_steps(step),
        "gradient_clipping": step.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": gpu},
        "steps_per_print": 10**9,
    }


def sft_kwargs(step: WeightStep, shape: TrainShape) -> dict[str, Any]:
    """Arguments of trl.SFTConfig."""
    return {**trainer_kwargs(step, shape), "completion_only_loss": True, "packing": False}


def trainer_kwargs(step: WeightStep, shape: TrainShape) -> dict[str, Any]:
    """Arguments that the configs of TRL's trainers share.

    `max_length` is None on purpose: rows are measured before training, and none is ever cut.
    """
    return {
        "output_dir": shape.output_dir,
        "num_train_epochs": step.epochs,
        "learning_rate": step.learning_rate,
        "warmup_steps": step.warmup_share,  # below 1 it is a share of all optimiser steps
        # transformers' "constant" ignores the warm-up
        "lr_scheduler_type": "constant_with_warmup" if step.scheduler == "constant" else step.scheduler,
        "per_device_train_batch_size": micro_batch_size(step),
        "gradient_accumulation_steps": accumulation_steps(step),
        "max_grad_norm": step.max_grad_norm,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "deepspeed": deepspeed_config(step, shape.gpu),
        "use_cpu": not shape.gpu,
        "bf16": shape.gpu,
        "gradient_checkpointing": shape.gpu,  # a CPU has memory and no time
        "max_length": None,
        "seed": shape.seed,
        "data_seed": shape.seed,
        "save_strategy": "epoch",
        "save_total_limit": 1,  # Ray Train keeps the uploaded ones
        **evaluation_kwargs(step),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": shape.gpu,
    }


def evaluation_kwargs(step: WeightStep) -> dict[str, Any]:
    """Whether and how the held-out rows are measured: after each epoch, and the best epoch's weights come out."""
    if not step.validation_share:
        return {"eval_strategy": "no"}
    return {
        "eval_strategy": "epoch",
        # one row a batch: every row counts once, over any number of workers
        "per_device_eval_batch_size": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def lora_kwargs(step: WeightStep, linear_modules: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of peft.LoraConfig for a new adapter.

    `linear_modules`: last names of the linear modules in the model's layers, which stand in for
    `all-linear` where only some layers get an adapter: PEFT then wants the names.
    """
    targets = step.target_modules
    settings: dict[str, Any] = {
        "r": step.lora_rank,
        "lora_alpha": step.lora_alpha,
        "lora_dropout": step.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
    }
    if step.layers is not None:
        settings["layers_to_transform"] = sorted(step.layers)
        if isinstance(targets, str):
            settings["target_modules"] = sorted(set(linear_modules))
    return settings


def check_layers(step: WeightStep, num_layers: int) -> None:
    """Raise TrainingError unless a model of `num_layers` layers has all of `step.layers`."""
    missing = [layer for layer in step.layers or () if layer >= num_layers]
    if missing:
        raise TrainingError(
            f"fine-tune: layers {missing} do not exist: the model has {num_layers} layers, 0 to {num_layers - 1}. Change layers."
        )


def tree_fits(step: WeightStep, model_type: str, sliding_window: bool, longest_row: int) -> bool:
    """Whether batches may be packed as trees (see `tokens`): the maths is the same and the memory bounded.

    `longest_row` in tokens. Dropout draws per token, so a token shared by rows would be dropped for all of them.
    """
    if model_type not in TREE_MODEL_TYPES or sliding_window or (step.tuning == "lora" and step.lora_dropout > 0):
        return False
    return longest_row * micro_batch_size(step) <= MAX_TREE_TOKENS


def adapter_mismatch(step: WeightStep, adapter_config: dict[str, Any]) -> str | None:
    """Why training cannot go on from the adapter with this adapter_config.json, or None.

    An adapter keeps its shape: another rank would need other matrices. alpha is part of what its
    weights mean, so it cannot change either.
    """
    for field, mine in (("r", step.lora_rank), ("lora_alpha", step.lora_alpha)):
        theirs = adapter_config.get(field)
        if theirs != mine:
            name = "lora_rank" if field == "r" else field
            return (
                f"the current adapter has {name} {theirs}, the step asks for {mine}. "
                f"Set {name}: {theirs} to go on from it, or init: base to start a new adapter."
            )
    layers = adapter_config.get("layers_to_transform")
    if sorted(layers or ()) != sorted(step.layers or ()):
        return (
            f"the current adapter is on layers {layers or 'all'}, the step asks for {sorted(step.layers or ()) or 'all'}. "
            "Set layers to the same to go on from it, or init: base to start a new adapter."
        )
    return None
