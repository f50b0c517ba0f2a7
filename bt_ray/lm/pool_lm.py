"""dspy.LM with a short way to the pool for calls that ask for one text.

DSPy's own way makes a provider's request of the messages and a provider's answer of the text; awaited, it also goes
through a thread twice: a message may name local files, and a price list is read. A pool's call has none of these, and
on a fast engine they cost more than all the rest of a call.
"""

from __future__ import annotations

from typing import Any

import dspy
from dspy import lm15
from dspy.clients.errors import error_boundary

SAMPLING = frozenset({"temperature", "max_tokens", "top_p"})  # what a call of the short way may set
TURNS = ("user", "assistant")
UNSET = lm15.Config()

Plain = tuple[list[dict[str, str]], lm15.Config]


class PoolLM(dspy.LM):  # type: ignore[misc]
    """Calls for which anyone listens, or that ask for more than one text, go DSPy's own way, with the same engines.

    The engines have `ask(messages, config)` beside DSPy's `complete(request)`.
    """

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        plain = self._plain(prompt, messages, kwargs)
        if plain is None:
            return super().__call__(prompt, messages=messages, **kwargs)
        with error_boundary(self.model, unexpected=True):
            return [self._engine_spec.ask(*plain).text]

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        plain = self._plain(prompt, messages, kwargs)
        if plain is None:
            return await super().acall(prompt, messages=messages, **kwargs)
        with error_boundary(self.model, unexpected=True):
            return [(await self._async_engine_spec.ask(*plain)).text]

    def _plain(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Plain | None:
        """Messages and sampling of a call that may go the short way; None for one that may not."""
        if prompt is not None or self.callbacks or _listeners():
            return None
        wanted = {name: value for name, value in {**self.kwargs, **kwargs}.items() if value is not None}
        if not wanted.keys() <= SAMPLING:
            return None
        turns = _turns(messages)
        if turns is None:
            return None
        return turns, lm15.Config(**wanted) if wanted else UNSET


def _listeners() -> bool:
    """Whether DSPy has to tell someone of the call: its history, callbacks, a count of tokens, a stream."""
    settings = dspy.settings
    heard = settings.callbacks or settings.usage_tracker or settings.send_stream is not None
    return bool(heard) or not settings.disable_history


def _turns(messages: Any) -> list[dict[str, str]] | None:
    """The messages, where they are texts of a system prompt and turns after it, as DSPy's own way would pass them on."""
    turns = []
    for number, message in enumerate(messages or ()):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return None
        role, content = message["role"], message["content"]
        if not isinstance(content, str) or not _encodable(content):
            return None  # for a character that no text may hold DSPy has an error that names it
        if role not in TURNS and (role != "system" or number or not content):
            return None
        turns.append({"role": role, "content": content})
    return turns if turns and turns[-1]["role"] in TURNS else None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
