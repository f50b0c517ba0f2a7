import json

import dspy
import pytest

from bt_ray.bundle import read_inputs
from bt_ray.errors import ConfigError
from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.dspy_engine import Binding, BoundProgram, LoopThread
from tests.support import programs
from tests.support.stub_pool import BASE, StubPool


def test_one_input_takes_the_text_as_it_is():
    assert read_inputs(["message"], ["my", "card"]) == {"message": "my card"}
    assert read_inputs(["message"], ["a = b"]) == {"message": "a = b"}
    assert read_inputs(["message"], ["message=hello"]) == {"message": "hello"}


def test_several_inputs_need_their_names():
    assert read_inputs(["a", "b"], ["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(ConfigError, match="also needs b"):
        read_inputs(["a", "b"], ["a=1"])
    with pytest.raises(ConfigError, match="key=value with a key of a, b"):
        read_inputs(["a", "b"], ["c=1"])


def bound(adapter):
    binding = Binding(StubPool(programs.answer), BASE, make_adapter(adapter, False))
    return BoundProgram(programs.TwoModules(), binding, LoopThread())


def test_a_saved_program_says_which_adapter_it_was_tuned_with(tmp_path):
    tuned = bound("compact")
    tuned.program.route.demos = [dspy.Example(message="a", department="b")]
    tuned.save(tmp_path / "tuned.json")
    assert json.loads((tmp_path / "tuned.json").read_text())["bt_ray"] == {"adapter": "compact", "weights": BASE.id}
    plain = programs.TwoModules()
    plain.load(tmp_path / "tuned.json")  # the program alone takes the state too
    assert plain.route.demos[0]["department"] == "b"
    again = bound("compact")
    again.load(tmp_path / "tuned.json")
    assert again.program.route.demos[0]["department"] == "b"
    with pytest.raises(ConfigError, match="tuned with the adapter 'compact'"):
        bound("chat").load(tmp_path / "tuned.json")
