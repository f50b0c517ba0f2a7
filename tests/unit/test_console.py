"""The command that a finished run proposes."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bt_ray.console import next_line
from bt_ray.environment import own_command


def run_of(inputs, pick):
    config = SimpleNamespace(data=SimpleNamespace(inputs=inputs))
    return SimpleNamespace(config=lambda: config, pick=lambda: pick)


@pytest.mark.parametrize(
    ("inputs", "pick", "words"),
    [
        (("message",), {"id": "p"}, 'bt-ray ask runs/a "..."'),
        (("context", "question"), {"id": "p"}, 'bt-ray ask runs/a context="..." question="..."'),
        (("message",), None, "bt-ray status runs/a"),
    ],
)
def test_the_next_command_fits_the_program(inputs, pick, words):
    line = next_line(run_of(inputs, pick), Path("runs/a"), "bt-ray")
    assert line == f"Next: {words}    or: bt-ray report runs/a --html report.html"


def test_the_tool_is_named_so_that_the_shell_finds_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/bt-ray", "run"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert own_command() == ".venv/bin/bt-ray"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert own_command() == "bt-ray"
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert own_command() == "bt-ray"
