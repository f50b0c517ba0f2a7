"""What an examination says of the rows that it saw."""

from bt_ray.config import RunConfig, WeightStep
from bt_ray.doctor import judge_coverage, judge_rows, judge_sizes, pass_share
from bt_ray.preflight import Prepared

CONFIG = RunConfig.model_validate(
    {
        "program": "a:A",
        "metric": "a:m",
        "data": {"train": "t", "val": "v", "inputs": ["x"]},
        "rollout": {"samples": 2},
        "strategy": "w",
        "steps": {"w": {"method": "sft"}},
    }
)


def row(accept, error=None, parsed=True, tokens=10):
    call = {"predictor": "one", "outputs": {"y": "a"} if parsed else None, "prompt_token_ids": [0] * tokens}
    return {"accept": accept, "error": {"kind": error, "message": "why"} if error else None, "calls": [call]}


def said(findings):
    return {finding.what: (finding.verdict, finding.text) for finding in findings}


def test_rows_that_pass_and_rows_that_do_not_parse():
    rows = [row(True), row(True, tokens=30), row(False, "parse", parsed=False), row(False)]
    found = said(judge_rows(rows, 2.0))
    assert found["passes"] == ("ok", "2 of 4 runs pass (15% to 85% at 95 %)")
    assert found["errors: parse"] == ("warn", "1 of 4 rows, as: why")
    assert found["module one"] == ("warn", "3 of 4 answers parse; prompts of up to 30 tokens")
    assert found["speed"][1].startswith("2.0 LM calls per second")


def test_nothing_works():
    found = said(judge_rows([row(False, "program", parsed=False)] * 2, 1.0))
    assert found["passes"][0] == "warn"
    assert found["errors: program"][0] == "bad"
    assert found["module one"][0] == "bad"


def test_predictors_that_were_never_called_are_named():
    (found,) = judge_coverage([row(True), row(False, "program")], ["one", "two"])
    assert (found.what, found.verdict) == ("module two", "warn")
    assert found.text.startswith("never called in 2 runs, 1 of which ended in an error")


def test_whether_a_weight_step_has_data_and_what_the_splits_resolve():
    splits = {"train": [{}] * 20, "search": [{}] * 8, "select": [{}] * 8, "test": [{}] * 400}
    prepared = Prepared(CONFIG, splits, {})
    assert pass_share([row(True), row(False)]) == 0.5
    found = said(judge_sizes(prepared, 0.5))
    said_of_w = "about 15 of 20 training examples would have a run that passes, in 2 of the program as written"
    assert found["data for w"] == ("ok", said_of_w)
    assert found["resolution of select"][0] == "warn"
    assert found["resolution of test"][0] == "ok"
    assert said(judge_sizes(prepared, 0.0))["data for w"][0] == "bad"


def test_pairs_need_runs_that_fail_too():
    step = {"steps": {"w": WeightStep.model_validate({"method": "dpo"})}}
    prepared = Prepared(CONFIG.model_copy(update=step), {"train": [{}] * 40}, {})
    verdict, text = said(judge_sizes(prepared, 0.5))["data for w"]
    assert verdict == "ok" and text.startswith("about 20 of 40 training examples would have runs that pass and runs that do not")
    assert said(judge_sizes(prepared, 1.0))["data for w"][0] == "bad"
    assert said(judge_sizes(prepared, 0.0))["data for w"][0] == "bad"
