"""A searcher of the user's own that cannot be imported: one sentence with its file, line and error."""

import sys
from types import SimpleNamespace

import pytest

from bt_ray.errors import ConfigError
from bt_ray.runs.commit import StepKey
from bt_ray.search.base import check_optimizer, source_id
from bt_ray.stages.searching import search
from tests.support.plans import config

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


MINE = "class Mine:\n    def __init__(self, context): ...\n"


def test_a_searcher_of_the_users_own_is_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "bt_ray_test_base.py").write_text(MINE)
    (tmp_path / "other.py").write_text("from bt_ray_test_base import Mine\n")
    first = {name: source_id(f"{name}.py:Mine", str(tmp_path)) for name in ("mine", "other")}
    assert None not in first.values() and source_id("bt_ray_test_base:Mine", ".") == first["mine"]
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")
    assert source_id("mine.py:Mine", str(tmp_path)) != first["mine"]
    (tmp_path / "bt_ray_test_base.py").write_text(MINE + "# changed\n")
    assert source_id("other.py:Mine", str(tmp_path)) != first["other"], "the class is defined there"
    assert [source_id(name, ".") for name in ("mipro", "dspy.SIMBA")] == [None, None]


def search_hash(optimizer, folder):
    """Identity of a search step that is committed already."""
    own, keys = config(base_dir=str(folder), steps={"p": {"optimizer": optimizer}}, strategy="p"), []

    def key(kind, **inputs):
        keys.append(StepKey(kind, inputs))
        return keys[-1]

    ctx = SimpleNamespace(config=own, key=key, examples=lambda split: [], node=SimpleNamespace(steps=("p",)))
    ctx.step = lambda key: SimpleNamespace(record=lambda: "committed")
    teacher = SimpleNamespace(record=SimpleNamespace(result={"rows_hash": "r"}), rows=[])
    prompts = ({"predictors": {}}, {"predictors": {}})
    assert search(ctx, own.steps["p"], prompts, teacher, SimpleNamespace(id="w")) == "committed"
    return keys[0].hash


def test_a_changed_searcher_is_another_search_step(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    before = [search_hash(name, tmp_path) for name in ("mine.py:Mine", "mipro")]
    assert before == [search_hash(name, tmp_path) for name in ("mine.py:Mine", "mipro")]
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")
    after = [search_hash(name, tmp_path) for name in ("mine.py:Mine", "mipro")]
    assert after[0] != before[0] and after[1] == before[1]
