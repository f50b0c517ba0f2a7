"""What of DSPy a program may use, row by row of docs/programs.md: how predictors are called, frozen, watched, given LMs."""

from __future__ import annotations

import dspy
import pytest
from dspy.utils import DummyLM
from dspy.utils.callback import BaseCallback

from bt_ray.rollout.candidates import apply, extract
from bt_ray.rollout.program import unsupported
from tests.unit.test_programs_matrix import ADAPTERS, Empty, run


class Pair(dspy.Module):
    """Draft, then answer."""

    def __init__(self):
        super().__init__()
        self.draft = dspy.ChainOfThought("question -> sketch")
        self.answer = dspy.Predict("question, sketch -> answer")

    def forward(self, question):
        return self.answer(question=question, sketch=self.draft(question=question).sketch)


class AwaitedPair(Pair):
    async def aforward(self, question):
        drafted = await self.draft.acall(question=question)
        return await self.answer.acall(question=question, sketch=drafted.sketch)


SCRIPT = [("draft.predict", {"reasoning": "r", "sketch": "s"}), ("answer", {"answer": "a"})]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", [Pair, AwaitedPair])
def test_sync_and_async_programs(tmp_path, kind, adapter):
    found = run(tmp_path, kind(), SCRIPT, {"question": "?"}, adapter)
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "a"}
    assert found.calls == [
        ("draft.predict", {"question": "?"}, {"reasoning": "r", "sketch": "s"}),
        ("answer", {"question": "?", "sketch": "s"}, {"answer": "a"}),
    ]
    assert found.teaches_what_was_said()


class Repeats(dspy.Module):
    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("text -> next")

    def forward(self, text):
        for _ in range(3):
            text = self.step(text=text).next
        return dspy.Prediction(text=text)


def test_calls_of_one_predictor_keep_their_order(tmp_path):
    found = run(tmp_path, Repeats(), [("step", {"next": letter}) for letter in "bcd"], {"text": "a"})
    assert found.row["prediction"] == {"text": "d"}
    assert found.calls == [("step", {"text": old}, {"next": new}) for old, new in ("ab", "bc", "cd")]
    assert len({call.sampling.seed for call in found.pool.calls}) == 3
    assert found.teaches_what_was_said()


class Fans(dspy.Module):
    def __init__(self):
        super().__init__()
        self.one = dspy.Predict("text -> label")

    def forward(self, texts):
        pairs = [(self.one, {"text": text}) for text in texts]
        return dspy.Prediction(labels=[each.label for each in dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)])


def test_parallel_inside_a_program(tmp_path):
    found = run(tmp_path, Fans(), [("one", {"label": "x"})] * 3, {"texts": ["a", "b", "c"]})
    assert found.row["error"] is None and found.row["prediction"] == {"labels": ["x"] * 3}
    assert sorted(inputs["text"] for _, inputs, _ in found.calls) == ["a", "b", "c"]
    assert [outputs for _, _, outputs in found.calls] == [{"label": "x"}] * 3
    assert len({call.sampling.seed for call in found.pool.calls}) == 3
    assert sorted(str(row["prompt"]) for row in found.taught) == sorted(str(list(call.messages)) for call in found.pool.calls)


class Builds(Pair):
    """Makes a predictor while it runs."""

    def forward(self, question):
        drafted = dspy.ChainOfThought("question -> sketch")(question=question)
        return self.answer(question=question, sketch=drafted.sketch)


def test_a_predictor_that_is_built_while_the_program_runs(tmp_path):
    program = Builds()
    drafts = dspy.ChainOfThought("question -> sketch").predict.signature
    found = run(tmp_path, program, [(drafts, SCRIPT[0][1]), SCRIPT[1]], {"question": "?"})
    assert found.row["error"] is None and found.names == ["(dynamic)", "answer"]
    assert found.calls[0][1:] == ({"question": "?"}, SCRIPT[0][1])
    assert [row["predictor"] for row in found.taught] == ["answer"] and found.counts["unnamed"] == 1


class Frozen(Pair):
    """Its first module is compiled elsewhere and stays as it is."""

    def __init__(self):
        super().__init__()
        self.draft.predict.demos = [dspy.Example(question="1+1?", reasoning="one and one", sketch="a sum")]
        self.draft.predict.signature = self.draft.predict.signature.with_instructions("Sketch as you were taught.")
        self.draft._compiled = True


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_frozen_module_keeps_its_prompts_and_teaches_nothing(tmp_path, adapter):
    program = Frozen()
    candidate = extract(program)
    assert list(candidate["predictors"]) == ["answer"]
    found = run(tmp_path, program, SCRIPT, {"question": "?"}, adapter)
    assert found.row["error"] is None
    assert found.names == ["(fixed) draft.predict", "answer"]
    sent = " ".join(message["content"] for message in found.pool.calls[0].messages)
    assert "Sketch as you were taught." in sent and "one and one" in sent
    assert [row["predictor"] for row in found.taught] == ["answer"]
    assert (found.counts["rows"], found.counts["unnamed"], found.counts["unparsed"]) == (1, 1, 0)
    candidate["predictors"]["answer"]["instructions"] = "Other words."
    changed = apply(program, candidate)
    assert changed.answer.signature.instructions == "Other words."
    assert changed.draft.predict.signature.instructions == "Sketch as you were taught."
    assert [dict(demo) for demo in changed.draft.predict.demos] == [dict(demo) for demo in program.draft.predict.demos]


