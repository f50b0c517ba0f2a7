"""DSPy's optimisers as searchers, with a stub pool; no Ray."""

from __future__ import annotations

import functools
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from bt_ray.errors import CanaryError, ConfigError, PoolError
from bt_ray.lm.journal import JournalPool
from bt_ray.search.base import build_searcher, check_optimizer
from tests.support.compiling import SEARCH, STUDENT, TRAIN, SeededPool, context, pool, proposals, session
from tests.support.stub_pool import BASE, StubPool

OPTIMISERS: dict[str, dict[str, Any]] = {
    "dspy.BootstrapFewShot": {"max_bootstrapped_demos": 2, "max_labeled_demos": 0, "max_rounds": 2},
    "dspy.BootstrapFewShotWithRandomSearch": {"max_bootstrapped_demos": 2, "max_labeled_demos": 0, "num_candidate_programs": 3},
    "dspy.COPRO": {"breadth": 3, "depth": 2},
    "dspy.SIMBA": {"bsize": 4, "num_candidates": 3, "max_steps": 2, "max_demos": 2},
}


def journaled(path: Path) -> set[str]:
    return {json.loads(line)["key"] for line in (path / "calls.jsonl").read_text().splitlines()}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_of_dspy_gives_a_candidate_and_again_without_a_new_call(name: str, tmp_path: Path) -> None:
    inner, journal = pool(tmp_path)
    found = proposals(context(journal, name, options=OPTIMISERS[name]))
    assert list(found) == ["incoming", name]
    for predictor, state in found[name].items():
        before = STUDENT["predictors"][predictor]
        if name in ("dspy.COPRO", "dspy.SIMBA"):
            assert "Take care" in state["instructions"] or predictor == "classify"
        else:
            assert state["instructions"] == before["instructions"]
            assert 1 <= len(state["demos"]) <= 2
            assert all(demo["message"].startswith("my card") and demo["department"] for demo in state["demos"])
            assert predictor == "route" or {demo["intent"] for demo in state["demos"]} == {"card_lost"}  # runs that passed
    shown = {word for call in inner.calls for word in call.messages[-1]["content"].split() if word.isdigit()}
    assert shown & {str(number) for number in range(8)}
    # The search examples are given where an optimiser asks for a valset of its own.
    assert bool(shown & {"20", "21", "22", "23"}) is (name == "dspy.BootstrapFewShotWithRandomSearch")
    assert inner.calls and journaled(tmp_path)
    again, journal = pool(tmp_path)
    assert proposals(context(journal, name, options=OPTIMISERS[name])) == found
    assert not again.calls


@pytest.mark.parametrize("name", ["dspy.COPRO", "dspy.SIMBA"])
def test_a_proposer_of_the_steps_own_writes_the_instructions_and_runs_no_program(name: str, tmp_path: Path) -> None:
    inner, journal = pool(tmp_path)
    big = SeededPool(lambda messages: "")
    run = session(journal, proposer=(big, replace(BASE, id="big")))
    lent = replace(
        context(journal, name, options=OPTIMISERS[name]), compile=functools.partial(run.compile, STUDENT, TRAIN, SEARCH)
    )
    proposals(lent)

    def writes(call: Any) -> bool:
        return "instruction optimizer" in call.messages[0]["content"] or "two trajectories" in call.messages[0]["content"]

    assert big.calls and all(writes(call) and call.weights.id == "big" for call in big.calls)
    assert inner.calls and not any(writes(call) or call.weights.id == "big" for call in inner.calls)


@pytest.mark.parametrize("name", ["dspy.COPRO", "dspy.SIMBA"])
def test_an_interrupted_compile_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    """Program runs go side by side in threads, so calls come in another order each time; what is asked stays."""
    whole, journal = pool(tmp_path / "whole", jitter=True)
    found = proposals(context(journal, name, options=OPTIMISERS[name]))
    assert whole.peak > 1
    for attempt in range(2):
        _, journal = pool(tmp_path / "torn", jitter=True, fails_after=20)
        with pytest.raises(PoolError, match="replica died"):
            proposals(context(journal, name, options=OPTIMISERS[name]))
        assert 20 * (attempt + 1) - 8 <= len(journaled(tmp_path / "torn")) <= 20 * (attempt + 1)
    last, journal = pool(tmp_path / "torn", jitter=True)
    assert proposals(context(journal, name, options=OPTIMISERS[name])) == found
    assert journaled(tmp_path / "torn") == journaled(tmp_path / "whole")
    assert len(last.calls) < len(whole.calls) - 20


