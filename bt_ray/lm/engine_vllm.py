"""Our settings and sampling in vLLM's words. The only file that names vLLM's arguments."""

from __future__ import annotations

from typing import Any

from bt_ray.environment import environment
from bt_ray.errors import ConfigError
from bt_ray.lm.settings import EngineSettings
from bt_ray.lm.types import Sampling

CONSTRAINTS = ("choice", "regex", "json")


def start_llm(settings: EngineSettings, model_dir: str) -> Any:
    """A started AsyncLLM. Blocks for as long as the engine takes to start (seconds to minutes)."""
    with environment(dict(settings.environment)):
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # Free whitespace in JSON lets a small model fill its whole answer with blanks.
        structured = StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True)
        args = AsyncEngineArgs(**engine_args(settings, model_dir), structured_outputs_config=structured)
        return AsyncLLM.from_engine_args(args)


def engine_args(settings: EngineSettings, model_dir: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    args: dict[str, Any] = {
        "model": model_dir,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_chunked_prefill": settings.chunked_prefill,
        "enable_prefix_caching": settings.prefix_caching,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "distributed_executor_backend": settings.executor,
        "load_format": "safetensors",  # never a pickle
        "trust_remote_code": False,  # nor the Python that a model's folder brings along
        "worker_extension_cls": "bt_ray.lm.engine_end.EndsWithItsParent",
        "generation_config": "vllm",  # the model's own sampling defaults must not change ours
        "disable_log_stats": True,
        "enable_log_requests": False,
        "seed": 0,
    }
    if settings.block_size:
        args["block_size"] = settings.block_size
    if settings.kv_cache_bytes is not None:
        args["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    if settings.lora == "runtime":
        args.update(enable_lora=True, max_loras=settings.max_loras, max_lora_rank=settings.max_lora_rank)
    return args


def sampling_params(sampling: Sampling, max_tokens: int) -> Any:
    """vLLM's SamplingParams; one final output, no streaming. Raises ConfigError for an unknown constraint."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    structured = None
    if sampling.constraint is not None:
        unknown = [key for key in sampling.constraint if key not in CONSTRAINTS]
        if unknown or len(sampling.constraint) != 1:
            raise ConfigError(f"sampling: constraint {sorted(sampling.constraint)} is not one of {', '.join(CONSTRAINTS)}.")
        structured = StructuredOutputsParams(**sampling.constraint)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def canary_params(max_tokens: int) -> Any:
    """Greedy, past end-of-sequence, with the two best log-probabilities of every token."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, output_kind=RequestOutputKind.FINAL_ONLY
    )


def margins_of(logprobs: Any) -> list[float]:
    """Per token: log-probability of the best minus that of the second best; equal to the logits' margin."""
    margins = []
    for position in logprobs:
        best = sorted((entry.logprob for entry in position.values()), reverse=True)
        margins.append(best[0] - best[1])
    return margins


def adapter_request(weights_id: str, adapter_dir: str) -> Any:
    """vLLM's LoRARequest. Name and number follow from the content hash: cached prefixes are kept by name."""
    from vllm.lora.request import LoRARequest

    number = int(weights_id[:13], 16) % (2**31 - 2) + 1
    return LoRARequest(lora_name=weights_id, lora_int_id=number, lora_path=adapter_dir)


def dead_engine_errors() -> tuple[type[BaseException], ...]:
    """The errors after which an engine's process answers nothing any more."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return (EngineDeadError,)


def start_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises where an engine does not start: its process has ended, or its settings do not fit the machine."""
    return (RuntimeError, ValueError, OSError, MemoryError)


def request_errors() -> tuple[type[BaseException], ...]:
    """The errors by which vLLM refuses one request as written (a schema it cannot compile, a bad regex)."""
    from vllm.exceptions import VLLMClientError

    return (VLLMClientError,)
