"""Weights on disk: their content hash, a merged adapter, and how an engine gets from one to another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bt_ray.errors import CommitError, ModelError
from bt_ray.lm.types import Weights
from bt_ray.runs.inside import inside

HASH_CHARS = 16
_CONFIGS = ("config.json", "adapter_config.json")
_READ_BYTES = 1 << 20
# How every model is loaded: never a pickle, and never the Python that a model's folder brings along.
ONLY_DATA: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def content_hash(folder: str | Path) -> str:
    """First 16 hex digits of sha256 over names, sizes and bytes of the safetensors and config files.

    Equal tensors in equally named files give equal ids, wherever the folder lies. Raises ModelError
    where there are no safetensors: other formats hold pickled code and are never read.
    """
    root = Path(folder)
    tensors = sorted(root.glob("*.safetensors"))
    if not tensors:
        raise ModelError(f"weights: {root} holds no *.safetensors file. Save the model with safetensors and try again.")
    digest = hashlib.sha256()
    for path in [*tensors, *(root / name for name in _CONFIGS if (root / name).is_file())]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()[:HASH_CHARS]


def adapter_id(base_id: str, adapter_hash: str) -> str:
    """Id of an adapter's weights, from the content hashes of its base and of its files."""
    return hashlib.sha256(f"{base_id}\0{adapter_hash}".encode()).hexdigest()[:HASH_CHARS]


def verify(folder: str | Path, expected: str) -> None:
    """Raise CommitError unless the weights in `folder` are those with the id `expected`."""
    found = content_hash(folder)
    if found != expected:
        raise CommitError(
            f"weights: {folder} has content hash {found}, its record says {expected}. "
            "The files changed after they were committed: remove the folder and make them anew."
        )


def merge_adapter(base_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write the base model with the adapter's product added to its linear layers, in the base's dtype.

    `out_dir` appears complete or not at all; if it is there already it is left as it is.
    Needs memory for the base model. Raises ModelError if the adapter cannot be merged.
    """
    out = Path(out_dir)
    if out.is_dir():
        return
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_pickles(Path(adapter_dir))
    model = AutoModelForCausalLM.from_pretrained(str(base_dir), dtype="auto", **ONLY_DATA)
    kept = model.dtype
    # The product is added in float32: in bfloat16 a small update is rounded away.
    tuned = PeftModel.from_pretrained(model.to(torch.float32), str(adapter_dir))
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"weights: the adapter {adapter_dir} cannot be merged: {error}. Train it again.") from error
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        merged.to(kept).save_pretrained(draft)
        AutoTokenizer.from_pretrained(str(base_dir), trust_remote_code=False).save_pretrained(draft)
        draft.rename(out)
    except OSError:
        if not out.is_dir():  # another process may have published the same folder first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def lora_rank(adapter_dir: str | Path) -> int:
    """Rank r of the adapter in `adapter_dir`, the highest one where layers differ."""
    path = Path(adapter_dir) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        return max([int(config["r"]), *(int(rank) for rank in config.get("rank_pattern", {}).values())])
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"weights: {path} says no rank ({error}). Is this an adapter that peft saved?") from error


def swap_mode(current: Weights | None, wanted: Weights) -> Literal["same", "hot", "restart"]:
    """How an engine with merged weights gets from `current` to `wanted`.

    hot: only linear layers differ, so they can be reloaded in place. An embedding that changed
    needs a restart, because a tied head keeps a packed copy of the old one; unknown counts as changed.
    """
    if current is None:
        return "restart"
    if current.id == wanted.id:
        return "same"
    if wanted.embedding_id and current.embedding_id == wanted.embedding_id:
        return "hot"
    return "restart"


def engine_key(weights: Weights, lora: str) -> str:
    """Weights with equal keys can be served by one engine at the same time.

    With `lora` "runtime" a base and all its adapters share an engine; else each id has its own.
    """
    if lora == "runtime" and weights.kind in ("base", "lora"):
        return f"base:{weights.base_dir}"
    return weights.id


def combined(parts: Sequence[tuple[str, Weights]]) -> Weights:
    """Weights of a program with several models. `parts`: (predictor glob, weights), the last for all other predictors."""
    ids = json.dumps([[glob, part.model, part.id] for glob, part in parts])
    digest = hashlib.sha256(ids.encode()).hexdigest()[:HASH_CHARS]
    return replace(parts[-1][1], id=digest, canary=(), parts=tuple(parts))


_PATHS = ("model_dir", "base_dir", "adapter_dir")
RUN = "run:"  # begins a path that starts at the run directory: in a step's record, one of another step's files


def to_record(weights: Weights, root: Path, base: Weights, run_root: Path | None = None) -> dict[str, Any]:
    """Weights as JSON that holds no path of this machine.

    Paths inside `root` start there, others inside the run directory `run_root` there; those of the run's base
    model are left empty, since every machine has its own copy of it.
    """
    data = weights.to_json()
    for key in _PATHS:
        path = data[key]
        if path is not None:
            in_run = path.startswith(f"{run_root}/") and not path.startswith(f"{root}/")
            own_path = f"{RUN}{path.removeprefix(f'{run_root}/')}" if in_run else path.removeprefix(f"{root}/")
            data[key] = "" if path == base.model_dir else own_path
    if weights.parts:
        own = zip(weights.parts, base.parts, strict=True)
        data["parts"] = [[glob, to_record(part, root, of, run_root)] for (glob, part), (_, of) in own]
    return data


def from_record(data: dict[str, Any], root: Path, base: Weights, run_root: Path | None = None) -> Weights:
    """The inverse of `to_record`, on this machine. Raises RunDirError for a path that leads elsewhere, ModelError for one
    to a folder with pickles."""
    paths = {key: _own_path(data[key], root, base, run_root) for key in _PATHS if data.get(key) is not None}
    weights = Weights.from_json({**data, **paths, "parts": []})
    own = zip(data.get("parts", ()), base.parts, strict=True) if data.get("parts") else ()
    return replace(weights, parts=tuple((glob, from_record(part, root, of, run_root)) for (glob, part), (_, of) in own))


def _own_path(name: Any, root: Path, base: Weights, run_root: Path | None) -> str:
    if name == "":
        return base.model_dir
    if isinstance(name, str) and name.startswith(RUN) and run_root is not None:
        name, root = name.removeprefix(RUN), run_root
    folder = inside(root, name)
    refuse_pickles(folder)
    return str(folder)


def refuse_pickles(folder: Path) -> None:
    """Raise ModelError where a folder that a run has written holds a pickle: none of ours does, and a library might read it."""
    planted = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if planted:
        raise ModelError(
            f"weights: {folder} holds {planted[0]}, a pickle that bt_ray never writes there: loading it could run anyone's code. "
            "Remove the step's folder and make it anew."
        )
