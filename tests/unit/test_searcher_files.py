"""A searcher of the user's own that cannot be imported: one sentence with its file, line and error."""

import sys

import pytest

from bt_ray.errors import ConfigError
from bt_ray.search.base import check_optimizer

FAULTS = [
    ("x = 1\nclass Mine(:\n", 2, "SyntaxError"),
    ("x = 1\n\nclass Mine(Base): ...\n", 3, "NameError: name 'Base' is not defined"),
    ("import no_such_package\n", 1, "ModuleNotFoundError: No module named 'no_such_package'"),
    ("def check():\n    raise SystemExit('no key')\ncheck()\n", 2, "SystemExit: no key"),
]


@pytest.mark.parametrize(("text", "line", "words"), FAULTS)
def test_a_file_that_fails(tmp_path, text, line, words):
    (tmp_path / "mine.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError) as error:
        check_optimizer("mine.py:Mine", str(tmp_path))
    said = str(error.value)
    assert said.startswith(f"optimizer: importing {tmp_path / 'mine.py'} fails in {tmp_path / 'mine.py'}, line {line}, with ")
    assert words in said
    assert not [name for name in set(sys.modules) - before if name.startswith("bt_ray_user_searcher")]


@pytest.mark.parametrize(("text", "line", "words"), FAULTS[:2] + FAULTS[3:])
def test_a_module_that_fails(tmp_path, monkeypatch, text, line, words):
    (tmp_path / "bt_ray_test_searcher.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        check_optimizer("bt_ray_test_searcher:Mine", str(tmp_path))
    assert f"importing bt_ray_test_searcher fails in {tmp_path}/bt_ray_test_searcher.py, line {line}, with" in str(error.value)
    assert words in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"x = '\x00'")
    with pytest.raises(ConfigError, match=r"importing .*mine.py fails with \w+Error: source code .*null bytes"):
        check_optimizer("mine.py:Mine", str(tmp_path))
