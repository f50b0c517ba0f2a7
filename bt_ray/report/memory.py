"""Peak memory of a stage, rough: what the weights, the key-value cache and the optimiser hold.

On a CPU it is that of the machine, where the engines stay up while a fine-tune runs; on GPUs it is
that of one GPU, the fuller of engine and trainer. The libraries' own memory (some GiB with Ray on a
CPU) and the activations of training come on top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bt_ray.config import RunConfig, WeightStep
from bt_ray.errors import ConfigError
from bt_ray.lm.modules import adapted, linear_shapes
from bt_ray.lm.settings import GIB, EngineSettings, Machine, resolve_settings
from bt_ray.planning import num_replicas

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS_BYTES = 8  # AdamW's two, in float32, of one trained weight
ADAPTER_BYTES = 4 + 4 + MOMENTS_BYTES  # of one weight of an adapter: itself, its gradient, its moments


@dataclass(frozen=True)
class ModelSize:
    """A model's number of weights, and (outputs, inputs) of its linear layers by name."""

    num_weights: int
    linear: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Memory:
    """GiB at the peak: of stages that only generate, and of those of each weight step. None: unknown.

    `gpus`: of the machine that this is of.
    """

    generate_gib: float | None = None
    finetune_gib: Mapping[str, float | None] = field(default_factory=dict)  # by name of the weight step
    gpus: int = 0

    def of_stage(self, weight_step: str | None) -> float | None:
        return self.finetune_gib.get(weight_step) if weight_step else self.generate_gib


def memory_here(config: RunConfig, model_dir: str) -> Memory:
    """Peak memory on this machine, from the model's files; all unknown where they or the GPUs are not here."""
    model = model_size(model_dir)
    machine = Machine.here()
    return replace(peak_memory(config, model, machine) if model else Memory(), gpus=machine.gpus)


def model_size(model_dir: str | Path) -> ModelSize | None:
    """Size of the safetensors files by the dtype that config.json names; None where either is missing."""
    root = Path(model_dir)
    size = sum(path.stat().st_size for path in root.glob("*.safetensors"))
    if not size or not (root / "config.json").is_file():
        return None
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    width = DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
    return ModelSize(size // width, linear_shapes(root)) if width else None


def peak_memory(config: RunConfig, model: ModelSize, machine: Machine) -> Memory:
    """Peak memory of the config's stages on `machine`. Pure."""
    try:
        settings = resolve_settings(config.engine, machine)
    except ConfigError:  # it cannot run here: its GPUs are elsewhere
        return Memory()
    engine = engine_bytes(model, settings)
    if engine is None:
        return Memory()
    tuned = {name: step for name, step in config.steps.items() if isinstance(step, WeightStep)}
    if machine.gpus:
        peaks = {name: max(engine, training_bytes(model, step, gpu=True)) for name, step in tuned.items()}
    else:
        engine *= num_replicas(config.engine, 0)
        peaks = {name: engine + step.num_workers * training_bytes(model, step, gpu=False) for name, step in tuned.items()}
    return Memory(round(engine / GIB, 2), {name: round(value / GIB, 2) for name, value in peaks.items()})


def engine_bytes(model: ModelSize, settings: EngineSettings) -> float | None:
    """Bytes of one engine (on GPUs: of its share of one): the weights in its dtype, and the key-value cache.

    None where the cache takes what the GPU has left.
    """
    if settings.kv_cache_bytes is None:
        return None
    return model.num_weights * DTYPE_BYTES[settings.dtype] / settings.tensor_parallel_size + settings.kv_cache_bytes


def training_bytes(model: ModelSize, step: WeightStep, gpu: bool) -> float:
    """Bytes of one training worker, without activations.

    With N weights of b bytes (4 on a CPU, 2 on a GPU) and n workers:

    - lora: N b + 16 T. An adapter's T = sum of r (inputs + outputs) over its layers, each weight with
      its gradient and AdamW's two moments in float32.
    - full: N b for the weights and as much for gradients, 8 N for the moments, and on a GPU 4 N for
      the float32 copy that is updated. ZeRO shares the optimiser's part among the workers from
      stage 1, gradients from stage 2, weights from stage 3 (Rajbhandari et al., arXiv 1910.02054).
      dpo holds a second copy of the weights as its reference.
    """
    weights = model.num_weights * (2 if gpu else 4)
    shares = [step.num_workers if step.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    if step.tuning == "lora":
        return weights / shares[2] + ADAPTER_BYTES * adapter_weights(model, step)
    optimiser = model.num_weights * (MOMENTS_BYTES + (4 if gpu else 0))
    copies = 2 if step.method == "dpo" else 1
    return copies * weights / shares[2] + weights / shares[1] + optimiser / shares[0]


def adapter_weights(model: ModelSize, step: WeightStep) -> int:
    """Weights of the step's adapter."""
    return sum(step.lora_rank * (outputs + inputs) for outputs, inputs in adapted(step, model.linear).values())
