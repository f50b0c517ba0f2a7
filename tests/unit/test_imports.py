"""Imports point one way, and the light modules stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.plans import config

ROOT = Path(__file__).parents[2]


def rooms():
    """The rows of ARCHITECTURE.md's table of rooms, from the top to the ground; a module may import those of its own and of lower rows."""
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## Rooms\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [tuple(re.sub(r"\.py$|/$", "", name) for name in re.findall(r"`([^`]+)`", cell)) for cell in cells]


ORDER = rooms()
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Facts are read with the rollout room's reader; stages are met through jobs and files only.
FORBIDDEN = {"driver": ("stages",), "cli": ("stages",), "better_together": ("stages",)}


def modules():
    return sorted(path for path in (ROOT / "bt_ray").rglob("*.py") if path.name != "__init__.py" or path.parent.name != "bt_ray")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bt_ray":
            if node.module == "bt_ray":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bt_ray."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT / "bt_ray").parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no place in the order of rooms"
    for name in imported(path):
        if name in LEVEL:
            assert LEVEL[name] >= LEVEL[room], f"{path} imports {name}, which stands above {room}"
            assert name not in FORBIDDEN.get(room, ())


def test_every_room_of_the_table_is_there_and_named_once():
    names = [name for row in ORDER for name in row]
    assert len(names) == len(set(names)) > 30
    assert [
        name for name in names if not (ROOT / "bt_ray" / name).is_dir() and not (ROOT / "bt_ray" / f"{name}.py").is_file()
    ] == []


def test_stages_do_not_import_each_other():
    kinds = {"vanilla", "prompt", "weight", "final"}
    for kind in kinds:
        text = (ROOT / "bt_ray" / "stages" / f"{kind}.py").read_text()
        assert not [other for other in kinds - {kind} if f"stages.{other}" in text or f"stages import {other}" in text]


@pytest.mark.parametrize("statement", ["import bt_ray", "import bt_ray.cli", "import bt_ray.config, bt_ray.strategy"])
def test_light_modules_load_nothing_heavy(statement):
    heavy = "{'torch', 'vllm', 'ray', 'dspy', 'transformers'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("words", ["status", "report", "report --json", "stop"])
def test_what_reads_a_run_directory_starts_neither_ray_nor_torch(tmp_path, words):
    """They are asked on machines that reach no cluster."""
    verb, *options = words.split()
    row = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    identity = {
        "follow": "a",
        "weights": {"model_dir": str(tmp_path)},
        "signatures": {"one": {"inputs": ["x"], "outputs": ["z"]}},
    }
    data = {"train": "t", "val": "v", "test": "t", "inputs": ["x"]}
    run = RunDir(tmp_path / "run")
    run.create(config(strategy="p", data=data), identity, {name: [row] for name in ("train", "search", "select", "test")})
    code = (
        "import sys\nfrom bt_ray.cli import main\n"
        f"print('CODE', main([{verb!r}, {str(run.root)!r}, *{options!r}]))\n"
        "print('HEAVY', sorted({'torch','vllm','ray','dspy','transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "CODE 0" in output and "HEAVY []" in output


def test_help_loads_nothing_heavy_and_names_the_verbs():
    code = (
        "import sys, contextlib\nfrom bt_ray.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print('HEAVY', sorted({'torch','vllm','ray','dspy','transformers','pandas','numpy'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in output
    for verb in ("run", "submit", "status", "stop", "report", "ask", "model"):
        assert f"\n    {verb} " in output
