"""Inputs that no call of a program gives, and programs of which that cannot be said."""

from __future__ import annotations

import dspy
import pytest

from bt_ray.rollout.call_sites import ungiven_inputs


class Answers(dspy.Module):
    """The good one: each call of a predictor gives something, all calls together give all."""

    def __init__(self):
        super().__init__()
        self.area = dspy.ChainOfThought("question -> area")
        self.answer = dspy.Predict("question, area -> answer")

    def forward(self, question):
        area = self.area(question=question).area
        return self.answer(question=question, area=area) if area else self.answer(question=question)


class Forgets(Answers):
    def __init__(self):
        super().__init__()
        self.last = dspy.ChainOfThought("answer, area -> verdict")

    async def aforward(self, question):
        for answer in (question,):
            return await self.last.acall(answer=answer)


class AnotherSignature(Forgets):
    async def aforward(self, question):
        return await self.last.acall(answer=question, signature="answer -> verdict")


class Spreads(Forgets):
    async def aforward(self, **inputs):
        return await self.last.acall(**inputs)


class HandsOn(Forgets):
    async def aforward(self, question):
        return await dspy.asyncify(self.last)(answer=question, area="")


class HandsItselfOn(Forgets):
    async def aforward(self, question):
        self.last(answer=question)
        return await ask(self, question)


class ByName(Forgets):
    async def aforward(self, question):
        self.last(answer=question)
        return self.last(answer=question, area="")


class All(Forgets):
    async def aforward(self, question):
        self.last(answer=question)
        return [predict(answer=question, area="") for _, predict in self.named_predictors()]


async def ask(program, question):
    return await program.last.acall(answer=question, area="")


def test_an_input_that_no_call_gives_is_named():
    assert ungiven_inputs(Answers()) == []
    (problem,) = ungiven_inputs(Forgets())
    assert problem.startswith("The predictor 'last' needs the input 'area', and no call of it in Forgets gives it")


@pytest.mark.parametrize("program", [AnotherSignature, Spreads, HandsOn, HandsItselfOn, ByName, All])
def test_what_is_not_known_is_let_through(program):
    found = program.__dict__  # its own call is one of which nothing is known, though the base's is
    assert "aforward" in found and ungiven_inputs(program()) == []


def test_a_class_without_source_says_nothing_of_its_bases():
    made = type("Made", (Forgets,), {"aforward": eval("lambda self, question: self.last(answer=question, area='')")})
    made.__module__ = "made.elsewhere"
    assert ungiven_inputs(made()) == []


def test_a_bare_predictor_and_a_property_that_raises_are_no_problem():
    class Odd(Answers):
        @property
        def area_of(self):
            raise RuntimeError("not yet")

        def forward(self, question):
            return self.area_of(question=question)

    assert ungiven_inputs(Odd()) == [] and ungiven_inputs(dspy.Predict("question -> answer")) == []