def test_a_bare_predictor_is_never_frozen_and_neither_is_a_compiled_program(tmp_path):
    program = Pair()
    program.answer._compiled = program._compiled = True
    assert list(extract(program)["predictors"]) == ["draft.predict", "answer"]
    found = run(tmp_path, program, SCRIPT, {"question": "?"})
    assert found.names == ["draft.predict", "answer"] and found.teaches_what_was_said()


def test_a_program_without_a_predictor_to_improve_is_refused():
    program = Frozen()
    assert unsupported(program) == []
    program.answer = None
    for nothing in (Empty(), program):
        (problem,) = unsupported(nothing)
        assert problem.startswith("The program has no predictor to improve")


def test_an_lm_of_one_predictor_is_refused_by_name():
    program = Pair()
    program.answer.lm = DummyLM([{"answer": "a"}])
    (problem,) = unsupported(program)
    assert problem.startswith("Predict 'answer' has an LM that others lack")
    frozen = Frozen()
    frozen.draft.predict.lm = DummyLM([{"answer": "a"}])
    (problem,) = unsupported(frozen)
    assert problem.startswith("Predict 'draft.predict' has an LM that others lack")


def test_one_lm_for_the_whole_program_gives_way_to_the_pool(tmp_path):
    program = Pair()
    program.set_lm(dspy.LM("openai/none", api_base="http://127.0.0.1:9"))
    assert unsupported(program) == []
    assert unsupported(program.deepcopy()) == []
    program.answer.lm = dspy.LM("openai/none", api_base="http://127.0.0.1:9")  # equal, as after program.load
    assert unsupported(program) == []
    found = run(tmp_path, program, SCRIPT, {"question": "?"})
    assert found.names == ["draft.predict", "answer"] and found.teaches_what_was_said()
    program.answer.lm = dspy.LM("openai/other", api_base="http://127.0.0.1:9")
    assert {text.split(" has ")[0] for text in unsupported(program)} == {"Predict 'draft.predict'", "Predict 'answer'"}


class Judged(Pair):
    """Asks another LM for one of its calls."""

    def forward(self, question):
        sketch = self.draft(question=question).sketch
        with dspy.context(lm=DummyLM([{"answer": "from outside"}]), adapter=dspy.ChatAdapter()):
            return self.answer(question=question, sketch=sketch)


def test_a_call_under_another_lm_goes_there_and_is_not_recorded(tmp_path):
    found = run(tmp_path, Judged(), SCRIPT[:1], {"question": "?"})
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "from outside"}
    assert found.names == ["draft.predict"] and len(found.pool.calls) == 1
    assert found.teaches_what_was_said()


class Reformats(Pair):
    """Has one of its calls written in a format of its own."""

    def forward(self, question):
        sketch = self.draft(question=question).sketch
        with dspy.context(adapter=dspy.ChatAdapter()):
            return self.answer(question=question, sketch=sketch)


def test_a_call_in_a_format_of_its_own_runs_and_teaches_nothing(tmp_path):
    script = [*SCRIPT, ("answer", {"answer": "a"})]
    found = run(tmp_path, Reformats(), script, {"question": "?"}, "chat")
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "a"}
    assert found.calls[1] == ("answer", {}, None)
    assert (found.counts["rows"], found.counts["unparsed"]) == (1, 1)


def test_lm_and_adapter_of_dspys_settings_give_way_to_the_runs(tmp_path):
    with dspy.context(lm=DummyLM([{"answer": "from outside"}]), adapter=dspy.XMLAdapter()):
        found = run(tmp_path, Pair(), SCRIPT, {"question": "?"})
    assert found.row["prediction"] == {"answer": "a"} and len(found.pool.calls) == 2
    assert found.pool.calls[0].messages[-1]["content"] == "question: ?"  # the compact format


def test_several_completions_of_one_call(tmp_path):
    program = dspy.Predict("question -> answer", n=3)
    found = run(tmp_path, program, [("self", {"answer": letter}) for letter in "abc"], {"question": "?"})
    assert found.row["error"] is None and found.row["prediction"] == {"answer": "a"}
    assert found.calls == [("self", {"question": "?"}, {"answer": letter}) for letter in "abc"]
    assert {call.sampling.temperature for call in found.pool.calls} == {0.7}  # DSPy's own choice
    assert len({call.sampling.seed for call in found.pool.calls}) == 3
    assert found.teaches_what_was_said()


class Log(BaseCallback):
    def __init__(self):
        self.seen = []

    def on_module_start(self, call_id, instance, inputs):
        self.seen.append(type(instance).__name__)

    def on_lm_end(self, call_id, outputs, exception=None):
        self.seen.append("LM")


@pytest.mark.parametrize("kind", [Pair, AwaitedPair])
def test_callbacks_in_dspys_settings_are_called(tmp_path, kind):
    log = Log()
    before = dspy.settings.callbacks
    dspy.configure(callbacks=[log])
    try:
        found = run(tmp_path, kind(), SCRIPT, {"question": "?"})
    finally:
        dspy.configure(callbacks=before)
    assert found.row["error"] is None
    assert log.seen == [kind.__name__, "ChainOfThought", "Predict", "LM", "Predict", "LM"]


def test_callbacks_of_a_module_are_refused_by_name():
    program = Pair()
    program.draft.predict.callbacks.append(Log())
    (problem,) = unsupported(program)
    assert problem.startswith("Predict 'draft.predict': a module's callbacks are lost when it is copied")
    assert program.deepcopy().draft.predict.callbacks == []  # DSPy's own copy drops them
