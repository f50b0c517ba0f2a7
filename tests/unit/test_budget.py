"""A budget that does not pay: refused before the run, ended within a search, and never a failure."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bt_ray.config import PromptStep
from bt_ray.errors import BudgetError
from bt_ray.planning import budget_problem
from bt_ray.runs.files import write_atomic
from bt_ray.runs.run_dir import RunDir
from bt_ray.search.base import ListSearcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.ledger import Ledger
from bt_ray.search.racing import StopRule
from bt_ray.stages import prompt
from bt_ray.stages.allowance import Allowance
from bt_ray.stages.context import StageContext
from tests.support.plans import config
from tests.support.spending import spend

SIZES = {"train": 10, "search": 4, "select": 5, "test": 9}


def budget(calls, **changes):
    return config(budget={"max_lm_calls": calls}, **changes)


def test_a_budget_below_one_candidate_is_refused_with_the_numbers():
    said = budget_problem(budget(39), SIZES, 2.0)
    assert said.startswith("budget.max_lm_calls: 39 cannot pay for one candidate of a prompt search. That takes about 40: 12 for")
    assert "20 for the rollouts on train, and 8 for the candidate on the 4 search examples (2 calls a run)" in said
    assert budget_problem(budget(40), SIZES, 2.0) is None
    assert budget_problem(budget(1, strategy="w"), SIZES, 2.0) is None, "no prompt step"
    assert budget_problem(config(), SIZES, 2.0) is None


def test_a_budget_must_pay_for_what_the_smallest_prompt_step_draws():
    steps = {"p": {"optimizer": "labeled", "max_train_examples": 6, "max_search_examples": 3}, "q": {"optimizer": "labeled"}}
    said = budget_problem(budget(29, steps=steps, strategy=["q", "p"]), SIZES, 2.0)
    assert "takes about 30: 12 for" in said and "12 for the rollouts on train, and 6 for the candidate on the 3 search" in said
    assert budget_problem(budget(30, steps=steps, strategy=["q", "p"]), SIZES, 2.0) is None
    assert "takes about 40" in budget_problem(budget(30, steps=steps, strategy="q"), SIZES, 2.0)
    large = {"p": {"optimizer": "labeled", "max_train_examples": 99, "max_search_examples": 99}}
    assert "takes about 40" in budget_problem(budget(39, steps=large, strategy="p"), SIZES, 2.0)


def candidate(name):
    return {"predictors": {"one": {"instructions": name, "demos": []}}}


def allowance(tmp_path, calls, spent=0, done=0, committed=10):
    """Of a search on 4 examples with 2 calls a run; an evaluation on select costs 12."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    spend(root, committed)
    examples = {name: [{}] * number for name, number in SIZES.items()}
    ctx = SimpleNamespace(config=budget(calls), examples=examples.get, run=SimpleNamespace(root=root))
    return Allowance(ctx, ctx.config.steps["p"], 2.0, lambda _: done, lambda: spent)


def test_what_is_left_must_pay_for_the_candidate_and_its_evaluation(tmp_path):
    assert allowance(tmp_path, 30).unaffordable(candidate("a"), 0) is None
    assert allowance(tmp_path, 29).unaffordable(candidate("a"), 0) == (
        "budget.max_lm_calls 29 has 19 calls left, and one more candidate takes about 8 on the 4 search examples and 12 on select"
    )
    assert "has 16 calls left" in allowance(tmp_path, 30, spent=4).unaffordable(candidate("a"), 0)
    assert "has 14 calls left" in allowance(tmp_path, 30).unaffordable(candidate("a"), 3), "others lack three examples"
    assert allowance(tmp_path, 26, done=2).unaffordable(candidate("a"), 0) is None, "half of it is scored"
    assert allowance(tmp_path, 10, done=4).unaffordable(candidate("a"), 9) is None, "what is scored costs nothing"
    drawn = replace(allowance(tmp_path, 25), step=PromptStep(optimizer="labeled", max_search_examples=2))
    assert "about 4 on the 2 search examples and 12 on select" in drawn.unaffordable(candidate("a"), 0)
    assert replace(drawn, done=lambda _: 2).unaffordable(candidate("a"), 0) is None


def test_calls_a_run_are_those_of_the_rollouts(tmp_path):
    rows = [{"calls": [{}, {}, {}]}, {"calls": [{}]}]
    assert Allowance.of(None, None, rows, lambda _: 0).calls_per_run == 2.0


