"""Every command and every example of the README is one that the project has."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from bt_ray.cli import _parser
from bt_ray.config import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(prefix):
    found = re.findall(rf"(?m)^{prefix} .*$", "\n".join(blocks("")))
    return [line.split("#")[0].strip() for line in found] + re.findall(rf"`({prefix} [^`]*)`", README)


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line):
    assert re.search(rf"(?m)^{line.split()[1]}:", (ROOT / "Makefile").read_text())


@pytest.mark.parametrize("line", commands("bt-ray"))
def test_verbs_parse(line):
    import shlex

    assert _parser().parse_args(shlex.split(line)[1:]).verb


def test_the_yaml_example_is_a_config():
    (text,) = blocks("yaml")
    assert RunConfig.model_validate(yaml.safe_load(text)).strategy_steps() == [("p",), ("w",), ("p", "w", "p")]


def test_the_python_example_compiles():
    (text,) = blocks("python")
    ast.parse(text)
    assert "BetterTogether" in text


def test_named_files_exist():
    for name in re.findall(r"\b(?:jobs|bt_ray|benchmarks)/[\w/]+\.(?:py|yaml|md)", README):
        assert (ROOT / name).is_file(), name


def test_the_table_is_a_real_run():
    table = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for path in ("vanilla", "p -> w -> p", "TF-IDF"):
        assert path in table
