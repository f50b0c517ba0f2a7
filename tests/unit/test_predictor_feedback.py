"""Metrics that say something of single predictors, as GEPA's do."""

from __future__ import annotations

import dspy
import pytest

from bt_ray.rollout.feedback import Said, attach
from tests.support import programs
from tests.support.stub_pool import StubPool
from tests.unit.test_runner import run, spec, task


def by_predictor(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """As GEPA's metrics: words on one predictor where it is asked about one."""
    if pred_name is None:
        return dspy.Prediction(score=0.5, feedback="of all")
    ((_, inputs, output),) = pred_trace
    assert len(trace) == 2 and inputs["message"] == gold.message
    said = None if pred_name == "route" and gold.message == "my card 4 is gone" else f"{pred_name} said {output.toDict()}"
    return dspy.Prediction(score=0.1, feedback=said)


@pytest.mark.parametrize("program", ["TwoModules", "TwoModulesAsync"])
def test_a_metric_that_takes_a_predictor_is_asked_about_each_where_it_is_wanted(program):
    the_spec = spec(program, f"{__name__}:by_predictor")
    plain, asked, silent = run(the_spec, StubPool(programs.answer), task(3), *(task(n, by_predictor=True) for n in (3, 4)))
    assert [call.get("feedback") for call in plain["calls"]] == [None, None]
    assert [call["feedback"] for call in asked["calls"]] == [
        "route said {'department': 'cards'}",
        "classify said {'intent': 'card_lost'}",
    ]
    assert (asked["score"], asked["feedback"], asked["error"]) == (0.5, "of all", None)
    assert "feedback" not in silent["calls"][0] and silent["calls"][1]["feedback"].startswith("classify")


def test_a_metric_of_three_arguments_is_asked_once_a_run():
    (row,) = run(spec(), StubPool(programs.answer), task(3, by_predictor=True))
    assert row["score"] == 1.0 and not any("feedback" in call for call in row["calls"])


def test_words_go_to_the_call_that_they_are_about():
    calls = [
        {"predictor": "a", "inputs": {"x": number}, "outputs": out} for number, out in ((1, None), (1, {}), (2, {}), (2, {}))
    ]
    attach(calls, [Said("a", {"x": 2}, "two"), Said("a", {"x": 1}, "one"), Said("a", {"x": 2}, "two again"), Said("b", {}, "no")])
    assert [call.get("feedback") for call in calls] == [None, "one", "two", "two again"]