def test_incoming_student_and_zero_shot_come_before_the_compiled_candidate(tmp_path: Path) -> None:
    inner, journal = pool(tmp_path)
    demo = {"message": "m", "department": "cards"}
    changed = {"predictors": {**STUDENT["predictors"], "route": {"instructions": "Sort.", "demos": [demo]}}}
    base = context(journal, "dspy.LabeledFewShot", options={"k": 3})
    incoming = {"predictors": {name: {"instructions": "Other.", "demos": []} for name in STUDENT["predictors"]}}
    lent = functools.partial(session(journal).compile, changed, TRAIN, SEARCH)
    found = proposals(replace(base, student=changed, incoming=incoming, compile=lent))
    assert list(found) == ["incoming", "student", "zero_shot", "dspy.LabeledFewShot"]
    assert found["student"]["route"]["demos"] == [demo] and found["zero_shot"]["route"]["demos"] == []
    compiled = found["dspy.LabeledFewShot"]
    assert compiled["route"] == {"instructions": "Sort.", "demos": []}  # the examples have no label for it
    assert len(compiled["classify"]["demos"]) == 3 and not inner.calls


# Classes of one's own


MINE = """
import dspy
from dspy.teleprompt import Teleprompter

SEEN = []

class Shout(Teleprompter):
    def __init__(self, metric, mark="!", prompt_model=None):
        super().__init__()
        self.metric, self.mark, self.prompt_model = metric, mark, prompt_model

    def compile(self, student, trainset, *, valset=None, seed=0, times=1, **kwargs):
        SEEN.append({"train": len(trainset), "val": len(valset), "seed": seed, "prompt_model": self.prompt_model, "lm": dspy.settings.lm})
        program = student.deepcopy()
        prediction = program(**trainset[0].inputs())
        SEEN[-1]["score"] = self.metric(trainset[0], prediction), self.metric(trainset[0], prediction, [])
        program.route.signature = program.route.signature.with_instructions("Sort" + self.mark * times)
        return program

class Same(Teleprompter):
    def compile(self, student, *, trainset, **kwargs):
        return student

class Wraps(Teleprompter):
    def compile(self, student, *, trainset):
        class Both(dspy.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = student.deepcopy(), student.deepcopy()
        return Both()

class Forgets(Teleprompter):
    def compile(self, student, *, trainset):
        pass

class Swallows(Teleprompter):
    def compile(self, student, *, trainset):
        for example in trainset:
            try:
                student(**example.inputs())
            except Exception:
                pass
        return student

class Breaks(Teleprompter):
    def compile(self, student, *, trainset):
        raise LookupError("no such field")

class Tunes(dspy.BootstrapFinetune):
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    """A function (class name, step fields) -> all proposals with that optimiser of the user's file."""
    (tmp_path / "mine.py").write_text(MINE)

    def run(name: str, inner: Any = None, **step: Any) -> dict[str, dict[str, Any]]:
        journal = JournalPool(inner or SeededPool(lambda messages: ""), tmp_path / "calls.jsonl")
        return proposals(context(journal, f"mine.py:{name}", **step), str(tmp_path))

    return run


def seen() -> dict[str, Any]:
    (module,) = [
        module for name, module in sys.modules.items() if name.startswith("bt_ray_user_searcher") and hasattr(module, "SEEN")
    ]
    return module.SEEN[-1]


@pytest.fixture(autouse=True)
def _forget_user_files() -> Any:
    yield
    for name in [name for name in sys.modules if name.startswith("bt_ray_user_searcher")]:
        del sys.modules[name]


def test_arguments_go_to_the_constructor_or_to_compile_by_their_names(mine: Any) -> None:
    found = mine("Shout", options={"mark": "?", "times": 3})
    assert found["mine.py:Shout"]["route"]["instructions"] == "Sort???"
    assert (seen()["train"], seen()["val"], seen()["prompt_model"]) == (8, 4, None)
    assert isinstance(seen()["lm"], dspy.LM)
    assert seen()["seed"] != 0 and seen()["score"] == (1.0, 1.0)
    first = seen()["seed"]
    mine("Shout", seed=1)
    assert seen()["seed"] != first
    mine("Shout", options={"seed": 7})
    assert seen()["seed"] == 7


def test_a_program_that_comes_back_unchanged_is_noted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    _, journal = pool(tmp_path)
    searcher = build_searcher("mine.py:Same", context(journal, "mine.py:Same"), str(tmp_path))
    while searcher.propose() is not None:
        pass
    assert searcher.notes == ["mine.py:Same returned the prompts that it started from."]  # type: ignore[attr-defined]


