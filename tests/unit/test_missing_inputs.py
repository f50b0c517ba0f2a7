"""A required input that a call does not give: dspy warns and leaves its line out, a run names it."""

import asyncio
import contextlib

import dspy
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError

from bt_ray.lm.adapter import make_adapter
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.runner import ProgramRunner, RolloutTask
from tests.support import programs
from tests.support.stub_pool import BASE, StubPool


class Needs(dspy.Signature):
    """Answer."""

    message: str = dspy.InputField()
    department: str = dspy.InputField()
    note: str | None = dspy.InputField()
    tone: str = dspy.InputField(default="kind")
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize("name", ["compact", "chat", "json", "xml"])
def test_the_call_is_refused_in_every_format_and_partial_demos_are_not(name):
    lm = DummyLM([{"answer": "yes"}] * 4)
    predict = dspy.Predict(Needs)
    predict.demos = [{"message": "a demo without department", "answer": "no"}]
    with dspy.context(lm=lm, adapter=make_adapter(name, False)):
        with pytest.raises(TypeError, match=r"a predictor .* is called without its input 'department'; pass it"):
            predict(message="x")
        with pytest.raises(TypeError, match="'message', 'department'"):
            asyncio.run(predict.acall())
        assert not lm.history
        with contextlib.suppress(AdapterParseError):  # DummyLM answers in the format of dspy
            predict(message="x", department="cards")
    (call,) = lm.history
    assert any("a demo without department" in message["content"] for message in call["messages"])


class Forgets(programs.TwoModules):
    def forward(self, message):
        return self.classify(message=message)


class ForgetsAsync(Forgets):
    async def aforward(self, message):
        return await self.classify.acall(message=message)


@pytest.mark.parametrize("program", ["Forgets", "ForgetsAsync"])
def test_it_costs_the_row_which_names_predictor_and_field(tmp_path, program):
    (tmp_path / "forgets.py").write_text(f"from tests.unit.test_missing_inputs import {program}\n")
    spec = ProgramSpec(f"forgets.py:{program}", "tests.support.programs:exact", adapter="compact", base_dir=str(tmp_path))
    task = RolloutTask(programs.example(0), 0, extract(programs.TwoModules()), BASE, 1.0, 16, 7)
    pool = StubPool(programs.answer)
    row = asyncio.run(run(spec, pool, task))
    assert row["error"]["kind"] == "program" and not pool.calls
    says = "TypeError: predictor 'classify' (message, department -> intent) is called without its input 'department'"
    assert row["error"]["message"].startswith(says)


async def run(spec, pool, task):
    return await ProgramRunner(spec, pool).run(task)
