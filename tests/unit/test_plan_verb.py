"""`bt-ray plan`, with and without its probe, on a tiny model and an engine that answers by rule."""

from dataclasses import dataclass

import pytest

from bt_ray.cli import main
from bt_ray.config_file import load
from bt_ray.preflight import prepare
from bt_ray.report.probes import keep_probe, kept_probe
from bt_ray.running import keep_plan
from bt_ray.runs.opening import open_run
from tests.support.plans import PROBE
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
        assert f"about {number} LM calls, " in found[path] or f"(at most {number}), " in found[path], path
        assert "tokens unknown, time unknown" in found[path] and found[path].endswith("GiB")  # no rate is of this model
    assert f"(at most {sum(calls.values())}), tokens unknown and time unknown." in whole
    assert "Times and tokens are unknown" in whole
    assert not (config.parent / "run").exists()


def test_with_a_probe_it_measures(config, capsys, monkeypatch):
    monkeypatch.setattr("bt_ray.lm.local.LocalPool", lambda engine: RulePool(answer))
    assert main(["plan", str(config)]) == 0
    found, whole = lines_of(capsys)
    assert "Measured on 8 runs of the program as written: 2.0 calls a run" in whole and "50% pass" in whole
    # one completion token a call, and with demos more prompt tokens for as many calls
    assert "+ 12 tokens" in found["vanilla"] and "+ 12 tokens" in found["w"]
    assert " tokens, " in found["p"] and "roughly" not in found["p"]
    assert "time unknown" in found["w"] and "time unknown" not in found["vanilla"]  # the speed of training was not measured
    assert RulePool.closed == 1
    prepared = prepare(load(config, ()))
    kept = kept_probe(prepared.config, prepared.identity)
    assert kept is not None and (kept.num_runs, kept.calls_per_run, kept.pass_share) == (8, 2.0, 0.5)


def test_a_run_of_the_same_begins_with_what_was_measured(config, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(config.parent / "home"))
    prepared = prepare(load(config, ()))
    keep_probe(prepared.config, prepared.identity, PROBE)
    run = open_run(config.parent / "begun", prepared)
    keep_plan(run)
    plan = run.plan()
    assert (plan["vanilla"]["prompt_tokens"], plan["vanilla"]["completion_tokens"]) == (12 * 70, 12 * 5)
    assert plan["vanilla"]["seconds"] is not None
    longer = load(config, ("rollout.max_tokens=17",))
    assert kept_probe(longer, prepared.identity) is None, "measured of other answers"
    found = list((config.parent / "home" / "probes").glob("*.json"))
    assert len(found) == 1
    found[0].write_text("{")
    assert kept_probe(prepared.config, prepared.identity) is None


def test_bad_input_ends_as_a_run_does(config, capsys):
    assert main(["plan", str(config), "--set", "strategy=p -> v"]) == 2
    assert "names the step 'v'" in capsys.readouterr().err
