from __future__ import annotations

from typing import Literal

import dspy
import pytest

from bt_ray.errors import ConfigError
from bt_ray.rollout.program import ProgramSpec, check_fields, field_names, field_notes, load_metric, load_program, pickle_program
from tests.support import programs

HERE = "tests.support.programs"


def spec(program=f"{HERE}:TwoModules", metric=f"{HERE}:exact", **more):
    return ProgramSpec(program, metric, **more)


@pytest.mark.parametrize("attribute", ["TwoModules", "make_program"])
def test_class_and_factory(attribute):
    assert isinstance(load_program(spec(f"{HERE}:{attribute}")), programs.TwoModules)


def test_file_relative_to_base_dir_imports_its_neighbours(tmp_path):
    (tmp_path / "bt_ray_test_neighbour.py").write_text("SIGNATURE = 'q -> a'\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "prog.py").write_text("import dspy, bt_ray_test_neighbour as n\nprogram = dspy.Predict(n.SIGNATURE)\n")
    found = load_program(spec("sub/prog.py:program", base_dir=str(tmp_path)))
    assert list(found.signature.output_fields) == ["a"]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nothing", "not of the form"),
        ("no_such_module_here:x", "no module 'no_such_module_here'"),
        ("no/such/file.py:x", "there is no file"),
        (f"{HERE}:Nope", "has no 'Nope'.*TwoModules"),
        (f"{HERE}:NOT_A_PROGRAM", "is a int"),
        (f"{HERE}:exact", r"needs arguments \(example, prediction\)"),
        (f"{HERE}:NeedsArgument", r"needs arguments \(depth\)"),
        ("pathlib:Path.cwd", "no dspy.Module"),
    ],
)
def test_program_references_that_cannot_be_used(reference, words):
    with pytest.raises(ConfigError, match=words):
        load_program(spec(reference))


@pytest.mark.parametrize(
    ("body", "words"), [("1 / 0", "ZeroDivisionError"), ("raise SystemExit(3)", "SystemExit"), ("x = (", "SyntaxError")]
)
def test_a_file_that_cannot_be_imported(tmp_path, body, words):
    (tmp_path / "bad.py").write_text(body)
    with pytest.raises(ConfigError, match=words):
        load_program(spec("bad.py:x", base_dir=str(tmp_path)))


def test_a_constructor_that_raises(tmp_path):
    (tmp_path / "ctor.py").write_text(
        "import dspy\nclass P(dspy.Module):\n    def __init__(self):\n        raise OSError('no index')\n"
    )
    with pytest.raises(ConfigError, match="cannot be built: OSError: no index"):
        load_program(spec("ctor.py:P", base_dir=str(tmp_path)))


METRICS = """
def two(example, prediction): return 1
def three(example, prediction, trace): return trace is not None
def optional(example, prediction, trace=None): return trace is not None
def five(gold, pred, trace, pred_name, pred_trace): return trace is not None
def gepa(gold, pred, trace=None, pred_name=None, pred_trace=None): return pred_name, pred_trace
def tuned(example, prediction, trace=None, within=1, strict=False): return 1
def one(example): return 1
async def later(example, prediction): return 1
class Judge:
    def __call__(self, example, prediction): return 1
judge = Judge()
value = 3
"""


def test_metrics(tmp_path):
    (tmp_path / "metrics.py").write_text(METRICS)

    def load(name):
        return load_metric(spec(metric=f"metrics.py:{name}", base_dir=str(tmp_path)))

    assert [load(name).takes_predictor for name in ("optional", "five", "gepa", "tuned")] == [False, True, True, False]
    assert [load(name).of_predictor(0, 1, [], "route", ["step"]) for name in ("five", "gepa")] == [True, ("route", ["step"])]
    assert [load(name).takes_trace for name in ("two", "three", "optional", "five", "judge")] == [False, True, True, True, False]
    for name in ("three", "optional", "five"):
        assert load(name)(1, 2) is False
        assert load(name)(1, 2, []) is True
    for name, words in (("one", "cannot take"), ("later", "coroutine"), ("Judge", "is a class"), ("value", "is a int")):
        with pytest.raises(ConfigError, match=words):
            load(name)


def test_a_pickled_program_is_checked_before_it_is_read(tmp_path):
    path = pickle_program(programs.TwoModules(), lambda example, prediction: True, str(tmp_path))
    loaded = load_program(spec("-", "-", pickle_path=path))
    assert [name for name, _ in loaded.named_predictors()] == ["route", "classify"]
    assert load_metric(spec("-", "-", pickle_path=path))(1, 2) is True
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="does not hold what its name says"):
        load_program(spec("-", "-", pickle_path=path))


def test_field_notes():
    class Sorts(dspy.Signature):
        """Sort."""

        message: str = dspy.InputField(desc="what the customer wrote")
        count: int = dspy.InputField()
        note: str = dspy.InputField()
        area: Literal["card", "loan"] = dspy.OutputField(desc="the nearest")

    assert field_notes(dspy.Predict(Sorts)) == {
        "self": {"message": "what the customer wrote", "count": "int", "area": "one of card, loan; the nearest"}
    }


def test_field_names():
    assert field_names(programs.TwoModules())["classify"] == {"inputs": ["message", "department"], "outputs": ["intent"]}


def test_check_fields_speaks_where_it_can_know():
    program = programs.TwoModules()
    assert check_fields(program, ["message"], ["intent"]) == []
    assert "'message', which data.inputs does not list; it is a label" in check_fields(program, [], ["message"])[0]
    assert any("does not take; it takes message" in text for text in check_fields(program, ["message", "body"], []))
    assert "needs the input 'q'" in check_fields(dspy.ChainOfThought("q -> a"), ["question"], [])[0]
    assert check_fields(dspy.ChainOfThought("q -> a"), ["q"], ["a"]) == []
