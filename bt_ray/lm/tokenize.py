"""Count and encode chat prompts with a model's own tokenizer, without torch or transformers.

Used before a run starts and in program workers, where loading transformers would cost seconds
and hundreds of megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bt_ray.errors import ModelError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if there is no such file. Raises ModelError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model: {path} is no valid JSON ({error}). Fetch the model again.") from None
    if not isinstance(data, dict):
        raise ModelError(f"model: {path} holds no JSON object. Fetch the model again.")
    return data


def read_chat_template(model_dir: str | Path) -> str | None:
    """The jinja source that turns messages into one prompt, or None if the model has none.

    A model with several named templates gives the one named `default`.
    """
    folder = Path(model_dir)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template}.get("default")
    return template or None


class ChatTokenizer:
    """The tokenizer and chat template of the model in `model_dir`. Raises ModelError without either."""

    def __init__(self, model_dir: str | Path) -> None:
        from tokenizers import Tokenizer

        folder = Path(model_dir)
        source = read_chat_template(folder)
        if source is None:
            raise ModelError(f"model: {folder} has no chat template. Take an instruction-tuned model.")
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"model: {folder} has no tokenizer.json. Save its tokenizer with `save_pretrained` first.")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # A saved length limit would cut a prompt and so hide that it is too long.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = _special_tokens(folder)
        self._template = _compile(source)

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt as text. ModelError if the template refuses these messages (a role it lacks)."""
        from jinja2 import TemplateError

        values = {"messages": list(messages), "tools": None, "documents": None, **self._special}
        try:
            return self._template.render(add_generation_prompt=add_generation_prompt, **values)
        except TemplateError as error:
            raise ModelError(f"model: the chat template refuses these messages: {error}") from None

    def encode_chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of chat `messages`, as the engine and the trainer see them."""
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return self._tokenizer.encode(self.render(messages, add_generation_prompt), add_special_tokens=False).ids

    def count(self, messages: Sequence[dict[str, Any]]) -> int:
        """Number of prompt tokens of `messages`, the opening of the answer included."""
        return len(self.encode_chat(messages))


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by their usual names, for the template."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        data = read_json(folder / name)
        for key in _SPECIAL_TOKENS:
            value = data.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _compile(source: str) -> Any:
    """The template with the filters and tags that published chat templates use.

    A template comes with the model, from anyone: the sandbox keeps it from reaching Python objects.
    """
    from jinja2 import TemplateError, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012, the base class declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"model: the chat template is no valid jinja: {error}") from None
