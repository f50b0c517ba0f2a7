"""From the user's `engine:` section and a machine to everything that an engine is started with.

`resolve_settings` decides purely: the same config and machine give the same settings.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from bt_ray.config import EngineConfig
from bt_ray.errors import ConfigError
from bt_ray.planning import num_replicas
from bt_ray.resources import memory_limit, usable_cores

GIB = 1024**3
# Prompts are never cut into chunks on a CPU (see resolve_settings), so one step must hold the longest
# prompt; below this many tokens a step would also hold too few short prompts together.
MIN_BATCHED_TOKENS = 2048
# Share of the machine's memory for the key-value caches of all its CPU engines, and the bounds of one in GiB.
KV_SHARE, KV_MIN_GIB, KV_MAX_GIB = 0.10, 0.25, 8.0
# Ranks with kernels in vLLM start with these; an adapter of a higher rank makes the engine restart.
DEFAULT_LORA_RANK = 32
LIVE_ADAPTERS = 3
BFLOAT16_CAPABILITY = 8.0  # GPUs below it (Turing and older) have no bfloat16, and vLLM refuses it there
NVIDIA_SMI_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Machine:
    """What decides about an engine: CPU flags, usable cores, memory and GPUs of this process."""

    cpu_flags: frozenset[str] = frozenset()
    cores: int = 1
    memory_gib: float = 8.0
    gpus: int = 0
    compute_capability: float | None = None  # the lowest of the GPUs; None: unknown
    engines: int | None = None  # CPU engines that share cores and memory; None: all that the config asks for

    @classmethod
    def here(cls, gpus: int | None = None) -> Machine:
        """This process's machine. GPUs count only if the installed vLLM can use them; `gpus` overrules that count."""
        gpus = _gpus() if gpus is None else gpus
        return cls(_cpu_flags(), usable_cores(), _memory_gib(), gpus, compute_capability() if gpus else None)


@dataclass(frozen=True)
class EngineSettings:
    """Everything that an engine is started with. Sizes in bytes or tokens as the names say."""

    device: str  # "cpu" | "cuda"
    dtype: str  # "float32" | "bfloat16" | "float16"
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    prefix_caching: bool
    lora: str  # "merge" | "runtime"
    executor: str  # "uni" | "ray"
    enforce_eager: bool
    tensor_parallel_size: int = 1
    block_size: int | None = None  # tokens of one block of the key-value cache
    kv_cache_bytes: int | None = None
    max_loras: int = 1
    max_lora_rank: int = DEFAULT_LORA_RANK
    num_threads: int | None = None
    environment: tuple[tuple[str, str], ...] = ()  # variables of the engine's process
    reason: str = ""  # why this dtype

    def describe(self) -> str:
        """One sentence for the log."""
        kv = "what the device has left" if self.kv_cache_bytes is None else f"{self.kv_cache_bytes / GIB:.2f} GiB"
        threads = f", {self.num_threads} threads" if self.num_threads else ""
        return (
            f"engine: {self.device}, {self.dtype} ({self.reason}), context {self.max_model_len} tokens, "
            f"{self.max_num_seqs} requests together, key-value cache {kv}, adapters {self.lora}{threads}"
        )

    def with_lora_rank(self, rank: int) -> EngineSettings:
        """The same settings with room for adapters of `rank`."""
        return replace(self, max_lora_rank=max(rank, self.max_lora_rank))


def resolve_settings(config: EngineConfig, machine: Machine) -> EngineSettings:
    """Settings of one engine on `machine`. Raises ConfigError where the machine cannot do it."""
    return _gpu_settings(config, machine) if machine.gpus else _cpu_settings(config, machine)


