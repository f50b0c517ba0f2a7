"""What the pool costs beside a bare engine, and what a warm pool saves beside a cold start.

    python benchmarks/pool.py --which tokens   # completion tokens per second: pool / bare AsyncLLM
    python benchmarks/pool.py --which swap     # seconds to the first right answer: warm pool / cold start

Each prints one JSON line. Both sides get the same token ids at the same concurrency, by turns, in one run. Tokens are
counted in the steady state: answers differ in length, so that they do not end together, a new request starts when one
ends, and what counts ends between the first full exchange of the requests in flight and the start of the last request.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import show

from bt_ray.config import EngineConfig
from bt_ray.lm import canary, models
from bt_ray.lm.engine import Engine
from bt_ray.lm.pool import ServePool, deploy
from bt_ray.lm.settings import Machine, resolve_settings
from bt_ray.lm.types import LMCall, Sampling, Weights
from bt_ray.lm.weights import content_hash, merge_adapter

TOPICS = ("a card that did not arrive", "a refund", "a forgotten password", "an invoice", "a late parcel", "a broken screen")
WARM_UPS = 1  # rounds of each side that are not counted
Generate = Callable[[LMCall], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=["tokens", "swap"], default="tokens")
    parser.add_argument("--model", default="smollm2-135m", help="as the key `model` of a config")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=192, help="requests per repeat")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    parser.add_argument(
        "--max-tokens", type=int, default=32, help="of an answer, on average; single ones have half to three halves"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    if args.which == "tokens" and args.requests < 2 * args.concurrency:
        parser.error("--requests: at least twice --concurrency, or no answer ends in the steady state")
    import ray

    base = models.resolve(args.model)
    config = EngineConfig.model_validate({"max_model_len": 1024, "dtype": args.dtype, "kv_cache_gib": 1.0})
    ray.init(num_cpus=4, object_store_memory=1024**3, include_dashboard=False, log_to_driver=False)
    try:
        result = asyncio.run(tokens(args, config, base) if args.which == "tokens" else swap(args, config, base))
    finally:
        ray.shutdown()
    settings = resolve_settings(config, Machine.here())
    shape = {"model": args.model, "dtype": settings.dtype, "cores": Machine.here().cores}
    show(f"pool, {args.which}", **shape, **result)


async def tokens(args: argparse.Namespace, config: EngineConfig, base: Weights) -> dict[str, Any]:
    """Median and spread, over repeats, of the pool's tokens per second divided by the bare engine's."""
    pool = await asyncio.to_thread(deploy, "bench", config)
    await pool.ensure(base)
    engine = Engine(resolve_settings(config, Machine.here()))
    await engine.start(base)
    bare = BareEngine(engine)
    ratios, rates = [], {"pool": [], "bare": []}
    for warm_up in range(-WARM_UPS, 0):  # each side alone, as it will be measured
        for side in (pool.generate, bare.generate):
            await rate(side, calls(base, engine, args, warm_up), args.concurrency)
    for repeat in range(args.repeats):
        sides: list[tuple[str, Generate]] = [("pool", pool.generate), ("bare", bare.generate)]
        found = {}
        for name, generate in sides if repeat % 2 else reversed(sides):
            found[name] = await rate(generate, calls(base, engine, args, repeat), args.concurrency)
            rates[name].append(round(found[name], 1))
        ratios.append(found["pool"] / found["bare"])
    del bare, sides, generate, side  # they hold the engine, whose end fails once the interpreter's has begun
    await engine.close()
    await pool.close()
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "pool_tokens_per_s": rates["pool"],
        "bare_tokens_per_s": rates["bare"],
        "requests": args.requests,
        "concurrency": args.concurrency,
    }


class BareEngine:
    """AsyncLLM as a user would call it, with nothing of ours around it."""

    def __init__(self, engine: Engine) -> None:
        self._llm, self._count = engine._llm, 0

    async def generate(self, call: LMCall) -> Any:
        from bt_ray.lm.engine_vllm import sampling_params

        self._count += 1
        params = sampling_params(call.sampling, call.sampling.max_tokens)
        final: Any = None
        async for output in self._llm.generate({"prompt_token_ids": list(call.prompt_token_ids)}, params, f"bare-{self._count}"):
            final = output
        return final.outputs[0]


async def rate(generate: Generate, batch: list[LMCall], concurrency: int) -> float:
    """Completion tokens per second in the steady state."""
    waiting = iter(batch)
    ended: list[tuple[float, int]] = []
    last_start = 0.0

    async def keep_asking() -> None:
        nonlocal last_start
        for call in waiting:
            last_start = time.perf_counter()
            answer = await generate(call)
            ended.append((time.perf_counter(), len(answer.token_ids)))

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    first = ended[concurrency - 1][0]
    return sum(tokens for at, tokens in ended if first < at <= last_start) / (last_start - first)


def calls(base: Weights, engine: Engine, args: argparse.Namespace, repeat: int) -> list[LMCall]:
    """Different prompts each repeat, so that no side profits from cached prefixes of an earlier one."""
    lengths = [args.max_tokens // 2 + n * 7 % (args.max_tokens + 1) for n in range(args.requests)]
    texts = [f"{repeat}-{n}: write a short letter about {TOPICS[n % len(TOPICS)]}, number {n}." for n in range(args.requests)]
    prompts = [canary.render(engine._tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [
        LMCall(base, Sampling(max_tokens=length), prompt_token_ids=tuple(prompt))
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


async def swap(args: argparse.Namespace, config: EngineConfig, base: Weights) -> dict[str, Any]:
    """Seconds from weights on disk to the first answer of them: the warm pool swaps, the cold one starts."""
    with tempfile.TemporaryDirectory() as scratch:
        tuned = merged(base, Path(scratch))
        cold, warm = [], []
        pool = None
        for repeat in range(max(1, args.repeats // 2)):
            start = time.perf_counter()
            pool = await asyncio.to_thread(deploy, f"bench-{repeat}", config)
            await first_answer(pool, tuned)
            cold.append(time.perf_counter() - start)
            for _ in range(2):
                await first_answer(pool, base)
                start = time.perf_counter()
                await first_answer(pool, tuned)
                warm.append(time.perf_counter() - start)
            await pool.close()
        return {
            "ratio": round(statistics.median(warm) / statistics.median(cold), 4),
            "warm_s": [round(seconds, 2) for seconds in warm],
            "cold_s": [round(seconds, 2) for seconds in cold],
        }


async def first_answer(pool: ServePool, wanted: Weights) -> None:
    answer = await pool.generate(LMCall(wanted, Sampling(max_tokens=1), ({"role": "user", "content": "Hello"},)))
    assert answer.weights_id == wanted.id  # and its canary passed, or there were no answer


def merged(base: Weights, scratch: Path) -> Weights:
    """The base with a small random adapter merged in, and its canary."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=1, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.model_dir), settings).save_pretrained(scratch / "adapter")
    folder = scratch / "merged"
    merge_adapter(base.base_dir, scratch / "adapter", folder)
    return replace(base, id=content_hash(folder), kind="lora", model_dir=str(folder), canary=canary.compute(str(folder)))


if __name__ == "__main__":
    main()
