"""Peak memory of a stage, against sums by hand."""

import json

import pytest

from bt_ray.lm.settings import GIB, Machine
from bt_ray.report import memory
from bt_ray.report.estimate import estimates
from tests.support.plans import SIZES, config, nodes

MODEL = memory.ModelSize(1000 * 2**20, {"model.layers.0.self_attn.q_proj": (512, 512), "model.layers.1.mlp.up_proj": (1536, 512)})
CPU = Machine(memory_gib=24.0)


def w_step(**changes):
    return config(steps={"w": {"method": "sft", **changes}}, strategy="w").steps["w"]


def test_adapter_weights_by_target_and_layer():
    assert memory.adapter_weights(MODEL, w_step()) == 16 * (1024 + 2048)
    assert memory.adapter_weights(MODEL, w_step(target_modules=["q_proj"])) == 16 * 1024
    assert memory.adapter_weights(MODEL, w_step(layers=[1])) == 16 * 2048


def test_training_memory_by_hand():
    count = MODEL.num_weights
    assert memory.training_bytes(MODEL, w_step(), gpu=False) == 4 * count + 16 * 16 * 3072
    full = {"tuning": "full", "zero_stage": 0}
    assert memory.training_bytes(MODEL, w_step(**full), gpu=False) == (4 + 4 + 8) * count
    assert memory.training_bytes(MODEL, w_step(**full), gpu=True) == (2 + 2 + 8 + 4) * count
    shared = {"tuning": "full", "num_workers": 4, "zero_stage": 2}
    assert memory.training_bytes(MODEL, w_step(**shared), gpu=False) == (4 + 4 / 4 + 8 / 4) * count
    assert memory.training_bytes(MODEL, w_step(**{**shared, "zero_stage": 3}), gpu=False) == (4 + 4 + 8) / 4 * count


def test_peak_memory_on_a_cpu_and_on_a_gpu():
    plan = config(strategy="p -> w")
    weights = 1000 * 2**20 * 4 / GIB
    found = memory.peak_memory(plan, MODEL, CPU)
    assert found.generate_gib == pytest.approx(weights + 2.4, abs=0.01)  # a tenth of 24 GiB for keys and values
    assert found.finetune_gib["w"] == pytest.approx(2 * weights + 2.4, abs=0.01)  # the engine stays up
    costs = estimates(nodes(plan), plan, SIZES, memory=found)
    assert (costs["p"].memory_gib, costs["p.w"].memory_gib) == (found.generate_gib, found.finetune_gib["w"])
    gpu = Machine(memory_gib=128.0, gpus=1)
    assert memory.peak_memory(plan, MODEL, gpu).generate_gib is None  # vLLM takes what the GPU has left
    held = memory.peak_memory(config(strategy="p -> w", engine={"kv_cache_gib": 4}), MODEL, gpu)
    assert held.generate_gib == pytest.approx(weights / 2 + 4, abs=0.01)
    assert held.finetune_gib["w"] == held.generate_gib  # the trainer needs less, and they take turns
    assert memory.peak_memory(config(engine={"tensor_parallel_size": 2}), MODEL, CPU).generate_gib is None


def test_size_of_a_model_on_disk(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    assert memory.model_size(tmp_path) is None
    save_file({"model.layers.0.up_proj.weight": numpy.zeros((128, 64), numpy.float16)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float16"}))
    found = memory.model_size(tmp_path)
    assert found.linear == {"model.layers.0.up_proj": (128, 64)}
    assert 128 * 64 <= found.num_weights < 128 * 64 + 200  # the header counts as some weights
