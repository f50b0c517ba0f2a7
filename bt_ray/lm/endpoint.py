"""An OpenAI-compatible endpoint behind the pool's calls: for a larger model that writes instructions.

Requests go through LiteLLM (by dspy.LM), so any provider that it knows works. The key is named by
reference: the name of an environment variable, read where the call is made.
"""

from __future__ import annotations

import os
from typing import Any

from bt_ray.config import ProposerConfig
from bt_ray.errors import ConfigError, PoolError
from bt_ray.lm.types import LMAnswer, LMCall, Weights

NUM_RETRIES = 5  # of one call, with growing pauses: a rate limit, or a server that starts again


def endpoint_weights(config: ProposerConfig) -> Weights:
    """What names the endpoint's model in a call: never loaded, only told apart."""
    return Weights(id=f"endpoint:{config.model}@{config.base_url or 'default'}", kind="base", model_dir="", base_dir="")


class EndpointPool:
    """Implements LMPool's `generate`; the endpoint holds its weights itself.

    Raises ConfigError at once where the key's variable is not set.
    """

    def __init__(self, config: ProposerConfig) -> None:
        self._config = config
        if config.api_key_env and not os.environ.get(config.api_key_env):
            raise ConfigError(
                f"proposer.api_key_env: the variable {config.api_key_env} is not set where the stage runs. Set it before "
                "`bt-ray run`; on a cluster, where its nodes start."
            )

    async def generate(self, call: LMCall) -> LMAnswer:
        """One answer. PoolError where the endpoint fails for good."""
        lm = self._lm(call)
        try:
            answers = await lm.acall(messages=list(call.messages))
        except Exception as error:  # LiteLLM has a class per provider's fault; none of them is a score
            raise PoolError(
                f"proposer {self._config.model}: the endpoint failed ({type(error).__name__}: {self._without_key(str(error))[:300]}). "
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
        return os.environ[self._config.api_key_env] if self._config.api_key_env else None

    def _without_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text

    def _lm(self, call: LMCall) -> Any:
        import dspy

        sampling = call.sampling
        return dspy.LM(
            self._config.model,
            api_base=self._config.base_url,
            api_key=self._key() or "none",
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            cache=False,
            num_retries=NUM_RETRIES,
        )


def _usage(lm: Any) -> dict[str, Any]:
    """Tokens of the last call, as the endpoint counts them."""
    usage = (lm.history[-1].get("usage") or {}) if lm.history else {}
    return {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
