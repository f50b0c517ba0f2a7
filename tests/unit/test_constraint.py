from __future__ import annotations

import enum
import re
from typing import Literal

import dspy
import jsonschema
import pydantic
import pytest

from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.constraint import constraint_for


class Colour(enum.Enum):
    RED = "red"
    BLUE = "dark blue"


class Address(pydantic.BaseModel):
    street: str
    number: int


def single(annotation):
    return dspy.Signature({"q": (str, dspy.InputField()), "a": (annotation, dspy.OutputField())})


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Literal["a", "b c"], {"choice": ["a", "b c"]}),
        (Literal[1, 2], {"choice": ["1", "2"]}),
        (Colour, {"choice": ["red", "dark blue"]}),
        (bool, {"choice": ["True", "False"]}),
        (str, None),
    ],
)
def test_compact_single(annotation, expected):
    assert constraint_for(single(annotation), "compact") == expected


@pytest.mark.parametrize(
    ("annotation", "good", "bad"), [(int, ["0", "-12"], ["1.5", "", "x"]), (float, ["1", "-0.25"], ["1.", "nan"])]
)
def test_compact_numbers(annotation, good, bad):
    pattern = constraint_for(single(annotation), "compact")["regex"]
    assert all(re.fullmatch(pattern, text) for text in good)
    assert not any(re.fullmatch(pattern, text) for text in bad)


def test_compact_pydantic_is_its_schema():
    schema = constraint_for(single(Address), "compact")["json"]
    jsonschema.validate({"street": "x", "number": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"street": "x"}, schema)


Several = dspy.Signature(
    {
        "q": (str, dspy.InputField()),
        "reasoning": (str, dspy.OutputField()),
        "n": (int, dspy.OutputField()),
        "kind": (Literal["a.b", "c (d)", "e&f"], dspy.OutputField()),
    }
)


@pytest.mark.parametrize("name", ["compact", "chat", "xml"])
def test_several_outputs_admit_what_the_adapter_writes_and_nothing_else(name):
    pattern = constraint_for(Several, name)["regex"]
    adapter = make_adapter(name, constrain=True)
    for kind in ("a.b", "c (d)", "e&f"):
        value = {"reasoning": "two words", "n": 4, "kind": kind}
        written = adapter.format_assistant_message_content(Several, value).strip()
        if name == "xml":
            written = written.replace("e&f", "e&amp;f")  # dspy writes it raw and cannot read that back
        assert re.fullmatch(pattern, written), written
        assert adapter.parse(Several, written) == value
        assert not re.fullmatch(pattern, written.replace("a.b", "axb").replace("c (d)", "c d").replace("f", "g"))


def test_json_is_one_closed_object():
    schema = constraint_for(Several, "json")["json"]
    jsonschema.validate({"reasoning": "x", "n": 1, "kind": "a.b"}, schema)
    for bad in (
        {"reasoning": "x", "n": 1},
        {"reasoning": "x", "n": 1, "kind": "z"},
        {"reasoning": "x", "n": 1, "kind": "a.b", "more": 1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_free_where_nothing_can_be_held():
    two_texts = dspy.Signature("q -> a, b")
    assert constraint_for(two_texts, "chat") is None
    assert constraint_for(two_texts, "compact") == {"regex": r"a: [^\n]+\nb: [^\n]+"}
    mixed = dspy.Signature({"q": (str, dspy.InputField()), "a": (Address, dspy.OutputField()), "b": (int, dspy.OutputField())})
    assert constraint_for(mixed, "compact") is None
    with pytest.raises(ValueError, match="compact, chat, json or xml"):
        constraint_for(mixed, "yaml")
