"""The session in which an optimiser of DSPy runs the program; a stub pool, no Ray."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from bt_ray.lm.journal import JournalPool
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.session import ProgramSession
from tests.support import programs
from tests.support.compiling import SEARCH, STUDENT, TRAIN, context, pool, proposals, session
from tests.support.stub_pool import BASE, StubPool


def ask_all(journal: JournalPool, ask: Any, **fields: Any) -> Any:
    """What `ask` returns inside a session."""
    found = []

    def work(program: Any, metric: Any, trainset: Any, valset: Any) -> Any:
        found.append(ask(program, metric, trainset))
        return program

    assert session(journal, **fields).compile(STUDENT, TRAIN, SEARCH, work) == STUDENT
    return found[0]


def test_equal_requests_have_one_answer_unless_their_rollout_id_differs(tmp_path: Path) -> None:
    inner, journal = pool(tmp_path)

    def ask(program: Any, metric: Any, trainset: Any) -> Any:
        lm = dspy.settings.lm.copy(temperature=1.0)
        for rollout_id in (0, 0, 1, 2, 1):
            lm.copy(rollout_id=rollout_id)("a b c 4")
        lm("a b c 4", n=3)
        dspy.settings.lm("a b c 4")
        lm("a b c 4", rollout_id=2)

    ask_all(journal, ask)
    seeds = [call.sampling.seed for call in inner.calls]
    assert len(seeds) == 3 + 2 + 1  # three ids, two further completions, the greedy one
    assert seeds[-1] is None and len(set(seeds)) == 6
    other, journal = pool(tmp_path / "other")
    ask_all(journal, ask, seed=5)
    assert not {call.sampling.seed for call in other.calls} & set(seeds[:-1])


def test_token_limits_and_temperature(tmp_path: Path) -> None:
    inner, journal = pool(tmp_path)

    def ask(program: Any, metric: Any, trainset: Any) -> Any:
        program(message="my card 1 is gone")
        dspy.Predict("question -> answer")(question="a b 4")
        dspy.Predict("question -> answer", max_tokens=5, temperature=0.5)(question="a b 4")

    ask_all(journal, ask, max_tokens=16, proposer_max_tokens=99)
    assert [call.sampling.max_tokens for call in inner.calls] == [16, 16, 99, 5]
    assert [call.sampling.temperature for call in inner.calls] == [0.0, 0.0, 0.0, 0.5]


def test_the_metric_says_whether_a_run_passes_where_it_gets_a_trace(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def half(example, prediction, trace=None):\n    return 0.5\n")
    _, journal = pool(tmp_path)
    verdicts = []

    def work(program: Any, metric: Any, trainset: Any, valset: Any) -> Any:
        verdicts.append((metric(trainset[0], None), metric(trainset[0], None, [])))
        return program

    for threshold in (None, 0.5, 0.6):
        spec = ProgramSpec(
            "tests.support.programs:TwoModules", "judge.py:half", base_dir=str(tmp_path), metric_threshold=threshold
        )
        ProgramSession(spec, journal, BASE).compile(STUDENT, TRAIN, SEARCH, work)
    assert verdicts == [(0.5, 0.5), (0.5, True), (0.5, False)]


def test_a_metric_that_takes_a_predictor_is_asked_about_it_by_the_optimiser(tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "def named(gold, pred, trace=None, pred_name=None, pred_trace=None):\n    return pred_name or 0\n"
    )
    _, journal = pool(tmp_path)
    said = []

    def work(program: Any, metric: Any, trainset: Any, valset: Any) -> Any:
        said.append((metric(trainset[0], None), metric(trainset[0], None, [], "route", [])))
        return program

    spec = ProgramSpec("tests.support.programs:TwoModules", "named.py:named", base_dir=str(tmp_path))
    ProgramSession(spec, journal, BASE).compile(STUDENT, TRAIN, SEARCH, work)
    assert said == [(0, "route")]


def test_examples_keep_inputs_and_labels_apart(tmp_path: Path) -> None:
    _, journal = pool(tmp_path)
    examples = ask_all(journal, lambda program, metric, trainset: trainset)
    assert [example.inputs().toDict() for example in examples] == [row["inputs"] for row in TRAIN]
    assert [example.labels().toDict() for example in examples] == [row["labels"] for row in TRAIN]


def test_runs_that_fail_do_not_end_a_compile_and_are_in_no_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """DSPy gives an optimiser up after ten examples that fail, and logs each; with a small model that is the usual case."""
    inner = StubPool(lambda messages: "no idea")
    spec = ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact", adapter="compact")
    run = ProgramSession(spec, JournalPool(inner, tmp_path / "c.jsonl"), BASE)
    many = [programs.example(number) for number in range(30)]
    base = context(None, "dspy.BootstrapFewShot", options={"max_labeled_demos": 0})
    found = proposals(replace(base, compile=functools.partial(run.compile, STUDENT, many, SEARCH)))
    assert found["dspy.BootstrapFewShot"] == STUDENT["predictors"]
    assert len(inner.calls) == 30
    said = capfd.readouterr()
    assert not [row for row in many if row["inputs"]["message"] in said.out + said.err]
