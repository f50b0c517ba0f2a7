from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import dspy
import pydantic
import pytest
from dspy.utils.exceptions import AdapterParseError

from bt_ray.lm.adapter import make_adapter, render_row, stop_strings

Intents = Literal["card_lost", "card_late", "transfer_failed", "transfer_slow", "rate_wrong", "fee_unknown", "top_up", "refund"]


class Two(dspy.Signature):
    """Name the intent of the message."""

    message: str = dspy.InputField()
    department: str = dspy.InputField()
    intent: Intents = dspy.OutputField()


class Address(pydantic.BaseModel):
    street: str
    number: int


def adapter():
    return make_adapter("compact", constrain=False)


def texts(signature, demos, inputs):
    return [(m["role"], m["content"]) for m in adapter().format(signature, demos, inputs)]


def test_compact_single_literal_prompt_word_for_word():
    messages = texts(
        Two, [{"message": "a", "department": "b", "intent": "refund"}], {"message": "where is it?", "department": "cards"}
    )
    assert messages == [
        ("system", f"Name the intent of the message.\nintent: one of {', '.join(get_args(Intents))}"),
        ("user", "message: a\ndepartment: b"),
        ("assistant", "refund"),
        ("user", "message: where is it?\ndepartment: cards"),
    ]


def test_compact_prompt_is_short_for_smollm2():
    home = Path(os.environ.get("BT_RAY_HOME", Path.home() / ".cache" / "bt_ray"))
    files = sorted(home.glob("**/*mol*/tokenizer.json"))
    if not files:
        pytest.skip("the model smollm2-135m is not prepared here")
    tokenizers = pytest.importorskip("tokenizers")
    turns = texts(Two, [], {"message": "I have been waiting for my new card for two weeks, where is it?", "department": "cards"})
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    assert len(tokenizers.Tokenizer.from_file(str(files[0])).encode(text).ids) < 100


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (Intents, " refund\n", "refund"),
        (bool, "False", False),
        (int, "-12", -12),
        (float, "2.5", 2.5),
        (str, "two\nlines", "two\nlines"),
        (list[str], '["a", "b"]', ["a", "b"]),
        (Address, '{"street": "x", "number": 3}', Address(street="x", number=3)),
        (Literal[1, 2], "2", 2),
        (Literal["a"] | None, "None", None),
    ],
)
def test_compact_reads_a_single_value(annotation, text, value):
    signature = dspy.Signature({"q": (str, dspy.InputField()), "a": (annotation, dspy.OutputField())})
    assert adapter().parse(signature, text) == {"a": value}
    written = adapter().format_assistant_message_content(signature, {"a": value})
    assert adapter().parse(signature, written) == {"a": value}


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Intents, "refunds"),
        (Intents, "The intent is refund"),
        (Intents, "Refund"),
        (bool, "yes"),
        (int, "3.0"),
        (int, "three"),
        (float, "nan"),
        (list[str], "a, b"),
        (Address, '{"street": "x"}'),
        (str, "  \n"),
    ],
)
def test_compact_refuses_what_is_not_a_value(annotation, text):
    signature = dspy.Signature({"q": (str, dspy.InputField()), "a": (annotation, dspy.OutputField())})
    with pytest.raises(AdapterParseError):
        adapter().parse(signature, text)


Several = dspy.Signature(
    {
        "q": (str, dspy.InputField()),
        "reasoning": (dspy.Reasoning, dspy.OutputField()),
        "ok": (bool, dspy.OutputField()),
        "answer": (str, dspy.OutputField(desc="one word")),
    },
    "Answer.",
)


def test_compact_several_outputs_are_lines():
    lines = ["Answer.", "Answer in these lines:", "reasoning: text", "ok: True or False", "answer: one word"]
    assert texts(Several, [], {"q": "x"})[0][1].split("\n") == lines
    parsed = adapter().parse(Several, "reasoning: first\nand second\nok: True\nanswer: a\nb: c")
    assert isinstance(parsed["reasoning"], dspy.Reasoning)
    assert parsed == {"reasoning": "first\nand second", "ok": True, "answer": "a\nb: c"}
    written = adapter().format_assistant_message_content(Several, parsed)
    assert adapter().parse(Several, written) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "reasoning: a\nanswer: b",  # a field is missing
        "Sure!\nreasoning: a\nok: True\nanswer: b",  # something before the first field
        "reasoning: a\nok: True\nreasoning: c\nanswer: b",  # twice
        "ok: True\nreasoning: a\nanswer: b",  # wrong order
        "reasoning: a\nok: True\nmaybe\nanswer: b",  # a second line where the value has one
        "reasoning: a\nok: True\nanswer:",  # empty
    ],
)
def test_compact_several_outputs_strictly(text):
    with pytest.raises(AdapterParseError):
        adapter().parse(Several, text)


def test_optional_field_with_default_may_be_missing():
    signature = dspy.Signature(
        {
            "q": (str, dspy.InputField()),
            "a": (str, dspy.OutputField()),
            "note": (str | None, dspy.OutputField(default=None)),
        }
    )
    assert adapter().parse(signature, "a: x") == {"a": "x", "note": None}


def test_demos_without_a_typed_output_are_left_out_and_missing_text_is_named():
    messages = texts(Several, [{"q": "1", "answer": "b"}, {"q": "2", "ok": True, "answer": "c"}], {"q": "3"})
    assert [content for role, content in messages if role == "assistant"] == ["reasoning: Not supplied.\nok: True\nanswer: c"]


def test_history_becomes_turns_also_from_json():
    signature = dspy.Signature(
        {
            "q": (str, dspy.InputField()),
            "history": (dspy.History, dspy.InputField()),
            "a": (str, dspy.OutputField()),
        },
        "Answer.",
    )
    history = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    inputs = {"q": "three", "history": {"messages": history}}
    row = render_row(adapter(), signature, {"instructions": "Say.", "demos": []}, inputs, {"a": "3"})
    assert [m["content"] for m in row["prompt"]] == ["Say.", "q: one", "1", "q: two", "2", "q: three"]


@pytest.mark.parametrize("name", ["compact", "chat", "json", "xml"])
def test_a_rendered_row_parses_back_in_every_format(name):
    chosen = make_adapter(name, constrain=False)
    candidate = {"instructions": "Do.", "demos": [{"q": "0", "reasoning": "r", "ok": False, "answer": "z"}]}
    row = render_row(chosen, Several, candidate, {"q": "1"}, {"reasoning": "because", "ok": True, "answer": "b"})
    assert [m["role"] for m in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert "Do." in row["prompt"][0]["content"]
    assert [m["role"] for m in row["completion"]] == ["assistant"]
    assert chosen.parse(Several, row["completion"][0]["content"]) == {"reasoning": "because", "ok": True, "answer": "b"}


def test_stop_strings():
    number = dspy.Signature("q -> n: int")
    assert stop_strings(adapter(), Two) == ("\n",)
    assert stop_strings(adapter(), number) == ("\n",)
    assert stop_strings(adapter(), dspy.Signature("q -> a")) == ()
    assert stop_strings(adapter(), Several) == ()
    assert stop_strings(make_adapter("chat", False), Several) == ("[[ ## completed ## ]]",)
    assert stop_strings(make_adapter("json", False), Several) == ()


def test_no_hidden_second_call_when_an_answer_does_not_parse():
    for name in ("chat", "xml"):
        assert make_adapter(name, False).use_json_adapter_fallback is False
    with pytest.raises(ValueError, match="compact, chat, json or xml"):
        make_adapter("yaml", False)
