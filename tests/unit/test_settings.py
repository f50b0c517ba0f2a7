from __future__ import annotations

import pytest

from bt_ray.config import EngineConfig
from bt_ray.errors import ConfigError
from bt_ray.lm.settings import GIB, EngineSettings, Machine, resolve_settings

PLAIN = Machine(frozenset({"avx2"}), cores=2, memory_gib=24.0)
GPU = Machine(frozenset({"avx2"}), cores=16, memory_gib=128.0, gpus=1)


def settings(machine: Machine = PLAIN, **changes: object) -> EngineSettings:
    return resolve_settings(EngineConfig.model_validate(changes), machine)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2"}, "float32"), ({"avx512f"}, "float32"), ({"avx512_bf16"}, "float32"), ({"amx_bf16"}, "bfloat16")],
)
def test_cpu_dtype_follows_from_the_flags_and_the_log_says_why(flags: set[str], dtype: str) -> None:
    found = settings(Machine(frozenset(flags), 2, 24.0))
    assert found.dtype == dtype
    assert dtype in found.describe() and "bf16" in found.describe()


def test_asked_dtype_is_kept() -> None:
    assert settings(dtype="bfloat16").dtype == "bfloat16"
    assert settings(Machine(frozenset({"amx_bf16"})), dtype="float32").dtype == "float32"


@pytest.mark.parametrize("context", [64, 2048, 9000])
def test_a_seeded_prompt_is_never_cut_on_a_cpu(context: int) -> None:
    found = settings(max_model_len=context)
    assert not found.chunked_prefill and found.max_num_batched_tokens >= context


def test_cpu_engine_keeps_to_its_threads_and_one_process() -> None:
    found = settings(num_threads=1)
    assert dict(found.environment) == {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    assert found.executor == "uni" and found.enforce_eager
    assert settings().num_threads == 2


def test_cache_size_is_always_explicit_on_a_cpu() -> None:
    assert settings(kv_cache_gib=0.5).kv_cache_bytes == GIB // 2
    assert 0 < (settings().kv_cache_bytes or 0) < 24 * GIB / 4
    assert (settings(Machine(memory_gib=1.0)).kv_cache_bytes or 0) > 0


def test_adapters_are_merged_on_a_cpu_and_loaded_at_run_time_on_a_gpu() -> None:
    assert settings().lora == "merge"
    on_gpu = settings(GPU)
    assert (on_gpu.lora, on_gpu.dtype, on_gpu.device) == ("runtime", "bfloat16", "cuda") and on_gpu.max_loras > 1
    assert settings(GPU, lora="merge").max_loras == 1
    assert settings(lora="runtime").max_loras > 1


def test_tensor_parallel_needs_gpus_and_the_ray_executor() -> None:
    assert settings(GPU).executor == "uni"
    assert settings(Machine(gpus=2), tensor_parallel_size=2).executor == "ray"
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        settings(tensor_parallel_size=2)


def test_room_for_a_higher_rank_never_shrinks() -> None:
    assert settings(GPU).with_lora_rank(256).max_lora_rank == 256
    assert settings(GPU).with_lora_rank(1).max_lora_rank == settings(GPU).max_lora_rank


def test_this_machine_has_cores_and_memory() -> None:
    here = Machine.here()
    assert here.cores >= 1 and here.memory_gib > 0.5 and here.gpus >= 0
