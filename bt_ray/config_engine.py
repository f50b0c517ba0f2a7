"""The vLLM engines of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bt_ray.config_base import NamedResources, PositiveInt, Section


class ReplicaRange(Section):
    """How many engines the pool may hold."""

    min: int = Field(1, ge=0, description="engines that the run needs to generate; 0: one, and none is held while it fine-tunes")
    max: PositiveInt = Field(1, description="engines at most")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"replicas.min {self.min} is above replicas.max {self.max}")
        return self


class EngineConfig(Section):
    """The vLLM engines. What is null follows from the machine and the Ray resources."""

    replicas: ReplicaRange = Field(
        default_factory=lambda: ReplicaRange(min=1, max=1), description="engines, each a Serve replica"
    )
    max_model_len: PositiveInt = Field(2048, description="tokens of prompt and answer together")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs per engine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: what the device computes fastest")
    kv_cache_gib: float | None = Field(None, gt=0, description="GiB of key-value cache; null: from the memory")
    max_num_seqs: PositiveInt = Field(64, description="requests that one engine decodes together")
    prefix_caching: bool = Field(True, description="reuse the keys and values of shared prompt beginnings")
    lora: Literal["auto", "merge", "runtime"] = Field("auto", description="auto: merged on a CPU, loaded at run time on a GPU")
    num_cpus: float = Field(1.0, gt=0, description="logical CPUs that a replica reserves in Ray")
    resources: NamedResources = Field(
        default_factory=dict,
        description="further Ray resources that a replica reserves, such as one that only nodes for engines have",
    )
    num_threads: PositiveInt | None = Field(
        None, description="OpenMP threads of a CPU engine; null: its share of the usable cores"
    )
    stall_timeout_s: float = Field(
        90.0, gt=0, description="seconds in which an engine at work must give a sign of life between two steps, or it is replaced"
    )
