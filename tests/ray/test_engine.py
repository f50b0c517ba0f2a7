"""The pool with real vLLM and a tiny random Llama: what is answered is what transformers answers.

The tests share one replica and run in this order, so that an engine starts as rarely as possible.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bt_ray.config import EngineConfig
from bt_ray.errors import CanaryError, CommitError, PoolError, PromptTooLongError
from bt_ray.lm import canary, node_cache
from bt_ray.lm.local import LocalPool
from bt_ray.lm.pool import ServePool, deploy
from bt_ray.lm.types import LMAnswer, LMCall, Sampling, Weights
from bt_ray.lm.weights import content_hash
from tests.support.tiny_adapters import merged_adapter, random_adapter, weights_of
from tests.support.tiny_model import make_tiny_model

CONFIG = EngineConfig.model_validate(
    {"max_model_len": 256, "kv_cache_gib": 0.25, "num_cpus": 0.5, "dtype": "float32", "num_threads": 2}
)
QUESTIONS = ("hello", "Which department answers this question?", "48 clips in April")
TOKENS = 10
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Made:
    """A base, an adapter of it, and a full model with other embeddings, each with its canary."""

    base: Weights
    lora: Weights
    full: Weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("models")
    base_dir = make_tiny_model(root / "base", seed=0)
    base = weights_of("base", base_dir, base_dir)
    adapter_dir = random_adapter(base_dir, root / "adapter")
    lora = merged_adapter(base, adapter_dir, root / "merged")
    full = weights_of("full", make_tiny_model(root / "full", seed=1), base_dir)
    return Made(base, lora, full)


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> ServePool:
    return deploy("tiny", CONFIG, start_timeout_s=120)


def test_base_answers_as_transformers_do(pool: ServePool, made: Made) -> None:
    asyncio.run(pool.ensure(made.base))
    assert _tokens(_ask(pool, made.base)) == _expected(made.base)


def test_answer_has_what_training_and_accounting_need(pool: ServePool, made: Made) -> None:
    answer = _ask(pool, made.base)[0]
    assert answer.weights_id == made.base.id and answer.finish_reason == "length" and len(answer.token_ids) == TOKENS
    assert answer.prompt_token_ids == _prompt(made.base, QUESTIONS[0]) and isinstance(answer.text, str)


def test_prompt_that_fits_not_is_refused_and_max_tokens_shrink(pool: ServePool, made: Made) -> None:
    ids = _prompt(made.base, QUESTIONS[0])
    with pytest.raises(PromptTooLongError, match="300 tokens and asks for 10 more, the context holds 256"):
        asyncio.run(pool.generate(LMCall(made.base, Sampling(max_tokens=10), prompt_token_ids=(ids * 300)[:300])))
    long = LMCall(made.base, Sampling(max_tokens=500, constraint={"regex": "a*"}), prompt_token_ids=(ids * 300)[:250])
    answer = asyncio.run(pool.generate(long))
    assert len(answer.token_ids) <= 6


def test_constraints_and_seeds(pool: ServePool, made: Made) -> None:
    async def both() -> tuple[list[LMAnswer], list[LMAnswer], list[LMAnswer]]:
        choice = Sampling(max_tokens=20, temperature=1.0, constraint={"choice": ["refund", "invoice"]})
        chosen = await asyncio.gather(*(pool.generate(_call(made.base, q, choice)) for q in QUESTIONS))
        runs = []
        for _ in range(2):  # different lengths together: in one step a seeded prompt must stay whole
            calls = [_call(made.base, "x " * n, Sampling(max_tokens=6, temperature=1.0, seed=n)) for n in range(1, 33)]
            runs.append(await asyncio.gather(*(pool.generate(c) for c in calls)))
        return chosen, runs[0], runs[1]

    chosen, first, second = asyncio.run(both())
    assert {a.text for a in chosen} <= {"refund", "invoice"}
    assert _tokens(first) == _tokens(second)
    assert len({a.token_ids for a in first}) > 16  # they are samples, not one greedy answer


def test_swap_to_merged_adapter_and_back(pool: ServePool, made: Made) -> None:
    process = asyncio.run(pool.pid())
    asyncio.run(pool.load(made.lora))
    assert _tokens(_ask(pool, made.lora)) == _expected(made.lora) != _expected(made.base)
    assert _tokens(_ask(pool, made.base)) == _expected(made.base)
    assert asyncio.run(pool.pid()) == process


def test_full_weights_with_other_embeddings(pool: ServePool, made: Made) -> None:
    assert _tokens(_ask(pool, made.full)) == _expected(made.full) != _expected(made.base)


def test_killed_replica_is_replaced_and_takes_its_engine_along(pool: ServePool, made: Made) -> None:
    import psutil

    replica = asyncio.run(pool.pid())
    engines = psutil.Process(replica).children(recursive=True)
    assert engines  # vLLM's core is a process of its own
    os.kill(replica, signal.SIGKILL)
    assert _tokens(_ask(pool, made.lora)) == _expected(made.lora)
    assert asyncio.run(pool.pid()) != replica
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive


def test_silently_wrong_swap_is_caught_and_nothing_is_promoted(pool: ServePool, made: Made) -> None:
    # With changed embeddings a reload in place leaves a tied head as it was: here the weights lie about them.
    liar = replace(made.full, id="0" * 16, embedding_id=made.base.embedding_id)
    with pytest.raises(CanaryError, match="disagrees with transformers"):
        asyncio.run(pool.generate(_call(liar, "hello", Sampling(max_tokens=2))))
    assert _tokens(_ask(pool, made.base)) == _expected(made.base)


def test_weights_without_canary_are_refused(made: Made) -> None:
    local = LocalPool(CONFIG)
    with pytest.raises(CanaryError, match="carry no canary"):
        asyncio.run(local.load(replace(made.base, canary=())))


def test_an_engine_that_asks_for_more_memory_than_there_is_fails_at_once_and_leaves_nothing(made: Made) -> None:
    import psutil

    local = LocalPool(CONFIG.model_copy(update={"kv_cache_gib": 1e6}))
    with pytest.raises(PoolError, match=r"vLLM did not start .*lower engine\.kv_cache_gib"):
        asyncio.run(local.load(made.base))
    assert not [child for child in psutil.Process().children() if "VLLM" in child.name()]


def test_adapter_at_run_time_from_the_nodes_cache_and_one_that_was_replaced_under_its_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv(node_cache.SETTING, str(cache))
    shutil.copytree(made.lora.adapter_dir or "", tmp_path / "replaced")
    random_adapter(made.base.base_dir, tmp_path / "replaced", seed=4)  # other tensors in the same files

    async def ask() -> list[LMAnswer]:
        local = LocalPool(CONFIG.model_copy(update={"lora": "runtime"}))
        try:
            with pytest.raises(CommitError, match="not the one with the id"):
                await local.ensure(replace(made.lora, adapter_dir=str(tmp_path / "replaced")))
            await local.ensure(made.lora)
            return await asyncio.gather(*(local.generate(_call(made.lora, q)) for q in QUESTIONS))
        finally:
            await local.close()

    assert _tokens(asyncio.run(ask())) == _expected(made.lora)
    copies = {path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()}
    assert copies == {made.base.id, content_hash(made.lora.adapter_dir or "")}


ALONE = """
import asyncio, sys, time
import psutil
from bt_ray.config import EngineConfig
from bt_ray.lm.local import LocalPool
from bt_ray.lm.models import resolve

