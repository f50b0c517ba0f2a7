import json
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import pydantic
import pytest

from bt_ray.bundle import answer, read_inputs
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


class Order(pydantic.BaseModel):
    item: str
    count: int = 1


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (str, "[1, 2]", "[1, 2]"),
        (list[str], "[a, 2024-01-01]", ["a", "2024-01-01"]),
        (list[float], '[0.5, 1e-3, "2"]', [0.5, 0.001, "2"]),
        (int, "3", 3),
        (float, "1e-3", 0.001),
        (bool, "yes", True),
        (Literal["yes", "no"], "yes", "yes"),
        (str | None, "note: [1", "note: [1"),
        (str | None, "17", "17"),
        (Order, "{item: pen}", {"item": "pen"}),  # as a row of the examples holds it
        (Any, "{a: [1, 2]}", {"a": [1, 2]}),
    ],
)
def test_a_value_is_what_an_example_of_its_type_holds(annotation, text, value):
    for words in (["q", "other"], [f"q={text}", "other=x"]), (["q"], [text]):
        found = read_inputs(*words, {"q": annotation})["q"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("annotation", "text"), [(list[str], "hello"), (int, "three"), (Order, "{count: 2}")])
def test_a_value_that_is_none_of_its_type_is_refused(annotation, text):
    with pytest.raises(ConfigError, match=r"ask: q takes .* is none\. Write it as YAML"):
        read_inputs(["q"], [text], {"q": annotation})


class Pick(dspy.Module):
    """Names a word; what it is handed is kept, by the field's name."""

    def __init__(self):
        super().__init__()
        self.pick = dspy.Predict("options: list[str], count: int, message: str -> word")
        self.seen = {}

    def forward(self, **inputs):
        self.seen.update(inputs)
        return self.pick(options=inputs["options"], count=inputs["count"], message=inputs["text"])


class Asked:
    """What `answer` reads of a run: the names of its inputs and the training rows."""

    def __init__(self, **row):
        self.row = row

    def config(self):
        return SimpleNamespace(data=SimpleNamespace(inputs=tuple(self.row)))

    def examples(self, split):
        return [{"inputs": self.row}] if split == "train" else []


@pytest.mark.parametrize(("trained", "given"), [("3", "7"), (3, 7)])
def test_a_program_is_asked_with_the_types_that_it_was_trained_with(monkeypatch, trained, given):
    program = Pick()
    binding = Binding(StubPool(lambda messages: "a"), BASE, make_adapter("compact", False))
    monkeypatch.setattr("bt_ray.bundle.load", lambda run, stage_id: BoundProgram(program, binding, LoopThread()))
    run = Asked(options=["x"], count=2, text=trained)  # no predictor has the input `text`
    assert answer(run, ["options=[a, b]", "count=3", "text=7"])["word"] == "a"
    assert program.seen == {"options": ["a", "b"], "count": 3, "text": given}


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