def test_a_program_with_other_predictors_or_none_is_refused(mine: Any) -> None:
    with pytest.raises(ConfigError, match=r"predictors first\.route, .* where the program has route, classify"):
        mine("Wraps")
    with pytest.raises(ConfigError, match="returned a NoneType"):
        mine("Forgets")


@pytest.mark.parametrize("error", [PoolError("no replica"), CanaryError("wrong weights")])
def test_the_pools_faults_come_out_whatever_the_optimiser_made_of_them(mine: Any, error: Exception) -> None:
    def fail(messages: Any) -> str:
        raise error

    inner = StubPool(fail)
    with pytest.raises(type(error), match=str(error)):
        mine("Swallows", inner)
    assert len(inner.calls) == 1  # after a fault of the pool no call is made
    with pytest.raises(type(error), match=str(error)):
        mine("Shout", StubPool(fail))


def test_an_error_of_the_optimiser_says_whose_it_is(mine: Any, tmp_path: Path) -> None:
    before = set(engine_threads())  # of tests in the same process that keep their pool
    with pytest.raises(LookupError, match="no such field"):
        mine("Breaks")
    _, journal = pool(tmp_path)
    with pytest.raises(ConfigError, match=r"dspy\.SIMBA stopped with AssertionError: Trainset too small: 8 < 32"):
        proposals(context(journal, "dspy.SIMBA"))
    assert all(ended(thread) for thread in set(engine_threads()) - before)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bt_ray-lm"]


def ended(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_proposals_that_cannot_be_read_end_the_compile_and_not_the_search(tmp_path: Path) -> None:
    nonsense = JournalPool(StubPool(lambda messages: "proposed_instruction: only half"), tmp_path / "calls.jsonl")
    searcher = build_searcher("dspy.COPRO", context(nonsense, "dspy.COPRO", options=OPTIMISERS["dspy.COPRO"]))
    labels = []
    while (proposal := searcher.propose()) is not None:
        labels.append(proposal["label"])
    assert labels == ["incoming"]
    assert searcher.finished()
    assert "dspy.COPRO gave up" in searcher.notes[0]
    assert "only half" in searcher.notes[0]


# Refusals


@pytest.mark.parametrize(
    "name",
    [
        "dspy.BootstrapFinetune",
        "dspy.BetterTogether",
        "dspy.GRPO",
        "dspy.teleprompt.grpo:GRPO",
        "dspy:BetterTogether",
        "mine.py:Tunes",
    ],
)
def test_optimisers_that_train_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(ConfigError, match=r"trains weights.*`method`"):
        check_optimizer(name, str(tmp_path))


def test_unknown_names_and_options_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dspy\.SIMBA'"):
        check_optimizer("dspy.SIMBAA", ".")
    with pytest.raises(ConfigError, match="no optimiser 'Predict'"):
        check_optimizer("dspy.Predict", ".")
    with pytest.raises(ConfigError, match=r"options\.max_step: .*did you mean 'max_steps'"):
        check_optimizer("dspy.SIMBA", ".", {"max_step": 3})
    with pytest.raises(ConfigError, match=r"options\.breath: .*did you mean 'breadth'"):
        check_optimizer("dspy.COPRO", ".", {"breath": 3})  # its constructor swallows any name
    with pytest.raises(ConfigError, match=r"options\.metric: the search sets"):
        check_optimizer("dspy.SIMBA", ".", {"metric": "mine"})
    with pytest.raises(ConfigError, match=r"options\.prompt_model: the search sets"):
        check_optimizer("dspy.MIPROv2", ".", {"prompt_model": "other"})
    with pytest.raises(ConfigError, match=r"dspy\.KNNFewShot needs vectorizer"):
        check_optimizer("dspy.KNNFewShot", ".", {"k": 3})
    with pytest.raises(ConfigError, match=r"dspy\.Ensemble compiles no single program"):
        check_optimizer("dspy.Ensemble", ".", {})
    with pytest.raises(ConfigError, match="takes its sizes from `options`, not from 'light'"):
        check_optimizer("dspy.SIMBA", ".", {}, "light")
    check_optimizer("gepa", ".", {}, "light")
    check_optimizer("dspy.InferRules", ".", {"num_rules": 2, "max_rounds": 2})  # the second is its base's
    with pytest.raises(ConfigError, match="lends it none"):
        build_searcher("dspy.COPRO", replace(context(None, "dspy.COPRO"), compile=None))
