"""Plain values that cross between program workers, the pool and the trainer.

No heavy import here: these travel through Ray and JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

FIXED = "(fixed)"  # before the name of a predictor whose prompts no candidate holds, where its calls are recorded


@dataclass(frozen=True)
class CanaryCase:
    """Greedy tokens that plain transformers gives for one fixed prompt.

    `margins` holds, per answer token, the logit of the best token minus that of the second
    best: a mismatch where the margin is below the dtype's noise is a tie, not an error.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Weights:
    """What the LM runs with. `id` is a content hash, so equal ids mean equal tensors."""

    id: str
    kind: Literal["base", "lora", "full"]
    model_dir: str  # a folder that an engine without run-time LoRA loads: base, merged or full
    base_dir: str  # the base model that an adapter belongs to
    adapter_dir: str | None = None
    embedding_id: str = ""  # equal ids: linear layers may be swapped in place
    canary: tuple[CanaryCase, ...] = ()
    model_hash: str = ""  # content hash of model_dir where it is not the id: a merged adapter's
    model: str = ""  # name in the config's `models`, whose engines answer; empty for the run's own model
    # Of a program with several models: (predictor glob, weights), the first that matches answers. The other fields
    # are then those of the run's own model, but for `id`.
    parts: tuple[tuple[str, Weights], ...] = ()

    def part_for(self, predictor: str) -> Weights:
        """The weights that answer a predictor's calls: these, or one of their parts."""
        name = predictor.removeprefix(f"{FIXED} ")
        return next((part for glob, part in self.parts if fnmatchcase(name, glob)), self)

    def to_json(self) -> dict[str, Any]:
        """JSON values; what a run with one model does not need is left out."""
        data = asdict(self)
        data["parts"] = [[glob, part.to_json()] for glob, part in self.parts]
        return {key: value for key, value in data.items() if value or key not in ("model", "model_hash", "parts")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Weights:
        cases = tuple(
            CanaryCase(tuple(c["prompt_token_ids"]), tuple(c["token_ids"]), tuple(c["margins"])) for c in data.get("canary", ())
        )
        parts = tuple((glob, cls.from_json(part)) for glob, part in data.get("parts", ()))
        return cls(**{**data, "canary": cases, "parts": parts})


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. `constraint` is one of {"choice": [...]}, {"regex": "..."},
    {"json": {schema}} and becomes vLLM's structured output; None leaves the model free."""

    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: dict[str, Any] | None = None


@dataclass(frozen=True)
class LMCall:
    """One request to the pool: chat messages, or token ids where `messages` is empty."""

    weights: Weights
    sampling: Sampling
    messages: tuple[dict[str, Any], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LMAnswer:
    """One answer, with what is needed to train on it and to account for it."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"
    weights_id: str
    cached_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class LMPool(Protocol):
    """The five calls behind which everything that generates stands. Picklable."""

    async def ensure(self, weights: Weights) -> None:
        """Return when at least one replica answers with these weights. PoolError, CanaryError."""

    async def generate(self, call: LMCall) -> LMAnswer:
        """Answer with exactly `call.weights`. PromptTooLongError, PoolError, CanaryError.
        Cancelling the awaiting task aborts the request in the engine."""

    async def load(self, weights: Weights) -> None:
        """Make the pool hold these weights (a swap, or a restart) and check the canary."""

    async def scale(self, num_replicas: int) -> None:
        """Set the number of replicas; 0 gives the devices back."""

    async def close(self) -> None:
        """Delete the pool's own Serve application, nothing else."""
