"""LM calls that are made once."""

import asyncio
import json

import pytest

from bt_ray.config import PromptStep
from bt_ray.errors import PoolError
from bt_ray.lm.journal import JournalPool
from bt_ray.lm.types import LMAnswer, LMCall, Sampling, Weights
from bt_ray.search.proposer import Proposer

BASE = Weights("base", "base", "m", "m")
STEP = PromptStep.model_validate({"optimizer": "opro", "proposer_temperature": 0.7, "proposer_max_tokens": 9})


class Counting:
    """Answers with the number of the call."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    async def generate(self, call):
        self.calls.append(call)
        number = len(self.calls)
        if number == self.fail_at:
            raise PoolError("gone")
        await asyncio.sleep(0)
        return LMAnswer(f"answer {number}", (1, 2), (3,), "stop", call.weights.id)


def call(text, seed=None, weights=BASE):
    return LMCall(weights, Sampling(seed=seed), messages=({"role": "user", "content": text},))


def test_equal_calls_have_one_answer_also_after_a_restart(tmp_path):
    pool = Counting()
    first = asyncio.run(JournalPool(pool, tmp_path / "calls.jsonl").generate(call("a")))
    again = JournalPool(pool, tmp_path / "calls.jsonl")
    assert asyncio.run(again.generate(call("a"))) == first
    assert len(pool.calls) == 1
    assert again.answers() == [first]


def test_another_seed_text_or_weights_is_another_call(tmp_path):
    pool = Counting()
    journal = JournalPool(pool, tmp_path / "calls.jsonl")
    others = [call("a"), call("a", seed=1), call("b"), call("a", weights=Weights("tuned", "lora", "m", "m"))]
    texts = {asyncio.run(journal.generate(one)).text for one in others}
    assert len(texts) == len(pool.calls) == 4


def test_what_the_pool_raises_is_not_kept(tmp_path):
    pool = Counting(fail_at=1)
    journal = JournalPool(pool, tmp_path / "calls.jsonl")
    with pytest.raises(PoolError):
        asyncio.run(journal.generate(call("a")))
    assert asyncio.run(journal.generate(call("a"))).text == "answer 2"


def test_a_torn_line_of_a_crash_costs_its_own_answer_alone(tmp_path):
    path = tmp_path / "calls.jsonl"
    asyncio.run(JournalPool(Counting(), path).generate(call("a")))
    with open(path, "a") as file:
        file.write('{"key": "torn')
    pool = Counting()
    journal = JournalPool(pool, path)
    asyncio.run(journal.generate(call("a")))
    asyncio.run(journal.generate(call("b")))
    assert len(pool.calls) == 1
    assert len(JournalPool(Counting(), path).answers()) == 2
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_proposer_draws_equal_prompts_apart_and_repeats_itself(tmp_path):
    pool = Counting()
    ask = Proposer(JournalPool(pool, tmp_path / "calls.jsonl"), BASE, STEP, seed=3)
    first = ask(["same", "same"], seed=1)
    assert len(set(first)) == 2
    assert ask(["same", "same"], seed=1) == first
    assert ask(["same", "same"], seed=2) != first
    sampling = pool.calls[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.7, 9)
    assert len(pool.calls) == 4
