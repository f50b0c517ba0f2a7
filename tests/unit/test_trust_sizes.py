"""Input of others that is damaged, or would grow as it is read: one sentence, in bounded time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bt_ray import config_file
from bt_ray.bundle import read_inputs
from bt_ray.config import RunConfig
from bt_ray.errors import CommitError, ConfigError, RunDirError
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.identity import content_hash
from bt_ray.runs.run_dir import RunDir
from tests.support import plans
from tests.support.spending import forge

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "uses YAML aliases"),
        ("a: " + "[" * 90_000, "nested deeper than"),
        ("a: " + "{a: " * 20_000, "nested deeper than"),
        ("x" * 200_000, "is larger than"),
        ("".join(f"k{n}: 1\n" for n in range(2000)), "and 1983 more|and 198[0-9] more"),
    ],
    ids=["laughs", "brackets", "braces", "large", "keys"],
)
def test_a_config_that_would_grow_is_refused_at_once(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=says):
        config_file.load(tmp_path / "config.yaml")
    assert time.process_time() - started < 60, "a bound, not a speed: without the check these take hours"


def test_laughs_on_the_command_line() -> None:
    laugh = "[&a [x, x], &b [*a, *a], [*b, *b]]"
    with pytest.raises(ConfigError, match="uses YAML aliases"):
        config_file.with_overrides(plans.config(), (f"steps={laugh}",))
    assert read_inputs(["q"], [laugh], {"q": Any})["q"] == laugh, "taken as the text that it is"


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{}", '{"config": 1, "identity": {}}', '{"config": {"a": 1}, "identity": {}}', "[" * 100_000, "9" * 5000],
)
def test_a_damaged_header_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises((RunDirError, CommitError)) as error:
        RunDir(tmp_path).config()
    assert "\n" not in str(error.value)


def test_a_record_whose_hash_fits_and_whose_parts_do_not(tmp_path: Path) -> None:
    step = Step(tmp_path, StepKey("rollout", {"a": 1}))
    step.begin()
    step.commit("p", {"passed": 1}, Cost())
    good = json.loads((step.folder / "record.json").read_text())
    for change in ({"cost": {"lm_calls": "x"}}, {"cost": {"more": 1}}, {"files": []}, {"name": 1}, {"attempt": None}):
        forge(step.folder, {**good, **change})  # with a checksum that fits: it would tell before anything else does
        with pytest.raises(CommitError, match="changed or damaged"):
            step.record()
    forge(step.folder, {**good, "result": 3, "result_hash": content_hash(3)})
    with pytest.raises(CommitError, match="changed or damaged"):
        step.record()
    forge(step.folder, good)
    assert step.record() is not None
    (step.folder / "record.json").write_text(json.dumps({name: value for name, value in good.items() if name != "checksum"}))
    with pytest.raises(CommitError, match="changed or damaged"):
        step.record()


def test_numbers_that_are_none_are_no_config() -> None:
    data = plans.config().model_dump(mode="json")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            RunConfig.model_validate({**data, "rollout": {"metric_threshold": value}})
