from __future__ import annotations

import subprocess
import sys

import pytest

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.lm import node_cache
from bt_ray.lm.types import Weights
from bt_ray.training.job import TrainJob
from bt_ray.training.run import worker_env
from bt_ray.training.sft import (
    MAX_TREE_TOKENS,
    TrainShape,
    accumulation_steps,
    adapter_mismatch,
    check_layers,
    deepspeed_config,
    lora_kwargs,
    micro_batch_size,
    sft_kwargs,
    tree_fits,
)
from bt_ray.training.worker import continues_adapter, start_dir

CPU = TrainShape("/out", seed=3, gpu=False)


def flat(step, shape=CPU):
    """Every setting that a step decides, as one flat dict."""
    settings = {**sft_kwargs(step, shape), **{f"lora.{key}": value for key, value in lora_kwargs(step).items()}}
    deepspeed = settings.pop("deepspeed")
    for key, value in deepspeed.items():
        settings[f"ds.{key}"] = value
    return settings


def changed(**fields):
    before, after = flat(WeightStep()), flat(WeightStep(**fields))
    return {key: after[key] for key in after if before.get(key) != after[key]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epochs": 5}, {"num_train_epochs": 5}),
        ({"learning_rate": 0.25}, {"learning_rate": 0.25}),
        ({"warmup_share": 0.5}, {"warmup_steps": 0.5}),
        ({"scheduler": "cosine"}, {"lr_scheduler_type": "cosine"}),
        ({"scheduler": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
        ({"global_batch_size": 8}, {"per_device_train_batch_size": 8, "ds.train_micro_batch_size_per_gpu": 8}),
        (
            {"micro_batch_size": 1},
            {
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 4,
                "ds.train_micro_batch_size_per_gpu": 1,
                "ds.gradient_accumulation_steps": 4,
            },
        ),
        ({"num_workers": 2}, {"per_device_train_batch_size": 2, "ds.train_micro_batch_size_per_gpu": 2}),
        ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "ds.gradient_clipping": 0.5}),
        ({"zero_stage": 0}, {"ds.zero_optimization": {"stage": 0}}),
        ({"zero_stage": 3}, {"ds.zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}),
        ({"lora_rank": 8}, {"lora.r": 8}),
        ({"lora_alpha": 8.0}, {"lora.lora_alpha": 8.0}),
        ({"lora_dropout": 0.1}, {"lora.lora_dropout": 0.1}),
        ({"target_modules": ("q_proj", "v_proj")}, {"lora.target_modules": ["q_proj", "v_proj"]}),
        (
            {"target_modules": ("q_proj",), "layers": (3, 1)},
            {"lora.target_modules": ["q_proj"], "lora.layers_to_transform": [1, 3]},
        ),
        (
            {"validation_share": 0.2},
            {
                "eval_strategy": "epoch",
                "per_device_eval_batch_size": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
                "greater_is_better": False,
            },
        ),
        (
            {"num_workers": 2, "micro_batch_size": 1},
            {
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "ds.train_micro_batch_size_per_gpu": 1,
                "ds.gradient_accumulation_steps": 2,
            },
        ),
        ({"zero_stage": 1}, {"ds.zero_optimization": {"stage": 1}}),
        # decided elsewhere: the rows, the start weights, Ray Train
        ({"row_prompts": "optimised", "samples_per_example": "best", "init": "base"}, {}),
        ({"max_failures": 7, "max_length": 99, "tuning": "full"}, {}),
        ({"deduplicate": True, "balance": "upsample", "max_train_tokens": 9}, {}),
        ({"dpo_beta": 0.5, "dpo_loss": "ipo", "token_weight": 1.0, "max_pairs_per_call": 3}, {}),
    ],
)
def test_each_field_changes_what_it_documents_and_nothing_else(fields, expected):
    assert changed(**fields) == expected


def test_the_batch_of_an_optimiser_step_is_the_global_batch():
    step = WeightStep(global_batch_size=24, num_workers=3, micro_batch_size=2)
    assert micro_batch_size(step) == 2 and accumulation_steps(step) == 4
    assert micro_batch_size(step) * accumulation_steps(step) * step.num_workers == 24


def test_a_cpu_trains_in_float32_and_a_gpu_in_bfloat16():
    cpu, gpu = flat(WeightStep()), flat(WeightStep(), TrainShape("/out", 3, gpu=True))
    different = {key: (cpu[key], gpu[key]) for key in cpu if cpu[key] != gpu[key]}
    assert different == {
        "use_cpu": (True, False),
        "bf16": (False, True),
        "ds.bf16": ({"enabled": False}, {"enabled": True}),
        "gradient_checkpointing": (False, True),
        "dataloader_pin_memory": (False, True),
    }


def test_the_seed_decides_the_draws_and_the_order_of_the_rows():
    settings = sft_kwargs(WeightStep(), CPU)
    assert settings["seed"] == settings["data_seed"] == 3


def test_nothing_is_cut_hidden_or_sent_anywhere():
    settings = sft_kwargs(WeightStep(), CPU)
    assert settings["max_length"] is None and settings["packing"] is False and settings["completion_only_loss"] is True
    assert settings["logging_nan_inf_filter"] is False and settings["logging_steps"] == 1
    assert settings["report_to"] == "none" and settings["save_strategy"] == "epoch"


def test_deepspeed_gets_no_optimizer_of_its_own():
    assert "optimizer" not in deepspeed_config(WeightStep(), gpu=False)
    assert sft_kwargs(WeightStep(), CPU)["optim"] == "adamw_torch"


def test_trees_only_where_the_maths_is_the_same():
    step = WeightStep()
    assert tree_fits(step, "llama", False, 100)
    assert not tree_fits(step, "gemma3_text", False, 100)
    assert not tree_fits(step, "qwen2", True, 100)
    assert not tree_fits(WeightStep(lora_dropout=0.1), "llama", False, 100)
    assert not tree_fits(step, "llama", False, MAX_TREE_TOKENS // 4 + 1)
    assert tree_fits(WeightStep(micro_batch_size=1), "llama", False, MAX_TREE_TOKENS // 4 + 1)


def test_an_adapter_of_another_shape_cannot_be_continued():
    assert adapter_mismatch(WeightStep(), {"r": 16, "lora_alpha": 32}) is None
    assert "lora_rank: 8" in str(adapter_mismatch(WeightStep(), {"r": 8, "lora_alpha": 32}))
    assert "lora_alpha: 16" in str(adapter_mismatch(WeightStep(), {"r": 16, "lora_alpha": 16}))


def test_an_adapter_on_other_layers_cannot_be_continued():
    shape = {"r": 16, "lora_alpha": 32}
    some = WeightStep(layers=(2, 0))
    assert adapter_mismatch(some, {**shape, "layers_to_transform": [0, 2]}) is None
    assert "layers all, the step asks for [0, 2]" in str(adapter_mismatch(some, shape))
    assert "layers [1], the step asks for all" in str(adapter_mismatch(WeightStep(), {**shape, "layers_to_transform": [1]}))


def test_layers_of_all_linear_name_the_modules_and_must_exist():
    step = WeightStep(layers=(1,))
    settings = lora_kwargs(step, ["up_proj", "q_proj", "q_proj"])
    assert settings["target_modules"] == ["q_proj", "up_proj"] and settings["layers_to_transform"] == [1]
    check_layers(step, 2)
    check_layers(WeightStep(), 1)
    with pytest.raises(TrainingError, match=r"layers \[1\] do not exist: the model has 1 layers"):
        check_layers(step, 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "vLLM does not serve DoRA adapters"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"bias": "all"}, "train biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"lora_rank": 12}, "lora_rank 12 cannot be served by vLLM"),
        ({"layers": [-1]}, "greater than or equal to 0"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1], "tuning": "full"}, "only adapters can be limited"),
        ({"layers": [1], "target_modules": ".*proj"}, "target_modules as a list"),
        ({"validation_share": 1.0}, "less than 1"),
        ({"early_stopping_patience": 2}, "set validation_share"),
    ],
)
def test_what_cannot_be_served_or_makes_no_sense_is_refused_with_its_reason(fields, says):
    with pytest.raises(ValueError, match="validation error") as error:
        WeightStep.model_validate(fields)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("kind", "tuning", "init", "folder", "continues"),
    [
        ("base", "lora", "current", "/base", False),
        ("lora", "lora", "current", "/base", True),
        ("lora", "lora", "base", "/base", False),
        ("lora", "full", "current", "/model", False),
        ("lora", "full", "base", "/base", False),
        ("full", "full", "current", "/model", False),
        ("full", "lora", "current", "/model", False),
        ("full", "full", "base", "/base", False),
    ],
)
def test_where_training_starts(kind, tuning, init, folder, continues):
    start = Weights(id="1", kind=kind, model_dir="/base" if kind == "base" else "/model", base_dir="/base")
    job = TrainJob("/rows", start, {}, "/out", "/scratch", "n", 0, 100)
    step = WeightStep(tuning=tuning, init=init)
    assert start_dir(step, job) == folder
    assert continues_adapter(step, job) is continues


