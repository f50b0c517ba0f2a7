import pytest
from safetensors.numpy import load_file

from bt_ray.config import WeightStep
from bt_ray.errors import ModelError
from bt_ray.lm.blank_adapter import blank_adapter
from bt_ray.lm.modules import adapter_problem, linear_names, unmatched_targets
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


NAMES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.up_proj", "self_attn.q_proj")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"target_modules": "q_proj"},
            "'q_proj' matches no layer of the model. It is a regular expression over full names, as 'model.l",
        ),
        ({"target_modules": r".*\.k_proj"}, "their last parts are: q_proj, up_proj. A list, as [q_proj], means names."),
        ({"target_modules": "*.q_proj"}, "'*.q_proj' is no regular expression (nothing to repeat at position 0)"),
        ({"target_modules": ["k_proj"]}, "did you mean 'q_proj'? It has: q_proj, up_proj."),
        ({"layers": [1, 2, 7]}, "layers: [2, 7] do not exist; the model has 2 layers, 0 to 1."),
        ({"layers": [2], "target_modules": ["q_proj"]}, "layers: [2] do not exist"),
    ],
)
def test_adapters_without_a_place_are_refused_with_the_candidates(given, says):
    assert says in adapter_problem(WeightStep.model_validate({"method": "sft", **given}), NAMES)


@pytest.mark.parametrize(
    "given", [{}, {"layers": [1]}, {"target_modules": r"model\..*\.q_proj"}, {"target_modules": ["q_proj"], "layers": [0]}]
)
def test_adapters_with_a_place_are_let_through(given):
    step = WeightStep.model_validate({"method": "sft", **given})
    assert adapter_problem(step, NAMES) is None
    assert adapter_problem(step, [name.removeprefix("model.") for name in NAMES]) is None, "a checkpoint of the body alone"


def test_targets_that_the_named_layers_lack():
    names = [*NAMES, "model.layers.1.self_attn.o_proj"]
    step = WeightStep.model_validate({"method": "sft", "target_modules": ["o_proj"], "layers": [0]})
    assert adapter_problem(step, names) == "target_modules: none of ['o_proj'] is in the layers [0]; they have q_proj, up_proj."


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        linear_names(tmp_path)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": ["q_proj"]}, {"q_proj"}),
        ({"target_modules": r".*\.(q|up)_proj"}, {"q_proj", "up_proj"}),
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
