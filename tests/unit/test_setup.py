"""Set-up: which environment it makes, when it starts afresh, and when it finds nothing to do."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+( ; [a-z_(]+.+)?")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bt_ray_setup", ROOT / ".setup" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load()


class Recorded(setup.Setup):  # type: ignore[misc, name-defined]
    """Set-up whose processes are only written down; `fails` may refuse one."""

    def __init__(self, root: Path, fails: Callable[[list[str]], bool] = lambda command: False) -> None:
        super().__init__(root, "cpu", with_model=True)
        self.list_path = root / "cpu.txt"
        self.commands: list[str] = []
        self.fails = fails

    def call(self, command: list[str], advice: str) -> str:
        self.commands.append(" ".join(command))
        if self.fails(command):
            raise setup.SetupError(advice)
        if "venv" in command:
            self.python.parent.mkdir(parents=True, exist_ok=True)
            self.python.touch()
            if "--clear" in command:
                self.marker.unlink(missing_ok=True)
                self.stamp_path.unlink(missing_ok=True)
        if "resolve(" in command[-1]:
            (self.root / "model").mkdir(exist_ok=True)
            return f"a line of somebody else's\n{self.root / 'model'}\n"
        return ""

    def did(self, words: str) -> bool:
        return any(words in command for command in self.commands)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "cpu.txt").write_text("# a list\nray==1.0\ntorch==2.0+cpu\nzipp==3.0 ; python_version < '4'\n")
    return tmp_path


def _done(checkout: Path) -> None:
    Recorded(checkout).run()


def test_a_second_call_starts_no_process(checkout: Path) -> None:
    first, second = Recorded(checkout), Recorded(checkout)
    first.run()
    second.run()
    assert first.did("-e " + str(checkout)) and first.did("zipp==3.0") and first.did("import dspy") and first.did("resolve(")
    assert first.did("--no-index -r"), "what was installed is compared with the list"
    assert all("--no-deps" in command for command in first.commands if "pip install" in command)
    assert second.commands == []


def test_an_interrupted_call_is_started_afresh(checkout: Path) -> None:
    with pytest.raises(setup.SetupError):
        Recorded(checkout, fails=lambda command: "ray==1.0" in command).run()
    again = Recorded(checkout)
    again.run()
    assert "--clear" in again.commands[0] and again.did("ray==1.0")
    assert not again.marker.exists()


def test_another_list_starts_afresh_and_another_pyproject_does_not(checkout: Path) -> None:
    _done(checkout)
    (checkout / "pyproject.toml").write_text("[project]\nversion = '2'")
    project = Recorded(checkout)
    project.run()
    assert len(project.commands) == 1 and project.did(" -e ")
    (checkout / "cpu.txt").write_text("# other words\n" + (checkout / "cpu.txt").read_text())
    same = Recorded(checkout)
    same.run()
    assert same.commands == []
    (checkout / "cpu.txt").write_text("ray==2.0\n")
    packages = Recorded(checkout)
    packages.run()
    assert "--clear" in packages.commands[0] and packages.did("ray==2.0")


def test_an_environment_of_somebody_else_is_filled_not_cleared(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").touch()
    filled = Recorded(checkout)
    filled.run()
    assert not filled.did("--clear") and filled.did("ray==1.0")


def test_a_model_that_was_removed_is_prepared_again_alone(checkout: Path) -> None:
    _done(checkout)
    (checkout / "model").rmdir()
    again = Recorded(checkout)
    again.run()
    assert len(again.commands) == 1 and again.did("resolve(")


def test_a_damaged_stamp_is_no_stamp(checkout: Path) -> None:
    _done(checkout)
    (checkout / ".venv" / ".bt_ray_setup").write_text("{")
    again = Recorded(checkout)
    again.run()
    assert again.did("ray==1.0")
    assert json.loads((checkout / ".venv" / ".bt_ray_setup").read_text())["packages"]


def test_torch_that_pip_cannot_find_comes_through_uv(checkout: Path) -> None:
    def pip_lacks_torch(command: list[str]) -> bool:
        return "pip" in command and "torch==2.0+cpu" in command and "--torch-backend" not in command

    call = Recorded(checkout, fails=pip_lacks_torch)
    call.run()
    assert call.did("--torch-backend cpu torch==2.0+cpu")
    with pytest.raises(setup.SetupError, match="Neither pip nor uv"):
        Recorded(checkout, fails=lambda command: "torch==2.0+cpu" in command).install_chunk(["torch==2.0+cpu"])


def test_a_failing_process_shows_the_end_of_its_output_without_passwords(checkout: Path) -> None:
    call = setup.Setup(checkout, "cpu", with_model=False)
    script = "echo WARNING: Location x is ignored; echo //user:secret@host/simple; exit 3"
    with pytest.raises(setup.SetupError) as caught:
        call.call(["sh", "-c", script], "it failed")
    assert "it failed (exit code 3)" in str(caught.value) and "//***@host/simple" in str(caught.value)
    assert "secret" not in str(caught.value) and "Location" not in str(caught.value)


@pytest.mark.parametrize(
    ("system", "machine", "version", "word"),
    [("Darwin", "arm64", (3, 11), "Darwin"), ("Linux", "x86_64", (3, 10), "3.10"), ("Linux", "riscv64", (3, 11), "riscv64")],
)
def test_an_unsupported_machine_is_named(system: str, machine: str, version: Any, word: str) -> None:
    with pytest.raises(setup.SetupError, match=word):
        setup.check_platform(system, machine, version)


def test_supported_machines() -> None:
    assert setup.check_platform("Linux", "x86_64", (3, 11)) is None
    assert "untested" in setup.check_platform("Linux", "aarch64", (3, 12))


def test_chunks_keep_every_line_and_torch_alone() -> None:
    lines = setup.read_list(ROOT / ".setup" / "cpu.txt")
    chunks = setup.split(lines, 6)
    assert sorted(line for chunk in chunks for line in chunk) == sorted(lines)
    assert [line.split("==")[0] for line in chunks[0]] == ["torch"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lists_are_pinned_and_name_no_place(device: str) -> None:
    path = ROOT / ".setup" / f"{device}.txt"
    lines = setup.read_list(path)
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    assert "://" not in path.read_text() and "--" not in "".join(lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torchvision", "torchaudio", "torchcodec"} & names == (
        set() if device == "cpu" else {"torchvision", "torchaudio", "torchcodec"}
    )