def test_no_candidate_is_started_that_the_budget_cannot_pay_for():
    ledger, owed = Ledger(["a", "b"], (0.5,), StopRule(0.05)), []

    def unaffordable(found, lacking):
        owed.append(lacking)
        return "it costs 4 and 3 are left" if len(owed) > 2 else None

    conduct = Conduct(ListSearcher([{"label": name, "candidate": candidate(name)} for name in "xyz"]), ledger, None, unaffordable)
    first = conduct.next()
    ledger.record(first.candidate_id, 0, {"a": 1.0}, 0.1)
    assert conduct.next().label == "y"
    assert conduct.next() is Answer.END and conduct.next() is Answer.END
    assert owed == [0, 1, 1 + 2] and conduct.over_budget == "it costs 4 and 3 are left"
    ledger.record(first.candidate_id, 1, {"b": 1.0}, 0.1)
    conduct.close()
    assert ledger.best().label == "x", "what was scored stays"
    assert "1 candidates were not run, the first (z) because it costs 4 and 3 are left." in ledger.notes()


def test_a_prompt_stage_that_the_budget_ends_is_skipped_until_there_is_another_budget(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.create(budget(50), {}, {})

    def publish(outcome, records):
        write_atomic(run.stage("p") / "record.json", json.dumps({"id": "p", **outcome, "steps": [one.name for one in records]}))

    def search(*_):
        raise BudgetError("budget.max_lm_calls 50 has 3 calls left.")

    teacher = SimpleNamespace(record=SimpleNamespace(name="rollout-a"), rows=[])
    monkeypatch.setattr(prompt, "teacher_rollouts", lambda *_: teacher)
    monkeypatch.setattr(prompt, "search", search)
    start = SimpleNamespace(candidate=candidate("a"), weights=None)
    ctx = SimpleNamespace(config=run.config(), incoming=lambda: start, vanilla=candidate("a"), publish=publish)
    prompt.run(ctx, run.config().steps["p"])
    record = run.stage_record("p")
    assert (record["status"], record["steps"]) == ("skipped", ["rollout-a"])
    assert record["note"] == "stopped by the budget: budget.max_lm_calls 50 has 3 calls left."
    run.write_header(budget(90), {})
    assert run.stage_record("p") is None, "it is tried again"


@pytest.mark.parametrize("record", [{"id": "p", "status": "done"}, {"id": "p", "status": "skipped"}])
def test_other_records_do_not_depend_on_the_budget(tmp_path, record):
    run = RunDir(tmp_path)
    run.create(budget(50), {}, {})
    write_atomic(run.stage("p") / "record.json", json.dumps(record))
    run.write_header(budget(90), {})
    assert run.stage_record("p") == record


def test_without_a_budget_nothing_is_looked_up():
    def untouched(*_):
        raise AssertionError("read for no budget")

    ctx = SimpleNamespace(config=config(), examples=untouched)
    assert Allowance(ctx, ctx.config.steps["p"], 2.0, untouched, untouched).unaffordable(candidate("a"), 0) is None


def test_runs_of_the_program_that_the_budget_does_not_pay_for_are_not_begun(tmp_path):
    spend(tmp_path, 10)

    def check(calls, num_runs):
        run = SimpleNamespace(root=tmp_path)
        StageContext.check_budget(SimpleNamespace(config=budget(calls), run=run, _calls_per_run=lambda: 2.0), num_runs)

    check(30, 10)
    check(28, 10)  # so far the guess may be off
    said = "max_lm_calls 27 has 17 calls left, and the next 10 runs of the program take about 20. Raise it and run again."
    with pytest.raises(BudgetError, match=said):
        check(27, 10)
    check(27, 0)
    with pytest.raises(BudgetError, match="is used up"):
        check(10, 0)


def test_calls_of_a_run_are_those_of_vanilla_once_it_is_there(tmp_path):
    run = RunDir(tmp_path)
    run.create(config(), {"signatures": {"one": {}, "two": {}, "three": {}}}, {"select": [{}, {}, {}]})
    ctx = SimpleNamespace(run=run, identity=run.header()["identity"], examples=run.examples)
    assert StageContext._calls_per_run(ctx) == 3.0
    name = spend(tmp_path, 10)
    write_atomic(run.stage("vanilla") / "record.json", json.dumps({"id": "vanilla", "status": "done", "evaluate": name}))
    assert StageContext._calls_per_run(ctx) == 2.5, "three examples and the followed one"
