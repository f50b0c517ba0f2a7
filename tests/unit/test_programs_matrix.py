"""What of DSPy a program may use, row by row of docs/programs.md: fields, and programs that are refused by name.

Every row runs one small program on a pool that answers from a script, and looks at the prediction, the recorded
calls, and the training rows: a row's prompt must be what the model was sent, its completion what it wrote.
"""

from __future__ import annotations

import asyncio
import enum
import json
from dataclasses import dataclass
from typing import Any, Literal

import dspy
import pydantic
import pytest

from bt_ray.config import RunConfig
from bt_ray.errors import ConfigError
from bt_ray.lm.adapter import make_adapter
from bt_ray.preflight import prepare
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec, pickle_program, unsupported
from bt_ray.rollout.render import row_renderer
from bt_ray.rollout.runner import ProgramRunner, RolloutTask
from bt_ray.training.rows import build_rows
from tests.support.stub_pool import BASE, StubPool

ADAPTERS = ("compact", "chat", "json", "xml")


@dataclass
class Outcome:
    """What one run of a program left: its row, the pool's calls, and the training rows with their counts."""

    row: dict[str, Any]
    pool: StubPool
    taught: list[dict[str, Any]]
    counts: dict[str, Any]

    @property
    def calls(self):
        return [(call["predictor"], call["inputs"], call["outputs"]) for call in self.row["calls"]]

    @property
    def names(self):
        return [call["predictor"] for call in self.row["calls"]]

    def teaches_what_was_said(self):
        """Whether the training rows are, call by call, the messages that were sent and the answers that came."""
        sent = [(list(call.messages), said["text"]) for call, said in zip(self.pool.calls, self.row["calls"], strict=True)]
        return [(row["prompt"], row["completion"][0]["content"]) for row in self.taught] == sent


def passes(example, prediction, trace=None):
    return True


def scripted(program, adapter, script):
    """An answer function: each step is (predictor's path or a signature, JSON outputs), in the order of the calls."""
    writer = make_adapter(adapter, False)
    signatures = {path.removeprefix("self."): each.signature for path, each in program.named_sub_modules(dspy.Predict)}
    left = list(script)

    def answer(messages):
        of, outputs = left.pop(0)
        return writer.format_assistant_message_content(signatures[of] if isinstance(of, str) else of, outputs)

    return answer


def run(tmp_path, program, script, inputs, adapter="compact", metric=passes):
    """Run a program once as a rollout, through the file by which a notebook's program reaches the workers."""
    spec = ProgramSpec("-", "-", adapter=adapter, pickle_path=pickle_program(program, metric, str(tmp_path)))
    candidate = extract(program)
    pool = StubPool(scripted(program, adapter, script))
    example = {"id": "e", "inputs": inputs, "labels": {}}
    task = RolloutTask(example=example, sample=0, candidate=candidate, weights=BASE, temperature=1.0, max_tokens=64, seed=3)
    row = asyncio.run(ProgramRunner(spec, pool).run(task))
    assert json.loads(json.dumps(row)) == row
    return Outcome(row, pool, *build_rows([row], row_renderer(spec, candidate)))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class City(pydantic.BaseModel):
    name: str
    people: int | None = None


OUTPUTS = {
    "literal": (Literal["yes", "no"], "yes", "yes"),
    "literal of numbers": (Literal[1, 2], 2, 2),
    "bool": (bool, True, True),
    "int": (int, 7, 7),
    "float": (float, 0.5, 0.5),
    "pydantic model": (City, City(name="Oslo", people=7), {"name": "Oslo", "people": 7}),
    "list": (list[str], ["a", "b"], ["a", "b"]),
    "list of models": (list[City], [City(name="Oslo")], [{"name": "Oslo", "people": None}]),
    "dict": (dict[str, int], {"a": 1}, {"a": 1}),
    "optional, given": (int | None, 7, 7),
    "optional, none": (int | None, None, None),
    "optional literal": (Literal["yes", "no"] | None, "no", "no"),
    "optional literal, none": (Literal["yes", "no"] | None, None, None),
    "optional enum, none": (Colour | None, None, None),
    "optional text, given": (str | None, "words", "words"),
    "enum": (Colour, Colour.BLUE, "blue"),
    "code": (dspy.Code, dspy.Code(code="x = 1"), "x = 1"),
}


def reads(annotation):
    return dspy.Signature({"text": (str, dspy.InputField()), "value": (annotation, dspy.OutputField())}, "Read it.")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_typed_output_is_read_recorded_and_taught(tmp_path, name, adapter):
    annotation, value, recorded = OUTPUTS[name]

    def same(example, prediction, trace=None):
        return prediction.value == value and type(prediction.value) is type(value)

    script = [("self", {"value": recorded})]
    found = run(tmp_path, dspy.Predict(reads(annotation)), script, {"text": "t"}, adapter, same)
    assert (found.row["error"], found.row["score"]) == (None, 1.0)
    assert found.row["prediction"] == {"value": recorded}
    assert found.calls == [("self", {"text": "t"}, {"value": recorded})]
    assert found.teaches_what_was_said()


