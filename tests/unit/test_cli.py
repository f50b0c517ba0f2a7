"""The command line: how its words are read, where it writes, and what an interrupted run says."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest
import yaml

from bt_ray import cli
from bt_ray.errors import ModelError
from bt_ray.tasks import files

HELPDESK = files.__file__.replace("files.py", "helpdesk")


@pytest.fixture
def config(tmp_path):
    """A config in a folder of its own, over the shipped helpdesk task."""
    data = {name: f"{HELPDESK}/{name}.jsonl" for name in ("train", "val", "test")}
    path = tmp_path / "mine" / "config.yaml"
    path.parent.mkdir()
    path.write_text(
        yaml.safe_dump(
            {
                "program": "bt_ray.tasks.helpdesk:Helpdesk",
                "metric": "bt_ray.tasks.helpdesk:exact_intent",
                "data": {**data, "inputs": ["message"]},
                "steps": {"p": {"optimizer": "labeled"}},
                "strategy": "p",
            }
        )
    )
    return path


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """The handlers of the test run stay as they are."""
    monkeypatch.setattr("signal.signal", lambda *_: None)


@pytest.mark.parametrize(
    "words",
    [
        "run c.yaml --set a=1 --set b.c=2",
        "run c.yaml --set a=1 b.c=2",
        "run c.yaml --set=a=1 b.c=2 --plain",
        "run --set a=1 b.c=2 c.yaml",
        "run --set a=1 --set b.c=2 x/a=b/../c.yaml",
        "run --plain --set a=1 b.c=2 -- c.yaml",
    ],
)
def test_several_values_after_one_set(monkeypatch, words):
    seen = []
    monkeypatch.setattr(cli, "_run", seen.append)
    assert cli.main(shlex.split(words)) == 0
    assert seen[0].set == ["a=1", "b.c=2"]
    assert seen[0].config.endswith("c.yaml")


def test_set_before_the_folders_of_a_fork(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_fork", seen.append)
    assert cli.main(["fork", "--set", "a=1", "b=[1, 2]", "old", "new"]) == 0
    assert (seen[0].set, seen[0].run_dir, seen[0].new) == (["a=1", "b=[1, 2]"], "old", "new")


def test_set_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "c.yaml", "--set", "--plain"])
    assert "--set: expected at least one argument" in capsys.readouterr().err


def test_json_of_a_report_stands_alone_on_stdout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.cli_cluster, "run_of", lambda args: args.run_dir)
    monkeypatch.setattr("bt_ray.report.facts.collect", lambda run: {"run_dir": run})
    monkeypatch.setattr("bt_ray.report.build.build_report", lambda facts: {"pick": "p"})
    monkeypatch.setattr("bt_ray.report.html.render_html", lambda report, facts: "<html>")
    html = tmp_path / "report.html"
    assert cli.main(["report", "run", "--json", "--html", str(html)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"pick": "p"}
    assert err == f"wrote {html}\n"
    assert html.read_text() == "<html>"


def test_model_prepare_says_where_the_model_is(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "bt_ray.lm.models.resolve", lambda name: asked.append(name) or SimpleNamespace(model_dir="/models/x", id="abc")
    )
    assert cli.main(["model", "prepare", "smollm2-135m"]) == 0
    assert asked == ["smollm2-135m"]
    assert capsys.readouterr().out == "smollm2-135m: ready in /models/x (id abc)\n"


def test_model_prepare_of_an_unknown_name(capsys):
    assert cli.main(["model", "prepare", "smollm2-153m"]) == 2
    assert "Did you mean smollm2-135m?" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["bt_ray.config_file.load", "bt_ray.running.prepare"])
def test_a_run_interrupted_before_its_first_stage_says_how_to_go_on(monkeypatch, config, tmp_path, capsys, moment):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupt)
    command = ["run", str(config), "--run-dir", str(tmp_path / "a run"), "--set=seed=3"]
    assert cli.main(command) == cli.INTERRUPTED
    assert shlex.join(["bt-ray", *command]) in capsys.readouterr().err


def resolved(monkeypatch, capsys, config, model):
    """The model that `bt-ray plan` asks for."""

    def resolve(name):
        raise ModelError(name)

    monkeypatch.setattr("bt_ray.lm.models.resolve", resolve)
    assert cli.main(["plan", str(config), "--no-probe", "--set", f"model={model}"]) == 2
    return capsys.readouterr().err.strip().removeprefix("bt-ray: ")


def test_a_relative_model_folder_starts_at_the_folder_of_the_config(monkeypatch, tmp_path, config, capsys):
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere / "weights", elsewhere / "here", config.parent / "weights", config.parent / "smollm2-135m"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert resolved(monkeypatch, capsys, config, "weights") == str(config.parent / "weights")
    assert resolved(monkeypatch, capsys, config, "./weights") == str(config.parent / "weights")
    assert resolved(monkeypatch, capsys, config, "here") == "here"  # only in the working directory
    assert resolved(monkeypatch, capsys, config, "org/name") == "org/name"
    assert resolved(monkeypatch, capsys, config, "smollm2-135m") == "smollm2-135m"  # a known name, whatever lies there
