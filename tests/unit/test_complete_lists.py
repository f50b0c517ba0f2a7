"""Lists that are kept by hand name every weight method, prompt optimiser and task that there is. CONTRIBUTING.md says where each is."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from bt_ray import config_file
from bt_ray.config import PromptStep, WeightStep
from bt_ray.report.workload import search_bound
from bt_ray.search.base import SEARCHERS
from bt_ray.stages.weight import UNITS
from bt_ray.training.worker import METHODS
from tests.support.plans import SHAPES, SIZES
from tests.unit.test_budget_of_optimisers import STEPS as BUDGETED
from tests.unit.test_metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "bt_ray" / "tasks"
CONFIGS = {path.parent.name: path for path in sorted(TASKS.glob("*/config.yaml"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITHOUT_AN_LM = {"labeled", "random_fewshot"}  # searchers that ask no LM and so have no calls to hold back


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def described(model: type[Any], field: str) -> str:
    return model.model_fields[field].description or ""


# --- weight methods -------------------------------------------------------------------------------


def test_every_weight_method_has_a_trainer_and_a_word_for_what_it_learns_from() -> None:
    assert set(get_args(WeightStep.model_fields["method"].annotation)) == METHODS.keys() == UNITS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_method_is_described(method: str) -> None:
    assert f"{method}: " in described(WeightStep, "method")
    assert f"`method: {method}`" in README


# --- prompt optimisers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_plan_knows_the_most_that_a_searcher_asks_for(name: str) -> None:
    assert search_bound(PromptStep.model_validate({"optimizer": name}), SIZES) is not None


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_is_described(name: str) -> None:
    assert re.search(rf"\b{name}\b", described(PromptStep, "optimizer"))
    assert f"| `{name}` |" in README
    assert f"{name}.py" in text("bt_ray/search/README.md")


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_runs_for_real_and_is_held_to_the_budget(name: str) -> None:
    assert f"optimizer: {name}," in text("tests/long/test_optimisers.py")
    assert name in BUDGETED.keys() | WITHOUT_AN_LM


def test_every_file_of_search_stands_in_its_readme() -> None:
    files = {path.name for path in (ROOT / "bt_ray" / "search").glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(files) if name not in text("bt_ray/search/README.md")] == []


# --- tasks ----------------------------------------------------------------------------------------


def test_every_task_folder_has_a_config() -> None:
    assert CONFIGS.keys() == {path.parent.name for path in TASKS.glob("*/__init__.py")}
    assert len(CONFIGS) >= 5


def test_the_sizes_of_every_task_are_known_to_the_tests_of_a_plan() -> None:
    assert SHAPES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("task", CONFIGS)
def test_the_metric_of_a_task_is_tested(task: str) -> None:
    module, name = config_file.load(CONFIGS[task]).metric.split(":")
    assert module == f"bt_ray.tasks.{task}"
    assert getattr(importlib.import_module(module), name) in [metric for metric, _ in METRICS]


def test_every_task_with_a_chain_of_thought_is_run_for_real() -> None:
    found = re.search(r'parametrize\("task", (\[.*?\])\)', text("tests/long/test_tasks.py"))
    assert found
    thinking = {task for task in CONFIGS if "ChainOfThought(" in (TASKS / task / "program.py").read_text(encoding="utf-8")}
    assert set(ast.literal_eval(found[1])) == thinking


@pytest.mark.parametrize("task", CONFIGS)
def test_a_task_is_named_where_a_reader_looks_for_it(task: str) -> None:
    assert re.search(rf"(?m)^  tasks/ .*\b{task}\b", README)
    committed = list((TASKS / task).glob("*.jsonl*"))
    assert (TASKS / task / "DATA.md").is_file() or not committed, "committed data needs its origin and licence in DATA.md"
    assert (TASKS / task / "data.py").is_file() or committed


# --- CONTRIBUTING.md ------------------------------------------------------------------------------


def test_files_and_lists_that_contributing_names_are_there() -> None:
    page = text("CONTRIBUTING.md")
    named = set(re.findall(r"`((?:bt_ray|benchmarks|tests|docs|\.setup)/[\w/.-]*)`", page))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    for name, path in re.findall(r"`(\w+)`(?: and `\w+`)? (?:of|in) `(bt_ray/[\w/]+\.py|benchmarks/\w+\.py)`", page):
        assert re.search(rf"(?m)^(?:class |def )?{name}\b", text(path)), f"{path} has no {name}"
