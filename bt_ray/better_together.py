"""BetterTogether as a DSPy teleprompter: the run of a YAML config, from Python or a notebook.

    optimiser = bt_ray.BetterTogether(metric=exact, model="smollm2-135m", p={...}, w={...})
    better = optimiser.compile(program, trainset=train, valset=val, strategy="p -> w -> p", run_dir="run")
    better(message="..."), better.report

The stages carry the same hashes as those of a YAML run with the same content.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from pydantic import ValidationError

from bt_ray import bundle
from bt_ray.config import RunConfig
from bt_ray.config_file import explain
from bt_ray.data import split_rows
from bt_ray.driver import Driver, open_run
from bt_ray.errors import ConfigError
from bt_ray.preflight import prepare
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect

PLAIN = (str, int, float, bool, type(None), list, tuple, dict)  # attributes that a constructor argument may have set
IN_MEMORY = "(rows from Python)"


@dataclass(frozen=True)
class _Splits:
    """The example lists that a caller gives."""

    train: Sequence[Any]
    val: Sequence[Any]
    test: Sequence[Any] | None


class BetterTogether(dspy.teleprompt.Teleprompter):  # type: ignore[misc]
    """Alternate prompt search and fine-tuning of a program on Ray.

    `metric`: metric(example, prediction, trace=None). `model`: as in the config. Every other
    keyword is a step (a dict with `optimizer` or `method`) or a section of the config (`rollout`,
    `engine`, `adapter`, `seed`, ...), written as in YAML.
    """

    def __init__(self, metric: Callable[..., Any], model: str = "smollm2-135m", **parts: Any):
        super().__init__()
        self.metric = metric
        self.model = model
        sections = set(RunConfig.model_fields) - {"program", "metric", "data", "model", "strategy", "steps"}
        self.sections = {name: value for name, value in parts.items() if name in sections}
        self.steps = {name: value for name, value in parts.items() if name not in sections}
        if not self.steps:
            self.steps = {"p": {"optimizer": "random_fewshot"}, "w": {"method": "sft"}}

    def compile(
        self,
        student: Any,
        *,
        trainset: Sequence[Any],
        valset: Sequence[Any],
        testset: Sequence[Any] | None = None,
        strategy: str | Sequence[str] = "p -> w -> p",
        run_dir: str = "bt_ray-run",
        search_share: float = 0.5,
    ) -> Any:
        """Run what is missing in `run_dir` and return the picked program, with `.report`.

        `trainset`, `valset`, `testset`: dspy.Example with inputs set. Raises ConfigError for bad
        input, BtRayError where the run fails.
        """
        examples = _Splits(trainset, valset, testset)
        raw, inputs = raw_rows(examples)
        data = {
            "train": IN_MEMORY,
            "val": IN_MEMORY,
            "test": IN_MEMORY if testset else None,
            "inputs": inputs,
            "search_share": search_share,
        }
        references = _references(student, self.metric)
        pickle_path = None
        if references is None:
            from bt_ray.rollout.program import pickle_program

            pickle_path = pickle_program(student, self.metric, str(Path(run_dir).resolve() / "scratch"))
            references = ("pickled:program", "pickled:metric")
        config = self._config({"program": references[0], "metric": references[1], "data": data, "strategy": strategy})
        prepared = prepare(config, split_rows(raw, config.data, config.seed), pickle_path, student)
        run = open_run(run_dir, prepared)
        Driver(run, lambda seen: None).execute()
        program = bundle.load(run)
        program.report = build_report(collect(run))
        return program

    def _config(self, parts: dict[str, Any]) -> RunConfig:
        strategy = parts["strategy"] if isinstance(parts["strategy"], str) else tuple(parts["strategy"])
        data = {**parts, "strategy": strategy, "model": self.model, "steps": self.steps, **self.sections}
        data.setdefault("base_dir", str(Path.cwd()))
        try:
            return RunConfig.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, "", "BetterTogether")) from None


def raw_rows(splits: _Splits) -> tuple[dict[str, list[dict[str, Any]]], tuple[str, ...]]:
    """Rows of plain values, and the input fields that all examples share. Raises ConfigError."""
    first = splits.train[0] if splits.train else None
    if first is None:
        raise ConfigError("trainset is empty. Give at least one dspy.Example.")
    try:
        inputs = tuple(first.inputs().keys())
    except ValueError:
        raise ConfigError("trainset: its examples have no inputs set. Use dspy.Example(...).with_inputs('question').") from None
    named = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: [example.toDict() for example in rows] for name, rows in named.items() if rows is not None}, inputs


def _references(program: Any, metric: Any) -> tuple[str, str] | None:
    """`module:attr` of the program's class and of the metric, where workers can import both."""
    found = [_reference(type(program)), _reference(metric)]
    if None in found or not _built_alike(program):
        return None
    return str(found[0]), str(found[1])


def _reference(thing: Any) -> str | None:
    name, module = getattr(thing, "__qualname__", None), getattr(thing, "__module__", None)
    if not name or not module or module == "__main__" or "<locals>" in name:
        return None
    source = getattr(sys.modules.get(module), "__file__", None)
    if not source:
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return f"{module}:{name}" if found is thing else None  # a bound method or a decorated function is not what the name gives


def _built_alike(program: Any) -> bool:
    """Whether the class, built without arguments, has the same plain attributes, predictors and fields."""
    try:
        fresh = type(program)()
    except Exception:  # it needs arguments, which a reference cannot carry
        return False
    plain = [
        {key: value for key, value in vars(each).items() if isinstance(value, PLAIN) and not key.startswith("_")}
        for each in (program, fresh)
    ]
    if plain[0] != plain[1]:
        return False
    shape = [
        {
            name: {field: str(info.annotation) for field, info in predictor.signature.fields.items()}
            for name, predictor in each.named_predictors()
        }
        for each in (program, fresh)
    ]
    return shape[0] == shape[1]
