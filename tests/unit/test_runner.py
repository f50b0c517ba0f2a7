from __future__ import annotations

import asyncio
import json
import threading

import dspy
import pytest

from bt_ray.errors import CanaryError, PoolError, PromptTooLongError
from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.dspy_engine import Binding, BoundProgram, LoopThread
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.runner import ProgramRunner, RolloutTask
from tests.support import programs
from tests.support.stub_pool import BASE, StubPool

HERE = "tests.support.programs"
CANDIDATE = extract(programs.TwoModules())


def spec(program="TwoModules", metric=f"{HERE}:exact", **more):
    return ProgramSpec(f"{HERE}:{program}", metric, adapter="compact", **more)


def task(number=0, sample=0, **more):
    values = {"example": programs.example(number), "candidate": CANDIDATE, "weights": BASE, "temperature": 1.0, "max_tokens": 16}
    return RolloutTask(**{**values, "sample": sample, "seed": 7, **more})


def run(the_spec, pool, *tasks):
    async def all_of_them():
        runner = ProgramRunner(the_spec, pool)
        return await asyncio.gather(*(runner.run(t) for t in tasks))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync"])
def test_a_row_holds_the_calls_the_prediction_and_the_score(program):
    pool = StubPool(programs.answer)
    (row,) = run(spec(program, constrain=True), pool, task(3, sample=1))
    assert json.loads(json.dumps(row)) == row
    assert {
        key: row[key] for key in ("example_id", "sample", "weights_id", "prediction", "score", "accept", "feedback", "error")
    } == {
        "example_id": "e3",
        "sample": 1,
        "weights_id": "base0000",
        "prediction": {"intent": "card_lost"},
        "score": 1.0,
        "accept": True,
        "feedback": None,
        "error": None,
    }
    first, second = row["calls"]
    assert (first["predictor"], first["inputs"], first["outputs"], first["text"]) == (
        "route",
        {"message": "my card 3 is gone"},
        {"department": "cards"},
        "cards",
    )
    assert (second["predictor"], second["inputs"]["department"], second["outputs"]) == (
        "classify",
        "cards",
        {"intent": "card_lost"},
    )
    assert first["token_ids"] and first["prompt_token_ids"] and first["finish_reason"] == "stop"
    sampling = pool.calls[0].sampling
    assert sampling.stop == ("\n",) and sampling.constraint == {"choice": ["cards", "transfers"]}
    assert (sampling.temperature, sampling.max_tokens) == (1.0, 16)


def test_seeds_are_stable_and_differ_by_call_sample_and_example():
    pools = [StubPool(programs.answer), StubPool(programs.answer)]
    for pool in pools:
        run(spec(), pool, task(0), task(0, sample=1), task(1))
    seeds = [{(c.messages[-1]["content"], c.sampling.seed) for c in pool.calls} for pool in pools]
    assert seeds[0] == seeds[1]
    assert len({seed for _, seed in seeds[0]}) == 6
    greedy = StubPool(programs.answer)
    run(spec(), greedy, task(0, temperature=0.0))
    assert [c.sampling.seed for c in greedy.calls] == [None, None]


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync"])
def test_many_runs_are_in_flight_together_and_keep_their_calls_apart(program):
    pool = StubPool(programs.answer, delay_s=0.02)
    rows = run(spec(program), pool, *(task(number) for number in range(60)))
    assert pool.peak == 60
    for number, row in enumerate(rows):
        assert [call["inputs"]["message"] for call in row["calls"]] == [f"my card {number} is gone"] * 2


def test_candidates_change_the_prompt():
    pool = StubPool(programs.answer)
    demo = {"message": "m", "department": "transfers"}
    changed = {"predictors": {**CANDIDATE["predictors"], "route": {"instructions": "Sort.", "demos": [demo]}}}
    run(spec(), pool, task(candidate=changed))
    assert [m["content"] for m in pool.calls[0].messages][:3] == [
        "Sort.\ndepartment: one of cards, transfers",
        "message: m",
        "transfers",
    ]


def test_an_answer_that_does_not_parse_costs_its_row_alone_and_one_call():
    pool = StubPool(lambda messages: "no idea" if "card 1" in messages[-1]["content"] else programs.answer(messages))
    good, bad = run(spec(), pool, task(0), task(1))
    assert good["error"] is None
    assert bad["error"]["kind"] == "parse" and "no idea" in bad["error"]["message"] and len(bad["error"]["message"]) <= 500
    assert (bad["accept"], bad["score"], bad["prediction"]) == (False, None, None)
    assert [(c["predictor"], c["text"], c["outputs"]) for c in bad["calls"]] == [("route", "no idea", None)]