if __name__ == "__main__":
    pool = LocalPool(EngineConfig.model_validate_json(sys.argv[2]))
    asyncio.run(pool.ensure(resolve(sys.argv[1])))
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_an_engine_ends_with_a_process_that_no_cluster_looks_after(made: Made, tmp_path: Path) -> None:
    import psutil

    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, str(tmp_path / "alone.py"), made.base.model_dir, CONFIG.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdout is not None
        lines = (line.split() for line in alone.stdout)
        engines = [psutil.Process(int(pid)) for pid in next(line for line in lines if line and all(map(str.isdigit, line)))]
        alone.kill()
    assert engines
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive


def test_cancelled_calls_are_aborted_in_the_engine(made: Made) -> None:
    async def cancel() -> LMAnswer:
        local = LocalPool(CONFIG.model_copy(update={"max_model_len": 2048, "max_num_seqs": 1}))
        try:
            await local.ensure(made.base)
            llm = local._service._engine._llm  # type: ignore[union-attr]
            # One at a time, and none of them ends by itself: together they would keep the engine for minutes.
            long = _call(made.base, "hello", Sampling(max_tokens=2000))
            calls = [asyncio.create_task(local.generate(long)) for _ in range(50)]
            async with asyncio.timeout(60):
                while await llm.reset_prefix_cache():  # it refuses while a request holds blocks of the cache
                    await asyncio.sleep(0.05)
            assert llm.get_num_unfinished_requests() == len(calls)
            for call in calls:
                call.cancel()
            assert all(
                isinstance(found, asyncio.CancelledError) for found in await asyncio.gather(*calls, return_exceptions=True)
            )
            async with asyncio.timeout(15):
                while llm.get_num_unfinished_requests() or not await llm.reset_prefix_cache():
                    await asyncio.sleep(0.05)
                return await local.generate(_call(made.base, QUESTIONS[0]))
        finally:
            await local.close()

    assert asyncio.run(cancel()).token_ids == _expected(made.base)[0]


def _call(wanted: Weights, question: str, sampling: Sampling | None = None) -> LMCall:
    return LMCall(wanted, sampling or Sampling(max_tokens=TOKENS), ({"role": "user", "content": question},))


def _ask(pool: ServePool, wanted: Weights) -> list[LMAnswer]:
    async def ask() -> list[LMAnswer]:
        return await asyncio.gather(*(pool.generate(_call(wanted, q)) for q in QUESTIONS))

    return asyncio.run(ask())


def _tokens(answers: list[LMAnswer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def _prompt(wanted: Weights, question: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    return tuple(canary.render(AutoTokenizer.from_pretrained(wanted.model_dir), [{"role": "user", "content": question}]))


def _expected(wanted: Weights) -> list[tuple[int, ...]]:
    """Greedy answers of plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wanted.model_dir, dtype=torch.float32).eval()
    found = []
    for question in QUESTIONS:
        ids = torch.tensor([_prompt(wanted, question)])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
        found.append(tuple(int(token) for token in out[0, ids.shape[1] :]))
    return found