@pytest.mark.parametrize(("adapter", "said"), [("json", None), ("compact", "None"), ("chat", "None"), ("xml", "None")])
def test_an_optional_text_is_none_under_json_alone(tmp_path, adapter, said):
    found = run(tmp_path, dspy.Predict(reads(str | None)), [("self", {"value": said})], {"text": "t"}, adapter)
    assert found.row["error"] is None and found.row["prediction"] == {"value": said}
    assert found.teaches_what_was_said()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_reasoning_and_chain_of_thought(tmp_path, adapter):
    outputs = {"reasoning": "two and two", "answer": "4"}
    signature = dspy.Signature(
        {
            "question": (str, dspy.InputField()),
            "reasoning": (dspy.Reasoning, dspy.OutputField()),
            "answer": (str, dspy.OutputField()),
        }
    )
    for name, program in (("predict", dspy.ChainOfThought("question -> answer")), ("self", dspy.Predict(signature))):
        found = run(tmp_path, program, [(name, outputs)], {"question": "2+2?"}, adapter)
        assert found.row["error"] is None and found.row["prediction"] == outputs
        assert found.calls == [(name, {"question": "2+2?"}, outputs)]
        assert found.teaches_what_was_said()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_conversation_becomes_turns_of_the_prompt_and_of_the_row(tmp_path, adapter):
    signature = dspy.Signature("question, history: dspy.History -> answer")
    turns = [{"question": "Capital of Norway?", "answer": "Oslo"}]
    inputs = {"question": "And of Chad?", "history": {"messages": turns}}
    found = run(tmp_path, dspy.Predict(signature), [("self", {"answer": "N'Djamena"})], inputs, adapter)
    assert found.row["error"] is None
    assert found.calls == [("self", inputs, {"answer": "N'Djamena"})]
    roles = [message["role"] for message in found.pool.calls[0].messages if message["role"] != "system"]
    assert roles == ["user", "assistant", "user"] and "Oslo" in found.pool.calls[0].messages[-2]["content"]
    assert found.teaches_what_was_said()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_typed_inputs_are_recorded_as_json_and_give_the_same_prompt_again(tmp_path, adapter):
    class Asks(dspy.Module):
        def __init__(self):
            super().__init__()
            self.ask = dspy.Predict(
                dspy.Signature("cities: list[City], colour: Colour, near: City -> answer", custom_types=TYPES)
            )

        def forward(self, name):
            return self.ask(cities=[City(name=name)], colour=Colour.RED, near=City(name="Oslo", people=7))

    found = run(tmp_path, Asks(), [("ask", {"answer": "a"})], {"name": "Bergen"}, adapter)
    assert found.row["error"] is None
    recorded = {"cities": [{"name": "Bergen", "people": None}], "colour": "red", "near": {"name": "Oslo", "people": 7}}
    assert found.calls == [("ask", recorded, {"answer": "a"})]
    assert found.teaches_what_was_said()


TYPES = {"City": City, "Colour": Colour}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tools_and_tool_calls_as_fields(tmp_path, adapter):
    def weather(city: str) -> str:
        """Weather of a city."""
        return "rain"

    class Chooses(dspy.Module):
        def __init__(self):
            super().__init__()
            self.choose = dspy.Predict("question, tools: list[dspy.Tool] -> calls: dspy.ToolCalls")

        def forward(self, question):
            chosen = self.choose(question=question, tools=[dspy.Tool(weather)]).calls.tool_calls[0]
            return dspy.Prediction(answer=weather(**chosen.args))

    outputs = {"calls": {"tool_calls": [{"name": "weather", "args": {"city": "Oslo"}}]}}
    found = run(tmp_path, Chooses(), [("choose", outputs)], {"question": "?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "rain"}
    assert found.names == ["choose"]
    assert found.teaches_what_was_said()


class Looks(dspy.Module):
    """A field that the models cannot read, two modules deep."""

    def __init__(self, annotation):
        super().__init__()
        self.inner = dspy.ChainOfThought(
            dspy.Signature({"seen": (annotation, dspy.InputField()), "answer": (str, dspy.OutputField())})
        )

    def forward(self, seen):
        return self.inner(seen=seen)


@pytest.mark.parametrize("medium", [dspy.Image, dspy.Audio, dspy.File])
@pytest.mark.parametrize("around", [lambda kind: kind, lambda kind: kind | None, lambda kind: dict[str, list[kind]]])
def test_fields_that_are_no_text_are_refused_by_name(medium, around):
    (problem,) = unsupported(Looks(around(medium)))
    assert problem == f"Predict 'inner.predict', field 'seen' is a dspy.{medium.__name__}; the models read text only."
    assert unsupported(Looks(str)) == []


def test_a_picture_hidden_in_a_model_costs_its_row_and_says_why(tmp_path):
    class Page(pydantic.BaseModel):
        picture: dspy.Image

    class Hides(Looks):
        def forward(self, seen):
            return super().forward(seen=Page(picture=dspy.Image("data:image/png;base64,iVBORw0KGgo=")))

    found = run(tmp_path, Hides(Page), [("inner.predict", {"reasoning": "r", "answer": "a"})], {"seen": "x"})
    assert found.row["error"]["kind"] == "program" and "text only" in found.row["error"]["message"]


class Empty(dspy.Module):
    def forward(self, text):
        return dspy.Prediction(answer=text)


def test_a_refusal_comes_before_anything_starts():
    steps = {"p": {"optimizer": "random_fewshot"}}
    data = {"train": "-", "val": "-", "inputs": ["text"]}
    config = RunConfig.model_validate(
        {"program": "-:-", "metric": f"{__name__}:passes", "data": data, "steps": steps, "strategy": "p"}
    )
    splits = {"train": [{"id": "e", "inputs": {"text": "t"}, "labels": {}}]}
    with pytest.raises(ConfigError, match="The program has no predictor to improve"):
        prepare(config, splits, program=Empty())
