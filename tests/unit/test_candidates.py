from __future__ import annotations

import json

import dspy
import pytest

from bt_ray.errors import ConfigError
from bt_ray.rollout.candidates import apply, candidate_id, copy_program, extract
from tests.support.programs import Reasons, TwoModules


def test_extract_is_json_and_names_the_predictors_as_dspy_does():
    program = TwoModules()
    program.route.demos = [dspy.Example(message="m", department="cards", augmented=True)]
    candidate = extract(program)
    assert json.loads(json.dumps(candidate)) == candidate
    assert candidate["predictors"]["route"] == {
        "instructions": "Name the department that answers the message.",
        "demos": [{"message": "m", "department": "cards"}],
    }
    assert list(extract(Reasons())["predictors"]) == ["think.predict"]


def test_apply_works_on_a_copy_and_extract_gives_the_candidate_back():
    program = TwoModules()
    vanilla = extract(program)
    candidate = {
        "predictors": {
            **vanilla["predictors"],
            "classify": {"instructions": "Sort it.", "demos": [{"message": "m", "department": "cards", "intent": "card_late"}]},
        }
    }
    changed = apply(program, candidate)
    assert extract(changed) == candidate
    assert extract(program) == vanilla
    assert not hasattr(program.route, "bt_ray_predictor")


def test_apply_takes_the_users_lms_off():
    program = TwoModules()
    program.set_lm("an LM that must not be asked")
    assert [p.lm for p in apply(program, extract(program)).predictors()] == [None, None]


def test_apply_refuses_prompts_of_another_program():
    with pytest.raises(ConfigError, match=r"'think\.predict'.*route, classify"):
        apply(TwoModules(), extract(Reasons()))


def test_candidate_id_follows_the_content_only():
    a = {"predictors": {"x": {"instructions": "é", "demos": [{"q": "1", "a": "2"}]}}}
    b = {"label": "vanilla", "predictors": {"x": {"demos": [{"a": "2", "q": "1"}], "instructions": "é"}}}
    assert candidate_id(a) == candidate_id(b) == candidate_id(json.loads(json.dumps(a)))
    assert len(candidate_id(a)) == 16
    assert candidate_id({"predictors": {"x": {"instructions": "e", "demos": []}}}) != candidate_id(a)


class Index:
    def __deepcopy__(self, memo):
        raise AssertionError("an index must not be copied with every candidate")


class WithTools(dspy.Module):
    def __init__(self):
        super().__init__()
        self.index = Index()
        self.inner = {"steps": [TwoModules()]}
        self.agent = dspy.ReAct("question -> answer", tools=[self.search])

    def search(self, question: str) -> str:
        """Look it up."""
        return str(id(self))


def test_copies_share_heavy_attributes_but_not_modules():
    program = WithTools()
    copied = copy_program(program)
    assert copied.index is program.index
    assert copied.inner["steps"][0].route is not program.inner["steps"][0].route
    assert copied.agent.tools["search"].func.__self__ is copied
