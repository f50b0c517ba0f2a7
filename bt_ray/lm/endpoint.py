"""An OpenAI-compatible endpoint behind the pool's calls: for a larger model that writes instructions.

Requests go through LiteLLM (by dspy.LM), so any provider that it knows works. The key is named by
reference: the name of an environment variable or the path of a file, read where the call is made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bt_ray.config import ProposerConfig
from bt_ray.errors import ConfigError, PoolError
from bt_ray.lm.types import LMAnswer, LMCall, Weights

NUM_RETRIES = 5  # of one call, with growing pauses: a rate limit, or a server that starts again
MAX_KEY_BYTES = 1 << 16


def endpoint_weights(config: ProposerConfig) -> Weights:
    """What names the endpoint's model in a call: never loaded, only told apart."""
    return Weights(id=f"endpoint:{config.model}@{config.base_url or 'default'}", kind="base", model_dir="", base_dir="")


def key_in_file(config: ProposerConfig, base_dir: str) -> str | None:
    """The key that `api_key_file` holds, without the white space around it; None where the config names no file.

    `base_dir`: folder that a relative path starts from. Raises ConfigError, which does not repeat the path: somebody may
    have written the key itself there.
    """
    if config.api_key_file is None:
        return None
    try:
        path = Path(base_dir, Path(config.api_key_file).expanduser())
        problem = None if path.is_file() else "names a folder" if path.is_dir() else "names no file that there is"
        data = b"" if problem else _beginning(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a null byte, of a user without a home
        problem = f"names a file that cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    if problem is None:
        key = data.decode("ascii", errors="replace").strip()
        if len(data) > MAX_KEY_BYTES:
            problem = f"names a file of more than {MAX_KEY_BYTES >> 10} KiB"
        elif not key:
            problem = "names an empty file"
        elif not (key.isascii() and key.isprintable()):  # a client's error would show such a header
            problem = "names a file with more than one line of plain text"
        else:
            return key
    raise ConfigError(
        f"proposer.api_key_file: it {problem}. Name a file that holds the key and nothing else, where the driver and the "
        "stages see it; a relative path starts from the config's folder."
    )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_KEY_BYTES + 1)


class EndpointPool:
    """Implements LMPool's `generate`; the endpoint holds its weights itself.

    Raises ConfigError at once where the key's variable is not set, or its file holds none.
    """

    def __init__(self, config: ProposerConfig, base_dir: str) -> None:
        self._config = config
        self._base_dir = base_dir
        key_in_file(config, base_dir)
        if config.api_key_env and not os.environ.get(config.api_key_env):
            raise ConfigError(
                f"proposer.api_key_env: the variable {config.api_key_env} is not set where the stage runs. Set it before "
                "`bt-ray run`; on a cluster, where its nodes start."
            )

    async def generate(self, call: LMCall) -> LMAnswer:
        """One answer. PoolError where the endpoint fails for good."""
        key = self._key()
        lm = self._lm(call, key)
        try:
            answers = await lm.acall(messages=list(call.messages))
        except Exception as error:  # LiteLLM has a class per provider's fault; none of them is a score
            raise PoolError(
                f"proposer {self._config.model}: the endpoint failed ({type(error).__name__}: {_without(key, str(error))[:300]}). "
                "Check proposer.base_url and the key, then run again."
            ) from None  # providers repeat the key that they refuse, and a chain of errors is printed whole
        text = answers[0] if isinstance(answers[0], str) else answers[0].get("text") or ""
        return LMAnswer(text, (), (), "stop", call.weights.id, extra=_usage(lm))

    async def ensure(self, weights: Weights) -> None:
        """Nothing: the endpoint holds its model."""

    async def load(self, weights: Weights) -> None:
        """Nothing: the endpoint holds its model."""

    async def scale(self, num_replicas: int) -> None:
        """Nothing: the endpoint scales itself."""

    async def close(self) -> None:
        """Nothing is held open."""

    def _key(self) -> str | None:
        if self._config.api_key_env:
            return os.environ[self._config.api_key_env]
        return key_in_file(self._config, self._base_dir)  # at each call: a mounted secret may change in a long run

    def _lm(self, call: LMCall, key: str | None) -> Any:
        import dspy

        sampling = call.sampling
        return dspy.LM(
            self._config.model,
            api_base=self._config.base_url,
            api_key=key or "none",
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            cache=False,
            num_retries=NUM_RETRIES,
        )


def _without(key: str | None, text: str) -> str:
    return text.replace(key, "***") if key else text


def _usage(lm: Any) -> dict[str, Any]:
    """Tokens of the last call, as the endpoint counts them."""
    usage = (lm.history[-1].get("usage") or {}) if lm.history else {}
    return {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