def test_a_program_that_raises_costs_its_row_alone():
    marked = programs.example(1, "RAISE my card")
    good, bad = run(spec("RaisesOnMark"), StubPool(programs.answer), task(0), task(example=marked))
    assert good["error"] is None
    assert bad["error"] == {"kind": "program", "message": "KeyError: 'the message is marked'"}


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync", "Swallows"])
@pytest.mark.parametrize("error", [PoolError("no replica"), CanaryError("wrong weights")])
def test_the_pools_faults_are_never_rows(program, error):
    def fail(messages):
        raise error

    with pytest.raises(type(error), match=str(error)):
        run(spec(program), StubPool(fail), task())


def test_unknown_faults_of_the_pool_and_foreign_weights_are_pool_errors():
    with pytest.raises(PoolError, match="KeyError"):
        run(spec("Swallows"), StubPool(lambda messages: {}["x"]), task())
    with pytest.raises(PoolError, match="weights other where base0000"):
        run(spec(), StubPool(programs.answer, weights_id="other"), task())


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync"])
def test_a_prompt_that_is_too_long_is_a_row_error(program):
    def fail(messages):
        raise PromptTooLongError("900 tokens, 512 fit")

    (row,) = run(spec(program), StubPool(fail), task())
    assert row["error"]["kind"] == "prompt_too_long" and "900 tokens" in row["error"]["message"]


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync"])
def test_a_slow_program_is_a_row_error_and_its_call_is_cancelled(program):
    pool = StubPool(programs.answer, delay_s=60.0)
    (row,) = run(spec(program, timeout_s=0.1), pool, task())
    assert row["error"] == {"kind": "timeout", "message": "the program ran longer than 0.1 s"}
    assert pool.cancelled == 1


def test_cancelling_a_rollout_cancels_the_pools_call():
    pool = StubPool(programs.answer, delay_s=60.0)

    async def cancel():
        running = asyncio.create_task(ProgramRunner(spec(), pool).run(task()))
        while not pool.in_flight:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        while not pool.cancelled:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(cancel(), 10))


METRICS = """
import dspy, threading
def strict(example, prediction, trace=None): return 0.4 if trace is not None else 1.0
def counts_trace(example, prediction, trace=None): return 1.0 if trace is None else float(len(trace))
def feedback(example, prediction): return dspy.Prediction(score=0.5, feedback="half")
def nan(example, prediction): return float("nan")
def none(example, prediction): return None
def text(example, prediction): return "1.0"
def raises(example, prediction): raise IndexError("x" * 900)
def hangs(example, prediction): threading.Event().wait(5)
def asks(example, prediction): return dspy.Predict("question -> verdict: bool")(question="is the card good?").verdict
"""


@pytest.fixture
def metric(tmp_path):
    (tmp_path / "judges.py").write_text(METRICS)
    return lambda name, **more: spec(metric=f"judges.py:{name}", base_dir=str(tmp_path), **more)


def test_acceptance_is_the_metric_with_a_trace_against_the_threshold(metric):
    pool = StubPool(programs.answer)
    (row,) = run(metric("strict", metric_threshold=0.5), pool, task())
    assert (row["score"], row["accept"]) == (1.0, False)
    (row,) = run(metric("strict", metric_threshold=0.4), pool, task())
    assert row["accept"] is True
    (row,) = run(metric("counts_trace", metric_threshold=2.0), pool, task())
    assert row["accept"] is True
    (row,) = run(metric("feedback"), pool, task())
    assert (row["score"], row["feedback"], row["accept"]) == (0.5, "half", True)


@pytest.mark.parametrize("name", ["nan", "none", "text", "raises", "hangs"])
def test_a_bad_metric_is_a_row_error_that_names_the_row(metric, name):
    timeout = {"timeout_s": 0.1} if name == "hangs" else {}
    (row,) = run(metric(name, **timeout), StubPool(programs.answer), task(4))
    assert row["error"]["kind"] == "metric" and row["accept"] is False and row["score"] is None
    assert row["prediction"] == {"intent": "card_lost"} and len(row["calls"]) == 2
    assert len(row["error"]["message"]) <= 500
    if name in ("nan", "none", "text"):
        assert "'e4', sample 0" in row["error"]["message"]


