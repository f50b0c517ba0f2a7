"""BetterTogether as a DSPy teleprompter: the run of a YAML config, from Python or a notebook.

    optimiser = bt_ray.BetterTogether(metric=exact, model="smollm2-135m", p={...}, w={...})
    better = optimiser.compile(program, trainset=train, valset=val, strategy="p -> w -> p", run_dir="run")
    better(message="..."), better.report

The stages carry the same hashes as those of a YAML run with the same content.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dspy
from pydantic import ValidationError

from bt_ray import bundle
from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.config_file import explain
from bt_ray.data import split_rows
from bt_ray.errors import ConfigError
from bt_ray.preflight import Prepared, object_identity, prepare, program_identity
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect
from bt_ray.running import carry_out, make_console, placed, raise_if_failed
from bt_ray.runs.opening import open_run
from bt_ray.runs.run_dir import IN_MEMORY, PICKLED, RunDir

PLAIN = (str, int, float, bool, type(None), list, tuple, dict)  # attributes that a constructor argument may have set
COMPILED = ("program", "metric", "data", "model", "strategy", "steps")  # keys of a config that have a place of their own here


@dataclass(frozen=True)
class Splits:
    """The example lists that a caller gives, and the share of `val` that prompt search sees."""

    train: Sequence[Any]
    val: Sequence[Any]
    test: Sequence[Any] | None
    search_share: float = 0.5


class BetterTogether(dspy.teleprompt.Teleprompter):  # type: ignore[misc]
    """Alternate prompt search and fine-tuning of a program on Ray.

    `metric`: metric(example, prediction, trace=None). `model`: as in the config. Every other
    keyword is a step (a dict with `optimizer` or `method`) or a section of the config (`rollout`,
    `engine`, `adapter`, `seed`, ...), written as in YAML. Raises ConfigError for one that is neither.
    """

    def __init__(self, metric: Callable[..., Any], model: str = "smollm2-135m", **parts: Any):
        super().__init__()
        self.metric = metric
        self.model = model
        sections = set(RunConfig.model_fields) - set(COMPILED)
        self.sections = {name: value for name, value in parts.items() if name in sections}
        self.steps = {name: value for name, value in parts.items() if name not in sections}
        for name, value in self.steps.items():
            _check_step(name, value, sections)
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
        progress: bool = True,
    ) -> Any:
        """Run what is missing in `run_dir` (a folder, or s3://BUCKET/FOLDER) and return the picked program, with `.report`.

        `trainset`, `valset`, `testset`: dspy.Example with inputs set. `progress`: print the plan and what the
        stages do, as `bt-ray run` does. Raises ConfigError for bad input, StageFailedError where a stage failed,
        BtRayError where the run fails.
        """
        with placed(run_dir) as folder:
            prepared = self.prepare(student, Splits(trainset, valset, testset, search_share), strategy, str(folder))
            run = open_run(folder, as_recorded(RunDir(folder), prepared))
            carry_out(run, make_console() if progress else None)
            facts = collect(run)
            raise_if_failed(facts)
            program = bundle.load(run)
        program.report = build_report(facts)
        return program

    def prepare(self, student: Any, examples: Splits, strategy: str | Sequence[str], run_dir: str) -> Prepared:
        """The checked config of a compile and what it begins with. Nothing is run; a program that no reference can
        name is pickled into `run_dir`. Raises ConfigError."""
        raw, inputs = raw_rows(examples)
        test = IN_MEMORY if examples.test else None
        data: dict[str, Any] = {"train": IN_MEMORY, "val": IN_MEMORY, "test": test, "inputs": inputs}
        data["search_share"] = examples.search_share
        references = _references(student, self.metric)
        pickle_path = None
        if references is None:
            from bt_ray.rollout.program import pickle_program

            pickle_path = pickle_program(student, self.metric, str(Path(run_dir).resolve() / "scratch"))
            references = (f"{PICKLED}program", f"{PICKLED}metric")
        config = self._config({"program": references[0], "metric": references[1], "data": data, "strategy": strategy})
        return prepare(config, split_rows(raw, config.data, config.seed), pickle_path, student)

    def _config(self, parts: dict[str, Any]) -> RunConfig:
        strategy = parts["strategy"] if isinstance(parts["strategy"], str) else tuple(parts["strategy"])
        data = {**parts, "strategy": strategy, "model": self.model, "steps": self.steps, **self.sections}
        data.setdefault("base_dir", str(Path.cwd()))
        try:
            return RunConfig.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, "", "BetterTogether", data)) from None


def _check_step(name: str, value: Any, sections: set[str]) -> None:
    """Raise ConfigError for a keyword that is no step: most often a section's name with a slip in it."""
    if isinstance(value, (PromptStep, WeightStep)) or (isinstance(value, dict) and {"optimizer", "method"} & value.keys()):
        return
    near = difflib.get_close_matches(name, sections, n=1)
    if name in COMPILED:
        hint = "that is given to compile" if name != "steps" else "give each step as a keyword of its own"
    else:
        hint = f"did you mean {near[0]!r}?" if near else f"sections are {', '.join(sorted(sections))}"
    raise ConfigError(
        f"BetterTogether: the keyword {name!r} is no section of the config; {hint}. Nor is it a step: that is a dict with `optimizer` "
        f"or `method` (got {str(value)[:80]!r})."
    )


def as_recorded(run: RunDir, prepared: Prepared) -> Prepared:
    """With the names that the run has for its data, program and metric, where they stand for the same content.

    A run of a YAML config stays one: its files can be read again later, and rows in memory cannot.
    """
    if not run.exists():
        return prepared
    old, identity = run.config(), run.header()["identity"]
    config = prepared.config
    if identity["splits"] == prepared.identity["splits"]:
        config = config.model_copy(update={"data": old.data})
    if not _leads_to(old, identity["pickle_path"], prepared):
        return replace(prepared, config=config)
    names = {name: getattr(old, name) for name in ("program", "metric", "base_dir")}
    pickled = {**prepared.identity, "pickle_path": identity["pickle_path"]}
    return replace(prepared, config=config.model_copy(update=names), identity=pickled)


def _leads_to(old: RunConfig, pickle_path: str | None, prepared: Prepared) -> bool:
    """Whether the references of a run's config still give this program, this metric and the steps' optimisers."""
    from bt_ray.rollout.program import load_metric, load_program, spec_of
    from bt_ray.search.base import check_optimizer

    spec = spec_of(old, pickle_path)
    try:
        found = program_identity(load_program(spec)), object_identity(load_metric(spec).function)
        for step in prepared.config.steps.values():
            if isinstance(step, PromptStep):
                check_optimizer(step.optimizer, old.base_dir, step.options)
    except (
        ConfigError,
        ImportError,
        AttributeError,
    ):  # moved or changed since; the last two are of a pickle whose names are gone
        return False
    return found == (prepared.identity["program"], prepared.identity["metric"])


def raw_rows(splits: Splits) -> tuple[dict[str, list[dict[str, Any]]], tuple[str, ...]]:
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
