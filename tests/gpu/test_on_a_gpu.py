"""What only a GPU shows: adapters of one base that answer side by side, and a whole run in bfloat16 with DeepSpeed on CUDA."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bt_ray.config import EngineConfig
from bt_ray.lm.local import LocalPool
from bt_ray.lm.types import LMAnswer, LMCall, Sampling, Weights
from tests.support.driver_runs import bt_ray
from tests.support.tiny_adapters import merged_adapter, random_adapter, weights_of
from tests.support.tiny_model import make_tiny_model
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CONFIG = EngineConfig.model_validate({"max_model_len": 256, "kv_cache_gib": 0.25})
QUESTION = "Which department answers this question?"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    """A base and two adapters of it."""
    root = tmp_path_factory.mktemp("models")
    base_dir = make_tiny_model(root / "base", seed=0)
    found = [weights_of("base", base_dir, base_dir)]
    for seed in (1, 2):
        adapter_dir = random_adapter(base_dir, root / f"adapter-{seed}", seed)
        found.append(merged_adapter(found[0], adapter_dir, root / f"merged-{seed}"))
    return found


def test_adapters_of_one_base_answer_side_by_side(made: list[Weights]) -> None:
    async def ask() -> list[LMAnswer]:
        pool = LocalPool(CONFIG)
        try:
            await pool.ensure(made[0])  # and each adapter's first call has its canary compared with transformers
            return await asyncio.gather(*(pool.generate(call(weights, QUESTION)) for weights in made * 8))
        finally:
            await pool.close()

    answers = asyncio.run(ask())
    assert [answer.weights_id for answer in answers] == [weights.id for weights in made * 8]
    by_weights = {answer.weights_id: answer.token_ids for answer in answers}
    assert len(set(by_weights.values())) == len(made), "three answers to one question"


def call(weights: Weights, question: str) -> LMCall:
    return LMCall(weights, Sampling(max_tokens=10), ({"role": "user", "content": question},))


def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    config = write_run(tmp_path, strategy='["p -> w -> p", "f"]')
    full = "f: {method: sft, tuning: full, epochs: 1, learning_rate: 1.0e-4, global_batch_size: 4, zero_stage: 2}"
    config.write_text(config.read_text().replace("steps:\n", f"steps:\n  {full}\n"))
    bt_ray("run", config, "--run-dir", tmp_path / "run", timeout_s=1100)
    report = json.loads(bt_ray("report", str(tmp_path / "run"), "--json").stdout)
    assert {stage["path"]: stage["status"] for stage in report["stages"]} == dict.fromkeys(
        ("vanilla", "p", "p -> w", "p -> w -> p", "f"), "done"
    )
