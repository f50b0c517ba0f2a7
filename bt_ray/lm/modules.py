"""The linear layers of a model, from the headers of its safetensors files: no torch, no weights read."""

from __future__ import annotations

import difflib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bt_ray.config import WeightStep
from bt_ray.errors import ModelError

BODIES = ("model.", "transformer.")
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


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a layer gets an adapter: all do with all-linear, any other text is a regular expression over full names."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        # A checkpoint may leave out the name that the model gives its body.
        return any(re.fullmatch(targets, prefix + name) for prefix in ("", *BODIES))
    return any(matches(name, target) for target in targets)


def layer_of(name: str) -> int | None:
    """Index of the layer that a module is in, the first number of its name; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def adapted(step: WeightStep, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The layers of `shapes` that get an adapter of the step."""
    return {
        name: shape
        for name, shape in shapes.items()
        if is_target(name, step.target_modules) and (step.layers is None or layer_of(name) in step.layers)
    }


def adapter_problem(step: WeightStep, names: Sequence[str]) -> str | None:
    """Why an adapter of the step has no place among the layers `names`, with the candidates; None where it has."""
    targets = step.target_modules
    problem = _unmatched_pattern(targets, names) if isinstance(targets, str) else unmatched_targets(targets, names)
    if problem or step.layers is None:
        return problem
    count = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    if missing := [layer for layer in step.layers if layer >= count]:
        return f"layers: {missing} do not exist; the model has {count} layers, 0 to {count - 1}. Name some of these."
    if not any(is_target(name, targets) and layer_of(name) in step.layers for name in names):
        inside = _last(name for name in names if layer_of(name) in step.layers)
        return f"target_modules: none of {list(targets)} is in the layers {list(step.layers)}; they have {', '.join(inside)}."
    return None


def _unmatched_pattern(pattern: str, names: Sequence[str]) -> str | None:
    example = f"It is a regular expression over full names, as {names[0]!r}" if names else "The model has no linear layer"
    ends = f"; their last parts are: {', '.join(_last(names))}. A list, as [{_last(names)[0]}], means names." if names else "."
    try:
        if any(is_target(name, pattern) for name in names):
            return None
    except re.error as error:
        return f"target_modules: {pattern!r} is no regular expression ({error}). {example}{ends}"
    return f"target_modules: {pattern!r} matches no layer of the model. {example}{ends}"


def _last(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def unmatched_targets(targets: Sequence[str], names: Sequence[str]) -> str | None:
    """Which LoRA targets match no layer, with the candidates; None where all match."""
    last = _last(names)
    for target in targets:
        if any(matches(name, target) for name in names):
            continue
        near = difflib.get_close_matches(target, last, n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        return f"target_modules: {target!r} matches no layer of the model; {hint} It has: {', '.join(last)}."
    return None
