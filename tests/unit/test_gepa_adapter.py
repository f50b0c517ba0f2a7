"""What gepa is lent: records for the reflecting LM, options, and merges that do not depend on the process; no Ray."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.errors import ConfigError
from bt_ray.rollout.evaluator import RowEvaluator
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.worker import ProgramWorker
from bt_ray.search.base import SearchContext, build_searcher, check_optimizer
from bt_ray.search.gepa_adapter import Book, RowsAdapter, reflective_record, to_texts
from tests.support.compiling import STUDENT, TRAIN
from tests.support.gepa_problem import NUM_SEARCH, NUM_TRAIN, Planted, best_score, propose_all, search
from tests.support.programs import answer
from tests.support.stub_pool import BASE, StubPool

# Merges


class Merging(Planted):
    """Two children of the student are right on different examples; they differ in `a` and `b`, and one also in `c`.

    Both have the same mean, so a merge draws which child's `a` and `b` it takes.
    """

    def __init__(self) -> None:
        super().__init__(parts=("a", "b", "c"))
        self.written = dict.fromkeys(self.parts, 0)

    def score(self, texts: dict[str, str], number: int) -> tuple[float, str]:
        kinds = [text[-1] for text in texts.values()]
        if kinds == ["0", "0", "0"]:
            return 0.375, "dull"
        if kinds == ["1", "1", "0"]:
            return (0.75 if number % 2 else 0.25), "even"
        if kinds == ["2", "2", "2"]:
            return (0.25 if number % 2 else 0.75), "odd"
        return (1.0 if texts["c"] == "c2" else 0.0), "merged"

    def ask(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        now = re.search(r"```\n(\w)(\d)\n```", prompts[0])
        assert now is not None
        part, kind = now.groups()
        if kind != "0":
            return [f"```\n{part}9\n```"]
        self.written[part] += 1
        child = 1 + (self.written[part] - 1) % 2
        return [f"```\n{part}{0 if (part, child) == ('c', 1) else child}\n```"]

    def context(self, seed: int = 0, **step: Any) -> SearchContext:
        context = super().context(
            seed, num_candidates=12, options={"module_selector": "all", "reflection_minibatch_size": 12}, **step
        )
        for part in self.parts:
            context.student["predictors"][part]["instructions"] = f"{part}0"
        return context


def merged_prompts() -> list[str]:
    """Merged instructions of 10 searches."""
    found = []
    for seed in range(10):
        problem = Merging()
        _, ledger = search(problem, problem.context(seed))
        merges = [entry.candidate["predictors"] for entry in ledger.entries.values() if entry.label.startswith("merge")]
        found += ["".join(predictor["instructions"] for predictor in predictors.values()) for predictors in merges]
    return found


class FromNothing(Planted):
    """The student scores 0, and two grandchildren less than their parent: they are merged over the student."""

    def __init__(self) -> None:
        super().__init__(parts=("a", "b"))

    def score(self, texts: dict[str, str], number: int) -> tuple[float, str]:
        right = {
            ("a1", "b0"): range(4),
            ("a1", "b1"): (4, *range(NUM_SEARCH, NUM_TRAIN)),
            ("a2", "b0"): (5, *range(NUM_SEARCH, NUM_TRAIN)),
            ("a2", "b1"): range(NUM_TRAIN),
        }
        return float(number in right.get((texts["a"], texts["b"]), ())), "wrong or not"

    def ask(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        now = re.search(r"```\n(\w)(\d)\n```", prompts[0])
        assert now is not None
        return [f"```\n{now.group(1)}{int(now.group(2)) + 1}\n```"]

    def context(self, seed: int = 0, **step: Any) -> SearchContext:
        context = super().context(seed, options={"reflection_minibatch_size": NUM_TRAIN}, **step)
        for part in self.parts:
            context.student["predictors"][part]["instructions"] = f"{part}0"
        return context


def test_candidates_merge_also_over_an_ancestor_without_any_score() -> None:
    merges = []
    for seed in range(10):
        problem = FromNothing()
        searcher, ledger = search(problem, problem.context(seed))
        assert best_score(ledger) == 1.0
        merges += [entry for entry in searcher.lineage if len(entry["parents"]) == 2]
    assert any(entry["label"].startswith("merge") and entry["score"] == 1.0 for entry in merges)


def test_merges_do_not_depend_on_the_process() -> None:
    """gepa goes through a set of predictor names, whose order differs between processes for plain strings."""
    code = "import sys, json, importlib.util as u; s = u.spec_from_file_location('t', sys.argv[1]); m = u.module_from_spec(s)\n"
    code += "sys.modules['t'] = m; s.loader.exec_module(m); print(json.dumps(m.merged_prompts()))"
    outputs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code, __file__]
        root = Path(__file__).resolve().parents[2]
        outputs.append(subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert len(set(outputs)) == 1
    assert {"a1b2c2", "a2b1c2"} & set(json.loads(outputs[0]))  # in some merge the two draws differ, so their order counts


# What the LM reads


def row(**changes: Any) -> dict[str, Any]:
    call = {"predictor": "solve", "inputs": {"question": "2 + 2"}, "outputs": {"answer": "5"}, "text": "5"}
    return {"example_id": "t0", "calls": [call], "score": 0.25, "feedback": None, "error": None, **changes}


def reflected(example_row: dict[str, Any], labelled: dict[str, list[str]], labels: dict[str, Any]) -> Any:
    context = replace(Planted(parts=("solve", "check")).context(), labelled=labelled)
    example = {"id": "t0", "inputs": {"question": "2 + 2"}, "labels": labels}
    return reflective_record(context, "solve", example, example_row, random.Random(0))


def test_a_record_has_inputs_outputs_and_the_metrics_words() -> None:
    record = reflected(row(feedback="Count again."), {"solve": ["answer"]}, {"answer": "4"})
    assert record == {"Inputs": {"question": "2 + 2"}, "Generated Outputs": {"answer": "5"}, "Feedback": "Count again."}


def test_what_the_metric_said_of_the_call_goes_before_what_it_said_of_the_run() -> None:
    calls = [{**row()["calls"][0], "feedback": "Carry the one."}]
    assert reflected(row(calls=calls, feedback="Count again."), {}, {})["Feedback"] == "Carry the one."


def test_without_words_the_score_and_the_labels_are_said() -> None:
    said = reflected(row(), {"solve": ["answer"]}, {"answer": "4", "hint": "h"})["Feedback"]
    assert said == "Score: 0.25.\nThe expected output is answer: 4"
    said = reflected(row(), {"check": ["verdict"]}, {"verdict": "no"})["Feedback"]
    assert said == "Score: 0.25.\nThe expected output of the whole program is verdict: no"
    assert reflected(row(), {}, {"hint": "h"})["Feedback"] == "Score: 0.25."


def test_an_answer_that_did_not_parse_is_shown_raw_with_the_error() -> None:
    torn = {"predictor": "solve", "inputs": {"question": "2 + 2"}, "outputs": None, "text": "well, five"}
    calls = [*row()["calls"], torn, *row()["calls"]]
    failed = row(calls=calls, error={"kind": "parse", "message": "no answer field"}, score=None)
    record = reflected(failed, {"solve": ["answer"]}, {"answer": "4"})
    assert record["Generated Outputs"] == "well, five"
    assert record["Feedback"] == "The run failed (parse): no answer field\nThe expected output is answer: 4"


def test_a_predictor_that_was_not_called_has_no_record() -> None:
    assert reflected(row(calls=[]), {}, {}) is None


def test_the_prompt_holds_the_instruction_and_the_feedback_and_a_note_says_what_is_lost_without() -> None:
    problem = Planted()
    searcher, _ = search(problem, problem.context(num_candidates=1))
    prompt = problem.asked[0][0]
    assert "```\nAnswer.\n```" in prompt and re.search(r"solve lacks word\d\d", prompt)
    assert not any("in words" in note for note in searcher.notes)
    silent = Planted(feedback=False)
    searcher, _ = search(silent, silent.context(num_candidates=1))
    assert "Score: 0." in silent.asked[0][0]
    assert any("said nothing in words on 6 of 6 training runs" in note for note in searcher.notes)


# Options


def test_options_that_are_unknown_or_set_by_the_search_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'use_merge'"):
        build_searcher("gepa", Planted().context(options={"use_merges": True}))
    with pytest.raises(ConfigError, match=r"options\.run_dir: the search sets"):
        build_searcher("gepa", Planted().context(options={"run_dir": "."}))
    with pytest.raises(ConfigError, match="did you mean 'max_metric_calls'"):
        check_optimizer("gepa", ".", {"max_metric_call": 1})
    check_optimizer("gepa", ".", {"max_metric_calls": 1})
    with pytest.raises(ConfigError, match="labeled has none"):
        check_optimizer("labeled", ".", {"k": 3})


def test_values_that_gepa_refuses_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="Unknown candidate_selector strategy: luck"):
        propose_all(Planted().context(options={"candidate_selection_strategy": "luck"}))
    with pytest.raises(ConfigError, match="Missing placeholder"):
        propose_all(Planted().context(options={"reflection_prompt_template": "write"}))


def test_options_reach_gepa() -> None:
    problem = Planted()
    template = "For solve:\n```\n<curr_param>\n```\n<side_info>"
    options = {"max_metric_calls": 30, "reflection_prompt_template": {"solve": template}}
    search(problem, problem.context(options=options))
    assert all(prompt.startswith("For solve:") for prompt, _ in problem.asked)
    assert 1 <= len(problem.asked) < 8  # 30 metric calls, at least 3 for each and 8 for the student


@pytest.mark.parametrize(
    ("lacking", "match"),
    [
        ({"ask": None}, "an LM"),
        ({"run_rows": None}, "run_rows"),
        ({"search_ids": ()}, "search examples"),
        ({"examples": []}, "training"),
    ],
)
def test_a_search_that_lends_too_little_is_refused(lacking: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_searcher("gepa", replace(Planted().context(), **lacking))


# Rows


def test_the_rows_of_a_mini_batch_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bt_ray.rollout.worker.end_with_parent", lambda: None)  # that is for a process of its own
    pool = StubPool(answer, delay_s=0.01)
    spec = ProgramSpec("tests.support.programs:TwoModulesAsync", "tests.support.programs:exact", adapter="compact")
    worker: Any = ProgramWorker(spec, pool)
    worker._watch = SimpleNamespace(start=lambda loop: None)  # it would end this process
    handle = SimpleNamespace(run=SimpleNamespace(remote=worker.run), _actor_id=SimpleNamespace(hex=lambda: "one"))
    examples = {row["id"]: row for row in TRAIN}
    rows = RowEvaluator((handle,), examples, BASE, 32, str(tmp_path), by_predictor=True, timeout_s=spec.timeout_s)
    context: Any = SimpleNamespace(student=STUDENT, run_rows=rows.run)
    scores: Any = SimpleNamespace(check=lambda: None)
    found = RowsAdapter(context, scores, Book(STUDENT, 1)).evaluate(TRAIN[:3], to_texts(STUDENT), capture_traces=True)
    assert found.scores == [1.0, 1.0, 1.0] and len(pool.calls) == 6
    assert pool.peak == 3