def test_a_job_survives_json():
    start = Weights(id="1", kind="base", model_dir="/b", base_dir="/b")
    job = TrainJob("/rows", start, {"epochs": 1}, "/out", "/scratch", "n", 0, 100)
    assert TrainJob.from_json(job.to_json()) == job


def test_workers_share_the_cores_and_stay_off_the_hub():
    env = worker_env(num_workers=2, gpu=False, cores=8)
    assert env["OMP_NUM_THREADS"] == "4" and env["DS_ACCELERATOR"] == "cpu" and env["HF_HUB_OFFLINE"] == "1"
    assert "DS_ACCELERATOR" not in worker_env(num_workers=2, gpu=True, cores=8)
    assert worker_env(num_workers=4, gpu=False, cores=2)["OMP_NUM_THREADS"] == "1"


def test_the_process_that_starts_a_fine_tune_loads_no_torch():
    code = (
        "import sys; import bt_ray.training.run; sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'vllm', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_starts_from_the_nodes_own_copy(monkeypatch):
    start = Weights(id="1", kind="lora", model_dir="/model", base_dir="/base", embedding_id="2", model_hash="3")
    job = TrainJob("/rows", start, {}, "/out", "/scratch", "n", 0, 100)
    monkeypatch.setattr(node_cache, "_nearest", lambda folder, expected: f"/cache/{expected} of {folder}")
    assert start_dir(WeightStep(tuning="lora"), job) == "/cache/2 of /base"
    assert start_dir(WeightStep(tuning="full"), job) == "/cache/3 of /model"
