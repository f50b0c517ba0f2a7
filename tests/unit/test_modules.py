import pytest
from safetensors.numpy import load_file

from bt_ray.config import WeightStep
from bt_ray.errors import ModelError
from bt_ray.lm.blank_adapter import blank_adapter
from bt_ray.lm.modules import linear_names, unmatched_targets
from bt_ray.lm.types import Weights
from tests.support.tiny_model import make_tiny_model


def test_linear_layers_of_a_model_without_loading_it(tmp_path):
    names = linear_names(make_tiny_model(tmp_path / "model"))
    assert "model.layers.0.self_attn.q_proj" in names
    assert not [name for name in names if "embed" in name or "norm" in name or "lm_head" in name]


def test_targets_match_by_name_or_ending():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert unmatched_targets(["q_proj", "mlp.up_proj"], names) is None
    assert "did you mean 'q_proj'? It has: q_proj, up_proj." in unmatched_targets(["up_proj", "q_prj"], names)
    assert unmatched_targets(["proj"], names) is not None  # an ending is a whole part of the name


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        linear_names(tmp_path)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": ["q_proj"]}, {"q_proj"}),
        ({"target_modules": ".*q_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": ["q_proj"], "layers": [1]}, {"q_proj"}),
    ],
)
def test_a_blank_adapter_has_the_shape_of_the_step(given, names, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    step = WeightStep.model_validate({"method": "sft", "lora_rank": 8, **given})
    base = Weights("base", "base", str(model), str(model))
    blank = blank_adapter(step, base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == names
    assert {key.split(".")[4] for key in tensors} == ({"1"} if "layers" in given else {"0", "1"})
    assert all(not tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    assert blank.kind == "lora" and blank.id != base.id and blank.canary == base.canary
