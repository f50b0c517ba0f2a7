"""`bt-ray plan`, with and without its probe, on a tiny model and an engine that answers by rule."""

from dataclasses import dataclass

import pytest

from bt_ray.cli import main
from tests.support.stub_pool import StubPool
from tests.support.tiny_run import write_run


@dataclass
class RulePool(StubPool):
    """Answers each of the two modules with a value of its own."""

    closed = 0

    async def close(self):
        type(self).closed += 1


def answer(messages):
    return "left" if "side" in messages[0]["content"] else "red"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("plan"))


@pytest.fixture(autouse=True)
def home(config, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(config.parent / "home"))


def lines_of(capsys):
    """What stands behind each stage's name."""
    lines = [line.strip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    return dict(line.split("  ", 1) for line in lines if "  " in line), " ".join(lines)


def test_without_a_probe_it_counts(config, capsys):
    assert main(["plan", str(config), "--no-probe"]) == 0
    found, whole = lines_of(capsys)
    # 8 examples x 2 samples, 6 candidates on 5 rows, 5 + 1 rows, each of 2 calls
    calls = {"vanilla": 12, "p": 32 + 60 + 12, "w": 12, "p -> w": 32 + 24, "p -> w -> p": 32 + 60 + 12, "test": 6 * 14 + 12}
    for path, number in calls.items():
        assert f" {number} LM calls, roughly " in found[path] and "tokens" not in found[path], path
        assert found[path].endswith("GiB")
    assert f"Together at most {sum(calls.values())} LM calls" in whole
    assert "tokens are unknown" in whole
    assert not (config.parent / "run").exists()


def test_with_a_probe_it_measures(config, capsys, monkeypatch):
    monkeypatch.setattr("bt_ray.lm.local.LocalPool", lambda engine: RulePool(answer))
    assert main(["plan", str(config)]) == 0
    found, whole = lines_of(capsys)
    assert "Measured on 8 runs of the program as written: 2.0 calls a run" in whole and "50% pass" in whole
    # one completion token a call, and with demos more prompt tokens for as many calls
    assert "+ 12 tokens" in found["vanilla"] and "+ 12 tokens" in found["w"]
    tokens = {
        path: int(text.split("calls, ")[1].split(" +")[0].replace(" k", "000").replace(" ", ""))
        for path, text in found.items()
        if "calls, " in text
    }
    assert tokens["p -> w"] > tokens["vanilla"] * (32 + 24) / 12
    assert "roughly" not in found["p"] and "roughly" in found["w"]
    assert RulePool.closed == 1


def test_bad_input_ends_as_a_run_does(config, capsys):
    assert main(["plan", str(config), "--set", "strategy=p -> v"]) == 2
    assert "names the step 'v'" in capsys.readouterr().err
