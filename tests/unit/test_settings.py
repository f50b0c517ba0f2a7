from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bt_ray.config import EngineConfig
from bt_ray.errors import ConfigError
from bt_ray.lm.service import ServiceOptions, make_engine
from bt_ray.lm.settings import GIB, EngineSettings, Machine, compute_capability, resolve_settings

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


def test_engines_of_one_machine_share_its_cores_and_its_memory() -> None:
    eight = Machine(frozenset(), cores=8, memory_gib=40.0)
    alone = settings(eight)
    assert (alone.num_threads, alone.kv_cache_bytes) == (8, 4 * GIB)
    shared = settings(replace(eight, engines=4))
    assert (shared.num_threads, shared.kv_cache_bytes) == (2, GIB)
    # Unless the machine says how many run on it, all that a cluster without GPUs will hold do.
    assert settings(eight, replicas={"min": 4, "max": 4}) == shared
    assert settings(replace(eight, engines=1), replicas={"min": 4, "max": 4}) == alone
    assert settings(replace(eight, engines=16)).num_threads == 1
    asked = settings(replace(eight, engines=4), num_threads=8, kv_cache_gib=3)
    assert (asked.num_threads, asked.kv_cache_bytes) == (8, 3 * GIB)


@pytest.mark.parametrize(("capability", "dtype"), [(7.0, "float16"), (7.5, "float16"), (8.0, "bfloat16"), (9.0, "bfloat16")])
def test_gpu_dtype_follows_from_the_compute_capability_and_the_log_says_why(capability: float, dtype: str) -> None:
    found = settings(replace(GPU, compute_capability=capability))
    assert found.dtype == dtype and f"capability {capability}" in found.describe()
    assert settings(replace(GPU, compute_capability=capability), dtype="float32").dtype == "float32"


def test_gpu_of_unknown_capability_gets_bfloat16_and_no_claim() -> None:
    assert settings(GPU).dtype == "bfloat16" and "unknown" in settings(GPU).describe()


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 9.0; echo 7.5", 7.5), ("echo '[N/A]'", None), ("echo", None), ("exit 6", None), (None, None)],
)
def test_compute_capability_is_the_lowest_that_the_drivers_tool_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: float | None
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_capability() == expected
    assert Machine.here(gpus=2).compute_capability == expected and Machine.here(gpus=2).gpus == 2


def test_this_machine_counts_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bt_ray.lm.settings.usable_cores", lambda: 3)
    monkeypatch.setattr("bt_ray.lm.settings.memory_limit", lambda: GIB // 2)
    assert Machine.here().cores == 3 and Machine.here().memory_gib == 0.5


def test_an_engine_in_a_process_without_ray_has_the_machine_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig.model_validate({"replicas": {"min": 4, "max": 4}})
    monkeypatch.setattr("bt_ray.lm.settings.usable_cores", lambda: 8)
    monkeypatch.setattr("bt_ray.lm.settings._gpus", lambda: 0)
    options = ServiceOptions(config, "tests.support.stub_engine:StubEngine")
    assert make_engine(options).settings.num_threads == 8  # type: ignore[attr-defined]
    monkeypatch.setattr("bt_ray.lm.service.engines_here", lambda engine: engine.replicas.min)
    assert make_engine(options).settings.num_threads == 2  # type: ignore[attr-defined]
