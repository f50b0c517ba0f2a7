"""What makes two programs, or two metrics, the same to a run."""

import functools
from typing import Literal

import dspy
import pytest
from pydantic import BaseModel

from bt_ray.preflight import object_identity, program_identity


class Answer(BaseModel):
    text: str


class One(dspy.Module):
    def __init__(self, kind, desc="a word"):
        super().__init__()
        signature = dspy.Signature({"text": (str, dspy.InputField()), "answer": (kind, dspy.OutputField(desc=desc))}, "Answer.")
        self.answer = dspy.Predict(signature)


class Threshold:
    def __init__(self, at):
        self.at = at

    def __call__(self, example, prediction, trace=None):
        return self.at


def near(example, prediction, within=1):
    return within


@pytest.mark.parametrize("kind", [str, list[str], Literal["a", "b"], Answer, dspy.Image])
def test_a_program_is_known_by_its_class_and_fields(kind):
    assert program_identity(One(kind)) == program_identity(One(kind))
    assert program_identity(One(kind)) != program_identity(One(int))
    assert program_identity(One(kind)) != program_identity(One(kind, "a sentence"))


def test_the_choices_of_a_field_count():
    assert program_identity(One(Literal["a", "b"])) != program_identity(One(Literal["a", "c"]))


def test_an_object_that_is_called_is_known_by_what_it_holds():
    assert object_identity(Threshold(0.5)) == object_identity(Threshold(0.5))
    assert object_identity(Threshold(0.5)) != object_identity(Threshold(0.6))


def test_a_partial_is_known_by_its_arguments():
    assert object_identity(functools.partial(near, within=2)) == object_identity(functools.partial(near, within=2))
    assert object_identity(functools.partial(near, within=2)) != object_identity(functools.partial(near, within=3))
    assert object_identity(functools.partial(near, within=2)) != object_identity(near)


def test_the_prompts_of_a_frozen_module_count():
    frozen = [One(str) for _ in range(3)]
    for program in frozen:
        program._compiled = True
    frozen[2].answer.demos = [dspy.Example(text="a", answer="b")]
    outer = [dspy.Module() for _ in frozen]
    for module, inner in zip(outer, frozen, strict=True):
        module.inner = inner
    assert program_identity(outer[0]) == program_identity(outer[1])
    assert program_identity(outer[0]) != program_identity(outer[2])
