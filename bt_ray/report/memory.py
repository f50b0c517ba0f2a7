"""Peak memory of a stage, rough: what the weights, the key-value cache and the optimiser hold.

Up together are

- in every stage the engines of the run's own model and of each further one of `models`: every call may need any;
- while a teacher with a model of its own runs the program, its engines beside those; while a proposer with one writes,
  its engines beside those. The rollouts end before the search begins, so a step has one or the other, and its peak is
  with the larger;
- while a fine-tune runs, its workers, of one model at a time, and on a CPU the run's engines, which stay up.

On a CPU the peak is the sum of what is up together on the one machine. On GPUs every engine has its own, so the peak is
that of one GPU, the fullest: of an engine or of a trainer. The libraries' own memory (some GiB with Ray on a CPU) and
the activations of training come on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bt_ray.config import EngineConfig, RunConfig, WeightStep
from bt_ray.errors import ConfigError, ModelError
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
class ModelSizes:
    """Sizes of all models that a run has engines of; one that is missing is unknown."""

    own: Mapping[str, ModelSize]  # by their name in `models`; the run's own has none
    beside: Mapping[str, ModelSize] = field(default_factory=dict)  # of teachers and proposers, as the config calls them


@dataclass(frozen=True)
class Memory:
    """GiB at the peak: while the run's own engines generate, and by the name of each step that holds more. None: unknown.

    `gpus`: of the machine that this is of.
    """

    generate_gib: float | None = None
    step_gib: Mapping[str, float | None] = field(default_factory=dict)
    gpus: int = 0

    def of_stage(self, steps: Iterable[str]) -> float | None:
        """Of a stage that takes these steps, one after the other."""
        return _most([self.generate_gib, *(self.step_gib.get(name, self.generate_gib) for name in steps)])


def memory_here(config: RunConfig, weights: Mapping[str, Any]) -> Memory:
    """Peak memory on this machine, from the models' files; unknown where they or the GPUs are not here.

    `weights`: those that the program starts from, as a run's identity has them.
    """
    folders = {part.get("model", ""): part["model_dir"] for _, part in weights.get("parts", [])}
    own = {"": weights["model_dir"], **folders}
    beside = {model: _prepared_dir(model, config.base_dir) for model, _ in config.engines_beside()}
    machine = Machine.here()
    return replace(peak_memory(config, ModelSizes(_sizes(own), _sizes(beside)), machine), gpus=machine.gpus)


def _sizes(folders: Mapping[str, str | None]) -> dict[str, ModelSize]:
    return {name: size for name, folder in folders.items() if folder and (size := model_size(folder))}


def _prepared_dir(model: str, base_dir: str) -> str | None:
    """Folder of a model that a run was checked with; None where it has gone since."""
    from bt_ray.lm.models import located, resolve

    try:
        return resolve(located(model, base_dir)).model_dir
    except ModelError:
        return None


def model_size(model_dir: str | Path) -> ModelSize | None:
    """Size of the safetensors files by the dtype that config.json names; None where either is missing."""
    root = Path(model_dir)
    size = sum(path.stat().st_size for path in root.glob("*.safetensors"))
    if not size or not (root / "config.json").is_file():
        return None
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    width = DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
    return ModelSize(size // width, linear_shapes(root)) if width else None


def peak_memory(config: RunConfig, sizes: ModelSizes, machine: Machine) -> Memory:
    """Peak memory of the config's stages on `machine`. Pure."""
    together = _most if machine.gpus else _sum
    engines = together([_held_bytes(sizes.own.get(name), engine, machine) for name, engine in config.engines().items()])
    peaks = {}
    for name, step in config.steps.items():
        if isinstance(step, WeightStep):
            peaks[name] = together([engines, _trainer_bytes(sizes, config, step, machine)])
        elif beside := step.engines_beside():
            other = _most([_held_bytes(sizes.beside.get(model), engine, machine) for model, engine in beside])
            peaks[name] = together([engines, other])
    return Memory(_gib(engines), {name: _gib(value) for name, value in peaks.items()})


def _held_bytes(model: ModelSize | None, engine: EngineConfig, machine: Machine) -> float | None:
    """Bytes of a model's engines: of all on a CPU, of one (its share of one GPU) on GPUs; None: unknown."""
    if model is None:
        return None
    try:
        settings = resolve_settings(engine, machine)
    except ConfigError:  # it cannot run here: its GPUs are elsewhere
        return None
    one = engine_bytes(model, settings)
    return one if one is None or machine.gpus else one * num_replicas(engine, {})


def _trainer_bytes(sizes: ModelSizes, config: RunConfig, step: WeightStep, machine: Machine) -> float | None:
    """Bytes of a fine-tune, of the model that needs most: of all its workers on a CPU, of one on GPUs."""
    if config.engines().keys() - sizes.own.keys():
        return None
    most = max(training_bytes(sizes.own[name], step, machine.gpus > 0) for name in config.engines())
    return most if machine.gpus else step.num_workers * most


def _most(values: Iterable[float | None]) -> float | None:
    """The largest; None where one is unknown."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)


def _sum(values: Iterable[float | None]) -> float | None:
    """All together; None where one is unknown."""
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size / GIB, 2)


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
