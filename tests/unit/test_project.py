"""The project's own files: pins agree, nothing names one machine, every make target is real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bt_ray

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Written in pieces, so that this file does not name them.
MACHINE_PATHS = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "/opt/" + "py", "/opt/" + "wheels", "/tmp/" + "bs")))
OPEN_WORK = re.compile("TO" + "DO|FIX" + "ME")
TEXT = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".html", ""}


def _pins(lines: list[str]) -> set[tuple[str, str]]:
    """Name (normalised, without extras) and version of each pinned requirement."""
    found = (re.match(r"([A-Za-z0-9._-]+)(\[.*\])?==([^ ;]+)", line) for line in lines)
    return {(re.sub(r"[._]", "-", pin[1]).lower(), pin[3]) for pin in found if pin}


def _own_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in TEXT and path.is_file() and path.name != "LICENSE"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_direct_pins_stand_in_the_lists(device: str) -> None:
    extras = PROJECT["optional-dependencies"]
    direct = _pins([*PROJECT["dependencies"], *extras[device], *extras["test"]])
    listed = _pins((ROOT / ".setup" / f"{device}.txt").read_text(encoding="utf-8").splitlines())
    assert len(direct) > 20
    assert direct - listed == set()


def test_every_direct_dependency_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if re.match(r'    "[A-Za-z0-9.\[\],_-]+(==|>=)', line)]
    assert len(entries) > 25
    assert [line for line in entries if not re.search(r'",  # \w+', line)] == []


def test_version_is_one() -> None:
    assert PROJECT["version"] == bt_ray.__version__


def test_no_file_names_a_machine_or_leaves_work_open() -> None:
    files = _own_files()
    assert len(files) > 20
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line) or OPEN_WORK.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("target", ["help", "setup", "demo", "test", "lint"])
def test_make_target(target: str) -> None:
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0 and planned.stdout
    if target != "help":
        assert ".setup/setup.py" in planned.stdout
        listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert f"make {target}" in listed


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        ({"python3": "3.11", "python3.13": "3.13"}, "python3"),
        ({"python3": "3.10", "python3.13": None, "python3.12": "3.12", "python3.11": "3.11"}, "python3.12"),
        ({"python3": "3.14", "python3.13": "3.13"}, "python3.13"),
        ({"python3": None, "python3.13": None, "python3.12": None, "python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.10", "python3.13": None, "python3.12": None, "python3.11": None}, "python3"),
    ],
)
def test_make_takes_the_first_python_that_is_supported(tmp_path: Path, versions: dict[str, str | None], taken: str) -> None:
    for name, version in versions.items():
        major, minor = (version or "0.0").split(".")
        # The check itself is run, by a Python that claims to be of this version; None is one that does not start.
        claim = f"code=\"import sys; sys.version_info = ({major}, {minor}, 1, 'final', 0); $2\""
        run = f'{claim}\nexec {sys.executable} "$1" "$code"' if version else "exit 127"
        (tmp_path / name).write_text(f"#!/bin/sh\n{run}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON" and not name.startswith("MAKE")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    planned = subprocess.run(["make", "-n", "setup"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert planned.stdout == f"{taken} .setup/setup.py\n"
    named = subprocess.run(["make", "-n", "setup", "PYTHON=mine"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert named.stdout == "mine .setup/setup.py\n"
