"""Peak memory of a stage, against sums by hand."""

import json

import pytest

from bt_ray.lm.settings import GIB, Machine
from bt_ray.report import memory
from bt_ray.report.estimate import estimates
from tests.support.plans import SIZES, config, nodes

MODEL = memory.ModelSize(1000 * 2**20, {"model.layers.0.self_attn.q_proj": (512, 512), "model.layers.1.mlp.up_proj": (1536, 512)})
BIG = memory.ModelSize(3 * MODEL.num_weights, MODEL.linear)
ONE = memory.ModelSizes({"": MODEL})
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
    found = memory.peak_memory(plan, ONE, CPU)
    assert found.generate_gib == pytest.approx(weights + 2.4, abs=0.01)  # a tenth of 24 GiB for keys and values
    assert found.step_gib["w"] == pytest.approx(2 * weights + 2.4, abs=0.01)  # the engine stays up
    costs = estimates(nodes(plan), plan, SIZES, memory=found)
    assert (costs["p"].memory_gib, costs["p.w"].memory_gib) == (found.generate_gib, found.step_gib["w"])
    gpu = Machine(memory_gib=128.0, gpus=1)
    assert memory.peak_memory(plan, ONE, gpu).generate_gib is None  # vLLM takes what the GPU has left
    held = memory.peak_memory(config(strategy="p -> w", engine={"kv_cache_gib": 4}), ONE, gpu)
    assert held.generate_gib == pytest.approx(weights / 2 + 4, abs=0.01)
    assert held.step_gib["w"] == held.generate_gib  # the trainer needs less, and they take turns
    assert memory.peak_memory(config(engine={"tensor_parallel_size": 2}), ONE, CPU).generate_gib is None


def several(**engine):
    """A second model of the program, a proposer and a teacher on engines of their own; caches of a GiB each."""
    engine = {"kv_cache_gib": 1, **engine}
    own = {"proposer": {"model": "writer", "engine": engine}, "teacher": {"model": "elder", "engine": engine}}
    return config(
        models={"second": "big"}, assign={"a*": "second"}, engine=engine, strategy="p -> q -> w",
        steps={"p": {"optimizer": "opro", **own}, "q": {"optimizer": "opro"}, "w": {"method": "sft", "tuning": "full", "zero_stage": 0}},
        controls={"equal_cost": "p"},
    )  # fmt: skip


def test_engines_that_are_up_together_count_together_on_a_cpu():
    weights = 1000 * 2**20 * 4 / GIB  # of MODEL; BIG has three times as many
    plan = several()
    known = memory.ModelSizes({"": MODEL, "second": BIG}, {"writer": MODEL, "elder": BIG})
    costs = estimates(nodes(plan), plan, SIZES, memory=memory.peak_memory(plan, known, CPU))
    own = (weights + 1) + (3 * weights + 1)  # the engines of both models of the program
    expected = {
        "vanilla": own,
        "p": own + 3 * weights + 1,  # the teacher's engines, larger than the proposer's, which come when they have gone
        "p.q": own,
        "p.q.w": own + 4 * 3 * weights,  # models are tuned one at a time; the larger with its gradients and moments
        "final": own + 3 * weights + 1,  # the control runs the prompt step again
    }
    assert {name: costs[name].memory_gib for name in expected} == pytest.approx(expected, abs=0.01)
    twice = several(replicas={"min": 2, "max": 2})
    assert memory.peak_memory(twice, known, CPU).generate_gib == pytest.approx(2 * own, abs=0.01)


def test_on_gpus_engines_have_their_own_and_the_fullest_counts():
    gpus = Machine(memory_gib=128.0, gpus=4)
    known = memory.ModelSizes({"": MODEL, "second": MODEL}, {"writer": MODEL, "elder": BIG})
    weights = 1000 * 2**20 * 2 / GIB  # in bfloat16
    found = memory.peak_memory(several(), known, gpus)
    assert found.generate_gib == pytest.approx(weights + 1, abs=0.01)
    assert found.step_gib["p"] == pytest.approx(3 * weights + 1, abs=0.01)


def test_a_model_whose_files_are_not_here_makes_its_own_stages_unknown_alone():
    plan = several()
    own = {"": MODEL, "second": BIG}
    found = memory.peak_memory(plan, memory.ModelSizes(own, {"elder": BIG}), CPU)
    assert found.step_gib["p"] is None and found.step_gib["w"] and found.generate_gib
    assert found.of_stage(["q"]) == found.generate_gib and found.of_stage(["q", "p"]) is None
    lacking = memory.peak_memory(plan, memory.ModelSizes({"": MODEL}), CPU)
    assert lacking.generate_gib is None and lacking.step_gib["w"] is None


def test_the_folders_of_all_models_are_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "_prepared_dir", lambda model, base_dir: f"/prepared/{model}")
    monkeypatch.setattr(memory, "model_size", lambda folder: seen.append(folder) or MODEL)
    monkeypatch.setattr(memory.Machine, "here", classmethod(lambda cls: CPU))
    parts = [["a*", {"model": "second", "model_dir": "/m/second"}], ["*", {"model_dir": "/m/own"}]]
    found = memory.memory_here(several(), {"model_dir": "/m/own", "parts": parts})
    assert seen == ["/m/own", "/m/second", "/prepared/writer", "/prepared/elder"]
    assert found.step_gib["p"] > found.generate_gib > 2 * 1000 * 2**20 * 4 / GIB
    one = config()
    assert memory.memory_here(one, {"model_dir": "/m/own"}).generate_gib


def test_size_of_a_model_on_disk(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    assert memory.model_size(tmp_path) is None
    save_file({"model.layers.0.up_proj.weight": numpy.zeros((128, 64), numpy.float16)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float16"}))
    found = memory.model_size(tmp_path)
    assert found.linear == {"model.layers.0.up_proj": (128, 64)}
    assert 128 * 64 <= found.num_weights < 128 * 64 + 200  # the header counts as some weights