def test_a_metrics_own_calls_are_greedy_and_no_part_of_the_row(metric):
    pool = StubPool(lambda messages: "True" if "question" in messages[-1]["content"] else programs.answer(messages))
    (row,) = run(metric("asks"), pool, task())
    assert row["score"] == 1.0 and len(row["calls"]) == 2
    assert [call.sampling.temperature for call in pool.calls] == [1.0, 1.0, 0.0]


def test_chain_of_thought_is_recorded_as_text():
    pool = StubPool(lambda messages: "reasoning: because\nanswer: yes")
    reasons = spec("Reasons")
    example = {"id": "q", "inputs": {"question": "?"}, "labels": {"intent": "yes"}}
    (row,) = run(reasons, pool, task(example=example, candidate=extract(programs.Reasons())))
    assert row["calls"][0]["predictor"] == "think.predict"
    assert row["calls"][0]["outputs"] == {"reasoning": "because", "answer": "yes"}
    assert row["error"]["kind"] == "metric"  # `exact` wants an intent: the program's part stands all the same


class Best(dspy.Module):
    """Copies its inner program for every try, as dspy.Refine does too."""

    def __init__(self):
        super().__init__()
        self.best = dspy.BestOfN(module=programs.TwoModules(), N=2, reward_fn=lambda args, pred: 0.0, threshold=1.0)

    def forward(self, message):
        return self.best(message=message)


def test_predictors_in_copies_keep_their_names(tmp_path):
    (tmp_path / "best.py").write_text("from tests.unit.test_runner import Best\n")
    pool = StubPool(programs.answer)
    best = ProgramSpec("best.py:Best", f"{HERE}:exact", adapter="compact", base_dir=str(tmp_path))
    (row,) = run(best, pool, task(candidate=extract(Best()), temperature=0.0))
    assert row["error"] is None
    assert [call["predictor"] for call in row["calls"]] == ["best.module.route", "best.module.classify"] * 2
    assert len({call.sampling.seed for call in pool.calls}) == 4  # BestOfN sets its own temperature


class Fans(programs.TwoModules):
    def forward(self, message):
        pairs = [(self.route, {"message": message})] * 3
        dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)
        return super().forward(message)


def test_calls_from_dspys_own_threads_belong_to_the_rollout(tmp_path):
    (tmp_path / "fans.py").write_text("from tests.unit.test_runner import Fans\n")
    fans = ProgramSpec("fans.py:Fans", f"{HERE}:exact", adapter="compact", constrain=True, base_dir=str(tmp_path))
    pool = StubPool(programs.answer)
    (row,) = run(fans, pool, task())
    assert row["error"] is None
    assert [call["predictor"] for call in row["calls"]] == ["route"] * 4 + ["classify"]
    assert all(call["outputs"] and call["inputs"]["message"] == "my card 0 is gone" for call in row["calls"])
    assert len({call.sampling.seed for call in pool.calls}) == 5


class Blocks(programs.TwoModules):
    async def aforward(self, message):
        return self.route(message=message)


def test_a_blocking_call_in_an_async_program_says_what_to_write(tmp_path):
    (tmp_path / "blocks.py").write_text("from tests.unit.test_runner import Blocks\n")
    blocking = ProgramSpec("blocks.py:Blocks", f"{HERE}:exact", adapter="compact", base_dir=str(tmp_path))
    (row,) = run(blocking, StubPool(programs.answer), task())
    assert row["error"]["kind"] == "program" and "acall" in row["error"]["message"]


def test_a_bound_program_answers_outside_a_rollout():
    pool = StubPool(programs.answer)
    thread = LoopThread()
    bound = BoundProgram(programs.TwoModulesAsync(), Binding(pool, BASE, make_adapter("compact", True)), thread)
    assert bound(message="my card is gone").intent == "card_lost"
    assert asyncio.run(bound.acall(message="my card is gone")).intent == "card_lost"
    assert bound.deepcopy()(message="a transfer").intent == "transfer_failed"
    pool.answer = lambda messages: {}["x"]
    with pytest.raises(PoolError):
        bound(message="my card is gone")
    assert any(t.name == "bt_ray-lm" for t in threading.enumerate())
    thread.close()
