"""The linear layers of a model, from the headers of its safetensors files: no torch, no weights read."""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from bt_ray.config import WeightStep
from bt_ray.errors import ModelError

NOT_LINEAR = ("embed_tokens", "wte", "wpe", "lm_head")  # matrices too, but no adapter goes there


def linear_names(model_dir: str | Path) -> list[str]:
    """Full names of the matrices that an adapter can sit on, `model.layers.0.self_attn.q_proj`. Raises ModelError."""
    return sorted(linear_shapes(model_dir))


def linear_shapes(model_dir: str | Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each of those matrices, by its full name. Raises ModelError."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with open(path, "rb") as file:
            try:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            except (struct.error, ValueError, MemoryError, OverflowError) as error:
                raise ModelError(f"model: {path} is no safetensors file ({error}). Fetch the model again.") from None
        shapes |= {
            name.removesuffix(".weight"): (tensor["shape"][0], tensor["shape"][1])
            for name, tensor in header.items()
            if name.endswith(".weight") and len(tensor.get("shape", ())) == 2
        }
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in NOT_LINEAR}


def matches(name: str, target: str) -> bool:
    """Whether a LoRA target means this layer: its full name or a dotted ending of it, as in PEFT."""
    return name == target or name.endswith(f".{target}")


def adapted(step: WeightStep, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The layers of `shapes` that get an adapter of the step. A text of targets other than all-linear is a
    pattern of PEFT's own, which is taken as all."""
    targets = step.target_modules
    return {
        name: shape
        for name, shape in shapes.items()
        if (isinstance(targets, str) or any(matches(name, target) for target in targets))
        and (step.layers is None or next((int(part) for part in name.split(".") if part.isdigit()), None) in step.layers)
    }


def unmatched_targets(targets: Sequence[str], names: Sequence[str]) -> str | None:
    """Which LoRA targets match no layer, with the candidates; None where all match."""
    last = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if any(matches(name, target) for name in names):
            continue
        near = difflib.get_close_matches(target, last, n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        return f"target_modules: {target!r} matches no layer of the model; {hint} It has: {', '.join(last)}."
    return None
