"""The config reader and the strategy grammar under random text: an error of ours, or a config, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bt_ray import config_file, strategy
from bt_ray.config import RunConfig
from bt_ray.errors import BtRayError, ConfigError
from tests.support.plans import TASKS

SEED_TEXT = (TASKS / "helpdesk" / "config.yaml").read_text()
LINES = SEED_TEXT.splitlines()
FUZZ = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), database=None)
SMALL = settings(FUZZ, max_examples=60)
SCALARS = st.sampled_from(
    ["1e999", ".nan", "-.inf", "9" * 5000, "2024-99-99", "!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary é", "0b", "0x_",
     "~", "", "[]", "{}", "[[", "? [a]", "<<: 3", "!!python/name:os.system", "&a", "*a", "\0", "\ud7ff", "-1", "true", "'", "|", "- x"]
)  # fmt: skip


def load(text: str, *overrides: str) -> RunConfig | None:
    """The config of a text, or None where it was refused in words of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            return config_file.load(path, overrides)
        except ConfigError as error:
            assert str(error).strip()
            return None


@FUZZ
@given(st.text(st.characters() | st.sampled_from(":-[]{}&*!|>'\"#%?\n ,~"), max_size=60))
@example("2024-99-99")
@example("!!bool x")
@example("!!int x")
@example("!!float _")
@example("a: " + "9" * 5000)
@example("!!timestamp x")
@example("[" * 5000)
@example("1: 2")
@example("? [a, b]\n: c")
@example("? {a: b}\n: c")
@example("!!set {a, b}")
@example("0x_")
@example("---\na: 1\n---\nb: 2")
@example("=")
def test_any_text(text: str) -> None:
    load(text)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """The shipped config with a few of its lines or values changed."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["drop", "twice", "value", "key", "indent", "cut", "insert"]))
        key, colon, _ = lines[at].partition(":")
        changed = {
            "drop": "",
            "twice": f"{lines[at]}\n{lines[at]}",
            "value": f"{key}{colon} {draw(SCALARS)}",
            "key": f"{draw(SCALARS)}: {key.strip()}",
            "indent": " " * draw(st.integers(0, 5)) + lines[at].strip(),
            "cut": lines[at][: draw(st.integers(0, 30))],
            "insert": lines[at][: len(lines[at]) // 2] + draw(SCALARS) + lines[at][len(lines[at]) // 2 :],
        }
        lines[at] = changed[kind]
    return "\n".join(lines)


@SMALL
@given(mutated())
def test_a_shipped_config_with_changes(text: str) -> None:
    found = load(text)
    assert found is None or RunConfig.model_validate(found.model_dump(mode="json")) == found


@SMALL
@given(
    st.sampled_from(["seed", "steps.p", "steps.w.epochs", "data", "a.b.c", "", ".", "steps..x", "models.x"]),
    SCALARS | st.text(max_size=15),
)
@example("steps.w.global_batch_size", "1" + "0" * 400)  # a float cannot hold it
@example("seed", "9" * 5000)
@example("seed", "2024-99-99")
@example("seed", "[" * 5000)
@example("strategy", "[]")
@example("engine", "{1: 2}")
@example("steps", "{1: {2: 3}}")
def test_overrides(key: str, value: str) -> None:
    load(SEED_TEXT, f"{key}={value}")


KNOWN = ("p", "w", "polish")


@FUZZ
@given(st.text(st.sampled_from("pw->,;+ \n\tpolish_vanilé0"), max_size=20))
@example("p\n")
@example("p -> -> w")
def test_a_strategy_is_read_or_refused(text: str) -> None:
    try:
        steps = strategy.parse(text, KNOWN)
    except ConfigError as error:
        assert str(error).startswith("strategy: ")
        return
    assert set(steps) <= set(KNOWN)
    node = strategy.StageNode(steps)
    assert strategy.parse(node.path, KNOWN) == steps and strategy.StageNode.of(node.id) == node


@FUZZ
@given(st.lists(st.sampled_from(KNOWN), max_size=6), st.sampled_from(["->", " -> ", "  ->", "->\t"]))
def test_every_strategy_that_can_be_written_is_read(steps: list[str], arrow: str) -> None:
    assert strategy.parse(arrow.join(steps) or "vanilla", KNOWN) == tuple(steps)


@FUZZ
@given(st.lists(st.text(st.sampled_from("pw->, "), max_size=8), max_size=5))
def test_a_list_of_strategies_gives_a_tree_or_a_reason(texts: list[str]) -> None:
    try:
        nodes = strategy.tree(strategy.expand(texts, KNOWN))
    except BtRayError:
        return
    assert len({node.id for node in nodes}) == len(nodes)
    assert all(node.parent is None or node.parent in nodes[:at] for at, node in enumerate(nodes))
