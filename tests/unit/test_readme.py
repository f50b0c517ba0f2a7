"""Every command and every example of the README is one that the project has."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import dspy
import pytest
import yaml
from dspy.utils import DummyLM

from bt_ray.cli import _parser
from bt_ray.config import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
    return [text for name, text in found if name == language]


def commands(prefix):
    found = re.findall(rf"(?m)^{prefix} .*$", "\n".join(blocks("")))
    return [line.split("#")[0].strip() for line in found] + re.findall(rf"`({prefix} [^`]*)`", README)


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line):
    assert re.search(rf"(?m)^{line.split()[1]}:", (ROOT / "Makefile").read_text())


def test_the_commands_of_the_readme_are_found():
    verbs = {line.split()[1] for line in commands("bt-ray")}
    assert {"plan", "doctor", "run", "status", "stop", "report", "ask", "fork"} <= verbs
    assert {"make demo", "make test"} <= set(commands("make"))


@pytest.mark.parametrize("line", commands("bt-ray"))
def test_verbs_parse(line):
    assert _parser().parse_args(shlex.split(line)[1:]).verb


# What the README says of a cluster is shown in full in docs/cluster.md, in lines that go on after a backslash.
CLUSTER = (README + (ROOT / "docs" / "cluster.md").read_text()).replace("\\\n", " ")


def ray_jobs():
    """Script and arguments of every `ray job submit`."""
    found = re.findall(r"ray job submit\b[^`\n]*? -- +([^`\n]*)", CLUSTER)
    return [shlex.split(command, comments=True) for command in found]


def test_the_readme_shows_how_to_submit_a_run():
    assert "ray job submit -- python" in README and len(ray_jobs()) >= 2


@pytest.mark.parametrize("command", ray_jobs(), ids=" ".join)
def test_ray_jobs_name_a_script_that_takes_their_arguments(command, monkeypatch):
    python, script, *arguments = command
    assert python == "python" and (ROOT / script).is_file()
    called = []
    monkeypatch.setattr("bt_ray.cli.main", lambda given: called.append(given) or 0)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0, "the script's own parser refuses these arguments"
    (given,) = called
    parsed = _parser().parse_args(given)
    assert (given[0], str(parsed.config)) == ("run", arguments[arguments.index("--config") + 1])
    assert str(parsed.run_dir) == arguments[arguments.index("--run-dir") + 1]
    for path in (argument for argument in arguments if argument.startswith("bt_ray/")):
        assert (ROOT / path).is_file()


def test_ray_up_is_given_the_cluster_file_that_is_here():
    named = re.findall(r"(?m)^(\S+\.yaml) .*`ray up`", README)
    files = re.findall(r"\bray (?:up|down|dashboard) (\S+)", CLUSTER)
    assert named and files
    for name in named + files:
        assert (ROOT / name).is_file(), name


def test_the_yaml_example_is_a_config():
    (text,) = blocks("yaml")
    assert RunConfig.model_validate(yaml.safe_load(text)).strategy_steps() == [("p",), ("w",), ("p", "w", "p")]


def test_the_program_of_the_readme_runs_and_its_metric_scores_it(tmp_path):
    program, call = blocks("python")
    (tmp_path / "support.py").write_text(program)
    found = runpy.run_path(str(tmp_path / "support.py"))
    said = DummyLM([{"topic": "parcels"}, {"answer": "It is at the Post Office."}])
    with dspy.context(lm=said, adapter=dspy.ChatAdapter()):
        prediction = found["Support"]()(question="Where is my parcel?")
    assert found["solved"](dspy.Example(answer="post office"), prediction) is True
    ast.parse(call)
    assert "BetterTogether" in call


def test_the_python_example_is_the_run_of_the_yaml_example():
    """The stage hashes are equal where steps, model and strategies are, defaults included: it says that they are."""
    assert "Or from Python, with the same stage hashes:" in README
    (text,) = blocks("yaml")
    wanted = RunConfig.model_validate(yaml.safe_load(text))
    calls = [node for node in ast.walk(ast.parse(blocks("python")[1])) if isinstance(node, ast.Call)]
    made = {keyword.arg: keyword.value for node in calls for keyword in node.keywords}
    steps = {name: ast.literal_eval(made[name]) for name in wanted.steps}
    (strategy,) = re.findall(r"(?m)^strategy = (.*)$", blocks("python")[1])
    given = {"steps": steps, "model": ast.literal_eval(made["model"]), "strategy": ast.literal_eval(strategy)}
    found = RunConfig.model_validate({**yaml.safe_load(text), **given})
    assert found == wanted
    assert set(made) == {"metric", "model", *wanted.steps, "trainset", "valset", "testset", "strategy", "run_dir", "question"}


def test_links_lead_to_files_and_to_every_page_of_the_documentation():
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert [name for name in sorted(links) if not (ROOT / name).is_file()] == []
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md"} <= links


def test_named_files_exist():
    for name in re.findall(r"\b(?:jobs|bt_ray|benchmarks)/[\w/]+\.(?:py|yaml|md)", README):
        assert (ROOT / name).is_file(), name


def test_the_table_has_stages_and_a_control():
    table = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for path in ("vanilla", "p -> w -> p", "TF-IDF"):
        assert path in table


def test_every_test_that_the_page_on_faults_names_is_there():
    named = re.findall(r"`(tests/[a-z_0-9/]+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    for path, name in named:
        assert re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8")), f"{path} has no {name}"
