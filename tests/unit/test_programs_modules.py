"""What of DSPy a program may use, row by row of docs/programs.md: modules that call predictors in their own way."""

from __future__ import annotations

import importlib.util
import shutil

import dspy
import pytest
from dspy.predict.refine import OfferFeedback
from dspy.primitives import LocalInterpreter

from bt_ray.rollout.program import unsupported
from tests.unit.test_programs_matrix import ADAPTERS, run


def weather(city: str) -> str:
    """Weather of a city."""
    return {"Oslo": "rain"}[city]


class Agent(dspy.Module):
    """A sync program around an agent; dspy.ReAct itself, as the program, is awaited."""

    def __init__(self):
        super().__init__()
        self.agent = dspy.ReAct("question -> answer", tools=[weather], max_iters=5)

    def forward(self, question):
        return self.agent(question=question)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("make", [Agent, lambda: Agent().agent])
def test_react_records_its_predictors_and_keeps_the_errors_of_tools(tmp_path, make, adapter):
    program = make()
    at = "agent." if isinstance(program, Agent) else ""
    turns = [("weather", {"city": "Oslo"}), ("weather", {"city": "Atlantis"}), ("finish", {})]
    steps = [
        (f"{at}react", {"next_thought": "look", "next_tool_name": tool, "next_tool_args": arguments}) for tool, arguments in turns
    ]
    script = [*steps, (f"{at}extract.predict", {"reasoning": "seen", "answer": "rain"})]
    found = run(tmp_path, program, script, {"question": "Oslo?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"]["answer"] == "rain"
    trajectory = found.row["prediction"]["trajectory"]
    assert trajectory["observation_0"] == "rain"
    assert trajectory["observation_1"].startswith("Execution error in weather:") and "KeyError" in trajectory["observation_1"]
    assert found.names == [f"{at}react"] * 3 + [f"{at}extract.predict"]
    assert [outputs for _, _, outputs in found.calls] == [outputs for _, outputs in script]
    assert "Execution error" in found.calls[2][1]["trajectory"] and "Execution error" not in found.calls[1][1]["trajectory"]
    assert found.teaches_what_was_said()


async def forecast(city: str) -> str:
    """Weather of tomorrow."""
    return "snow"


def test_an_async_tool_of_an_agent_that_is_the_program(tmp_path):
    program = dspy.ReAct("question -> answer", tools=[forecast], max_iters=1)
    step = {"next_thought": "look", "next_tool_name": "forecast", "next_tool_args": {"city": "Oslo"}}
    script = [("react", step), ("extract.predict", {"reasoning": "seen", "answer": "snow"})]
    found = run(tmp_path, program, script, {"question": "Oslo?"})
    assert found.row["prediction"]["trajectory"]["observation_0"] == "snow"
    assert found.teaches_what_was_said()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_react_v2(tmp_path, adapter):
    def turn(name, **arguments):
        return ("react", {"next_thought": "think", "tool_calls": {"tool_calls": [{"name": name, "args": arguments}]}})

    program = dspy.ReActV2("question -> answer", tools=[weather])
    script = [turn("weather", city="Oslo"), turn("submit", answer="rain")]
    found = run(tmp_path, program, script, {"question": "Oslo?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"]["answer"] == "rain"
    assert found.names == ["react"] * 2
    assert found.teaches_what_was_said()


def short(arguments, prediction):
    return 1.0 if len(prediction.answer) < 4 else 0.0


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_best_of_n_tells_its_copies_apart_by_the_name_of_the_predictor(tmp_path, adapter):
    program = dspy.BestOfN(module=dspy.Predict("question -> answer"), N=3, reward_fn=short, threshold=1.0)
    script = [("module", {"answer": "too long"}), ("module", {"answer": "yes"})]
    found = run(tmp_path, program, script, {"question": "?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "yes"}
    assert found.calls == [("module", {"question": "?"}, {"answer": answer}) for answer in ("too long", "yes")]
    assert len({call.sampling.seed for call in found.pool.calls}) == 2
    assert found.teaches_what_was_said()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_refine_advises_itself_and_the_advice_teaches_nothing(tmp_path, adapter):
    program = dspy.Refine(module=dspy.Predict("question -> answer"), N=2, reward_fn=short, threshold=1.0)
    advice = {"discussion": "too long", "advice": {"self": "be brief"}}
    script = [("module", {"answer": "too long"}), (OfferFeedback, advice), ("module", {"answer": "yes"})]
    found = run(tmp_path, program, script, {"question": "?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "yes"}
    assert found.names == ["module", "(dynamic)", "module"]
    assert found.calls[1][2] == advice and found.calls[2][1] == {"question": "?", "hint_": "be brief"}
    # The hint is no part of the program's prompt: the row teaches the better answer without it.
    assert [row["completion"][0]["content"] for row in found.taught] == [found.row["calls"][i]["text"] for i in (0, 2)]
    assert found.taught[0]["prompt"] == found.taught[1]["prompt"] == list(found.pool.calls[0].messages)
    assert (found.counts["rows"], found.counts["unnamed"]) == (2, 1)


def fetch(city: str) -> str:
    """Weather of a city."""
    return "rain in " + city


class Codes(dspy.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, question):
        return self.act(question=question)


CODERS = {
    "pot": lambda **more: dspy.ProgramOfThought("question -> answer", **more),
    "act": lambda **more: dspy.CodeAct("question -> answer", tools=[fetch], **more),
    "rlm": lambda **more: dspy.RLM("question -> answer", **more),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CODERS)
def test_modules_that_run_code_are_refused_where_deno_is_missing(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *more: None if module == "deno" else find(module, *more))
    monkeypatch.setattr(shutil, "which", lambda command: None)
    kind = type(CODERS[name]()).__name__
    (problem,) = unsupported(Codes(CODERS[name]()))
    assert problem.startswith(f"{kind} 'act' needs Deno to run code")
    assert unsupported(Codes(CODERS[name](interpreter_factory=LocalInterpreter))) == []
    with dspy.context(interpreter_factory=LocalInterpreter):
        assert unsupported(Codes(CODERS[name]())) == []
    monkeypatch.setattr(shutil, "which", lambda command: f"/bin/{command}")
    assert unsupported(Codes(CODERS[name]())) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "kind"), [("act", "CodeAct"), ("rlm", "RLM")])
def test_modules_that_cannot_be_awaited_are_refused_as_the_program(name, kind):
    (problem,) = unsupported(CODERS[name](interpreter_factory=LocalInterpreter))
    assert problem.startswith(f"{kind} cannot be awaited")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_program_of_thought_with_an_interpreter_of_its_own(tmp_path):
    program = CODERS["pot"](interpreter_factory=LocalInterpreter)
    code = {"reasoning": "add", "generated_code": "total = 2 + 2\nSUBMIT({'answer': total})"}
    script = [("code_generate.predict", code), ("generate_output.predict", {"reasoning": "so", "answer": "4"})]
    found = run(tmp_path, program, script, {"question": "2+2?"})
    assert found.row["error"] is None and found.row["prediction"]["answer"] == "4"
    assert found.names == ["code_generate.predict", "generate_output.predict"]
    assert "4" in found.calls[1][1]["code_output"]
    assert found.teaches_what_was_said()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_act_with_an_interpreter_of_its_own_inside_a_program(tmp_path):
    program = Codes(CODERS["act"](interpreter_factory=LocalInterpreter))
    step = {"generated_code": "seen = fetch('Oslo')\nseen", "finished": True}
    script = [("act.codeact", step), ("act.extractor.predict", {"reasoning": "so", "answer": "rain"})]
    found = run(tmp_path, program, script, {"question": "Oslo?"})
    assert found.row["error"] is None and found.row["prediction"]["answer"] == "rain"
    assert "rain in Oslo" in str(found.calls[1][1]["trajectory"])
    assert found.teaches_what_was_said()


def test_rlm_with_an_interpreter_of_its_own_inside_a_program(tmp_path):
    program = Codes(CODERS["rlm"](interpreter_factory=LocalInterpreter))
    action = {"reasoning": "ask", "code": "SUBMIT(answer=llm_query('2+2?'))"}
    script = [("act.generate_action", action), (dspy.Signature("question -> reply"), {"reply": "4"})]
    found = run(tmp_path, program, script, {"question": "2+2?"})
    assert found.row["error"] is None and found.row["prediction"]["answer"] == "4"
    assert found.names == ["act.generate_action", "(dynamic)"] and found.row["calls"][1]["text"] == "4"
    assert [row["predictor"] for row in found.taught] == ["act.generate_action"]
    assert found.taught[0]["prompt"] == list(found.pool.calls[0].messages)
