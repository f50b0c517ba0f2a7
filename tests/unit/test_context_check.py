"""A candidate whose prompt does not fit is refused before it costs a call."""

import json

import dspy
import pytest

from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.render import ContextCheck, longest_prompts
from bt_ray.search.base import ListSearcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.fits import misfit
from bt_ray.search.ledger import Ledger
from bt_ray.search.racing import StopRule
from tests.support.tiny_model import make_tiny_model
from tests.support.tiny_run import PROGRAM


def candidate(instructions, demos=0):
    demo = {"text": "a boat on the shelf", "colour": "red", "side": "left"}
    return {"predictors": {name: {"instructions": instructions, "demos": [demo] * demos} for name in ("colour", "side")}}


class Listening(ListSearcher):
    heard = ()

    def observe(self, candidate_id, score, complete):
        self.heard = (*self.heard, (score, complete))


def test_a_refused_candidate_is_told_and_never_run():
    proposals = [{"label": text, "candidate": candidate(text)} for text in ("short", "long", "other")]
    searcher = Listening(proposals)
    ledger = Ledger(["a", "b"], (), StopRule(0.05))
    conduct = Conduct(searcher, ledger, lambda found: "it is long" if "long" in json.dumps(found) else None)
    labels = []
    while not isinstance(entry := conduct.next(), Answer):
        labels.append(entry.label)
        ledger.record(entry.candidate_id, 0, {"a": 1.0, "b": 1.0}, 0.1)
    conduct.close()
    assert labels == ["short", "other"]
    assert (0.0, False) in searcher.heard
    assert [trial["refused"] for trial in ledger.trials()] == [None, "it is long", None]
    assert ledger.notes() == ["1 candidates were not run, the first (long) because it is long."]
    assert ledger.best().label == "short"


def test_a_search_without_a_winner_says_whether_all_were_refused_or_none_proposed():
    ledger = Ledger(["a"], (), StopRule(0.05))
    assert ledger.why_none().startswith("proposed no candidate.")
    proposals = [{"label": text, "candidate": candidate(text)} for text in ("one", "two", "three")]
    conduct = Conduct(
        ListSearcher(proposals), ledger, lambda found: "it has three" if "three" in json.dumps(found) else "it is long"
    )
    assert conduct.next() is Answer.END
    conduct.close()
    assert "all 3 refused: it is long (and 1 other reasons)." in ledger.why_none()


def test_a_candidate_with_other_predictors_is_no_candidate_of_the_program():
    student, found = candidate("Do."), candidate("Do it.")
    assert misfit(found, student) is None
    found["predictors"]["size"] = found["predictors"].pop("side")
    assert misfit(found, student) == (
        "it lacks the predictor 'side' and it has prompts for 'size', no predictor of the program; give prompts for colour, side"
    )


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    (folder / "program.py").write_text(PROGRAM)
    spec = ProgramSpec("program.py:Program", "program.py:exact", adapter="compact", base_dir=str(folder))
    calls = [{"predictor": "side", "inputs": {"text": "word " * count, "colour": "red"}} for count in (1, 30)]
    model = make_tiny_model(folder / "model")

    def make(context, examples=(), **own):
        return ContextCheck(spec, [{"calls": calls}], lambda name: (model, own.get(name, context)), 8, examples)

    return make


def test_the_longest_inputs_of_the_rollouts_count(check):
    assert check(1024).refuse(candidate("Choose.", demos=2)) is None
    assert "the context holds 40" in check(40).refuse(candidate("Choose."))


def test_inputs_of_the_examples_count_where_they_are_all_that_a_predictor_reads(check):
    examples = [{"id": str(count), "inputs": {"text": "word " * count}} for count in (100, 2)]
    assert check(1024, examples).refuse(candidate("Choose.")) is None
    assert "'colour'" in check(200, examples).refuse(candidate("Choose.")), "`side` reads what `colour` answers"


def test_each_predictor_has_the_context_of_its_own_model(check):
    assert check(1024, colour=8).refuse(candidate("Choose.")) is None, "colour was never called"
    assert "the context holds 40" in check(1024, side=40).refuse(candidate("Choose."))


def test_demos_and_instructions_count(check):
    assert check(300).refuse(candidate("Choose.")) is None
    assert "'side'" in check(300).refuse(candidate("Choose.", demos=40))
    assert "'side'" in check(300).refuse(candidate("Choose well. " * 100))


def test_the_longest_demo_is_of_a_row_that_has_a_label_of_it() -> None:
    program = dspy.Predict("text -> side")
    spec = ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact", adapter="compact")
    train = [
        {"id": "long", "inputs": {"text": "a " * 50}, "labels": {}},
        {"id": "short", "inputs": {"text": "b c"}, "labels": {"side": "left"}},
    ]
    bare, shown = (longest_prompts(spec, program, {"train": train}, number)[0].messages for number in (0, 2))
    assert sum("left" in str(message) for message in bare) == 0
    assert str(shown).count("left") == 2 and bare[-1] == shown[-1]