def _cpu_settings(config: EngineConfig, machine: Machine) -> EngineSettings:
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"engine.tensor_parallel_size is {config.tensor_parallel_size}, but this machine shows no GPU to vLLM. "
            "Set it to 1, or run where the GPUs are."
        )
    dtype, reason = _cpu_dtype(config.dtype, machine)
    engines = machine.engines or num_replicas(config, {})
    threads = config.num_threads or max(1, machine.cores // engines)
    kv_gib = config.kv_cache_gib or min(KV_MAX_GIB, max(KV_MIN_GIB, KV_SHARE * machine.memory_gib / engines))
    lora = "merge" if config.lora == "auto" else config.lora
    return EngineSettings(
        device="cpu",
        dtype=dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        # With chunks a seeded request kills the engine: the CPU's generator cannot step back.
        max_num_batched_tokens=max(config.max_model_len, MIN_BATCHED_TOKENS),
        chunked_prefill=False,
        prefix_caching=config.prefix_caching,
        lora=lora,
        executor="uni",
        enforce_eager=True,
        # Only whole blocks are shared: vLLM's 128 on a CPU is longer than many prompts.
        block_size=32,
        kv_cache_bytes=int(kv_gib * GIB),  # an explicit size also skips the warm-up
        max_loras=LIVE_ADAPTERS + 1 if lora == "runtime" else 1,
        num_threads=threads,
        environment=(
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # without it the `uni` executor becomes `mp`
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # `auto` takes cores that Ray gave to others
            ("OMP_NUM_THREADS", str(threads)),
        ),
        reason=reason,
    )


def _gpu_settings(config: EngineConfig, machine: Machine) -> EngineSettings:
    lora = "runtime" if config.lora == "auto" else config.lora
    dtype, reason = _gpu_dtype(config.dtype, machine.compute_capability)
    return EngineSettings(
        device="cuda",
        dtype=dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(config.max_model_len, 8192),
        chunked_prefill=True,
        prefix_caching=config.prefix_caching,
        lora=lora,
        executor="uni" if config.tensor_parallel_size == 1 else "ray",
        enforce_eager=False,
        tensor_parallel_size=config.tensor_parallel_size,
        kv_cache_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * GIB),
        max_loras=LIVE_ADAPTERS + 1 if lora == "runtime" else 1,
        reason=reason,
    )


def _gpu_dtype(wanted: str, capability: float | None) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    if capability is None:
        return "bfloat16", "the GPU's compute capability is unknown, and GPUs since 8.0 compute it"
    if capability < BFLOAT16_CAPABILITY:
        return "float16", f"a GPU of compute capability {capability:.1f} has no bfloat16"
    return "bfloat16", f"a GPU of compute capability {capability:.1f} computes it natively"


def _cpu_dtype(wanted: str, machine: Machine) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    native = sorted(flag for flag in machine.cpu_flags if flag.startswith("amx_bf16"))
    if native:
        return "bfloat16", f"the CPU has {', '.join(native)}"
    # avx512_bf16 alone does not help: a small model decoded a third slower in bfloat16 than in float32 with it.
    return "float32", "the CPU has no amx_bf16, so bfloat16 would be slower"


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    for line in info.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _memory_gib() -> float:
    """Memory of this machine, or of its container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    limit = memory_limit()
    return total if limit is None else min(total, limit / GIB)


def compute_capability() -> float | None:
    """The lowest compute capability of the machine's GPUs, from the driver's tool; None where it does not say.

    torch would tell too, and create a CUDA context in this process. The lowest of all and not of the visible
    ones: the tool counts GPUs in another order than CUDA_VISIBLE_DEVICES, and float16 runs on every one.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
        return min((float(line) for line in found.stdout.splitlines() if line.strip()), default=None)
    except (OSError, subprocess.SubprocessError, ValueError):  # no tool, an old one, or "[N/A]"
        return None


def _gpus() -> int:
    """GPUs that this process may use, 0 where vLLM's CPU build is installed. Loads no CUDA."""
    try:
        metadata.version("vllm-cpu")
        return 0
    except metadata.PackageNotFoundError:
        pass
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
