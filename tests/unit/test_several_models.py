"""Weights of a program with several models, and the pool that carries calls to the right one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from bt_ray.config import RunConfig
from bt_ray.lm import serve_app
from bt_ray.lm.journal import JournalPool
from bt_ray.lm.routed import RoutedPool, context_of, pools_of
from bt_ray.lm.types import LMCall, Sampling, Weights
from bt_ray.lm.weights import combined, from_record, to_record
from bt_ray.resources import demand
from tests.support.compiling import SEARCH, STUDENT, TRAIN, session
from tests.support.programs import answer
from tests.support.stub_pool import StubPool

OWN = Weights("own", "base", "/m/own", "/m/own")
BIG = Weights("big", "base", "/m/big", "/m/big", model="second")
BOTH = combined([("answer*", BIG), ("*", OWN)])


def config(**parts: Any) -> RunConfig:
    data = {"train": "t", "val": "v", "inputs": ["q"]}
    return RunConfig.model_validate(
        {"program": "a:b", "metric": "a:c", "data": data, "strategy": "p", "steps": {"p": {"optimizer": "labeled"}}, **parts}
    )


def test_the_first_glob_that_matches_says_who_answers() -> None:
    assert BOTH.part_for("answer_long") == BIG and BOTH.part_for("query") == OWN and BOTH.part_for("(dynamic)") == OWN
    assert BOTH.part_for("(fixed) answer") == BIG
    assert OWN.part_for("answer_long") is OWN
    assert len({BOTH.id, OWN.id, BIG.id, combined([("ans*", BIG), ("*", OWN)]).id}) == 4


def test_they_survive_json_and_records_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    assert Weights.from_json(json.loads(json.dumps(BOTH.to_json()))) == BOTH
    assert "parts" not in OWN.to_json() and "model" not in OWN.to_json()
    tuned = replace(BIG, id="tuned", kind="lora", model_dir=str(tmp_path / "merged"), adapter_dir=str(tmp_path / "adapter"))
    weights = combined([("answer*", tuned), ("*", OWN)])
    record = json.loads(json.dumps(to_record(weights, tmp_path, BOTH)))
    assert str(tmp_path) not in json.dumps(record) and "/m/" not in json.dumps(record)
    assert from_record(record, tmp_path, BOTH) == weights


def test_each_call_goes_to_the_engines_of_its_model() -> None:
    pools = {"": StubPool(lambda _: "small"), "second": StubPool(lambda _: "large")}
    routed = RoutedPool(pools)
    for predictor, text in (("answer", "large"), ("query", "small")):
        call = LMCall(BOTH.part_for(predictor), Sampling(), ({"role": "user", "content": "x"},))
        assert asyncio.run(routed.generate(call)).text == text
    loaded: list[str] = []

    class Loading(StubPool):
        async def ensure(self, weights: Weights) -> None:
            loaded.append(weights.id)

    asyncio.run(RoutedPool({"": Loading(lambda _: ""), "second": Loading(lambda _: "")}).ensure(BOTH))
    assert sorted(loaded) == ["big", "own"]


def test_an_optimiser_that_runs_the_program_asks_each_model_for_its_own_predictor(tmp_path: Path) -> None:
    pools = {"": StubPool(answer), "second": StubPool(answer)}
    weights = combined([("classify", BIG), ("*", OWN)])
    run = replace(session(JournalPool(RoutedPool(pools), tmp_path / "calls.jsonl")), weights=weights)

    def work(program: Any, metric: Any, trainset: list[Any], valset: list[Any]) -> Any:
        assert all(metric(example, program(**example.inputs())) for example in trainset)
        return program

    assert run.compile(STUDENT, TRAIN, SEARCH, work) == STUDENT
    asked = {name: pool.calls for name, pool in pools.items()}
    assert len(asked[""]) == len(asked["second"]) == len(TRAIN)
    assert {call.weights.id for call in asked[""]} == {"own"} and {call.weights.id for call in asked["second"]} == {"big"}
    assert all("\ndepartment: " in call.messages[-1]["content"] for call in asked["second"])
    assert not any("\ndepartment: " in call.messages[-1]["content"] for call in asked[""])
    kept = [json.loads(line)["answer"]["weights_id"] for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["big"] * len(TRAIN) + ["own"] * len(TRAIN)


def test_one_model_needs_no_routing_and_each_further_one_has_its_engines() -> None:
    assert pools_of(config(), lambda name, engine: (name, engine.max_model_len)) == ("", 2048)
    made: list[tuple[str, int]] = []
    several = config(models={"second": {"model": "x", "engine": {"max_model_len": 64}}}, assign={"a*": "second", "b": "second"})
    assert isinstance(pools_of(several, lambda name, engine: made.append((name, engine.max_model_len))), RoutedPool)
    assert made == [("", 2048), ("second", 64)]
    assert demand(several, has_gpu=True).generate_gpus == 2 and demand(config(), has_gpu=True).generate_gpus == 1
    assert demand(several, has_gpu=False).generate_cpus == demand(config(), has_gpu=False).generate_cpus + 1


def test_engines_of_a_proposer_or_a_teacher_count_as_well() -> None:
    steps = {
        "p": {"optimizer": "opro", "proposer": {"model": "x", "engine": {"tensor_parallel_size": 2}}, "teacher": {"model": "y"}}
    }
    assert demand(config(steps=steps), has_gpu=True).generate_gpus == 1 + 2  # one after the other, so the larger


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"assign": {"a": "second"}}, "there is no model 'second'"),
        ({"models": {"second": "x"}}, "no predictor is assigned"),
        ({"models": {"a b": "x"}, "assign": {"a": "a b"}}, "must be a letter"),
    ],
)
def test_models_and_assignments_must_name_each_other(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**parts)


def test_a_prompt_is_measured_with_the_tokenizer_and_the_context_of_its_own_model() -> None:
    several = config(models={"second": {"model": "x", "engine": {"max_model_len": 64}}}, assign={"answer*": "second"})
    assert context_of(several, BOTH, "answer") == ("/m/big", 64)
    assert context_of(several, BOTH, "query") == ("/m/own", 2048) == context_of(config(), OWN, "answer")


def test_the_end_of_a_run_takes_the_pools_of_its_other_models_and_of_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    names = ["bt-ray-a", "bt-ray-a-second", "bt-ray-ab", "bt-ray-b-second", "theirs"]
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(names)))
    deleted: list[str] = []
    monkeypatch.setattr(serve_app, "delete", deleted.append)
    serve_app.delete_family("bt-ray-a")
    assert sorted(deleted) == ["bt-ray-a", "bt-ray-a-second"]
