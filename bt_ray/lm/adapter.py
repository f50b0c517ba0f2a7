"""How signatures become chat messages, and how answers are read.

`compact` is for small models: DSPy's own formats spend some 330 tokens on four short fields, this
one a few dozen. The other three are DSPy's formats, held to one call per prediction: no hidden
second call in another format when an answer does not parse.
"""

from __future__ import annotations

import json
import re
import textwrap
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import dspy
from dspy.adapters.utils import annotation_allows_none, apply_output_field_defaults, format_field_value
from dspy.utils.exceptions import AdapterParseError

from bt_ray.lm import fields
from bt_ray.lm.call_context import CALL_SITE, PREDICTOR_TAG, CallSite
from bt_ray.lm.constraint import COMPLETED, constraint_for
from bt_ray.lm.parsing import OneError

NOT_SUPPLIED = "Not supplied."


# At run time the mixin must not derive from dspy.Adapter: that class wraps `format` and `parse` of
# every direct subclass, and the mixin's copies would hide those of dspy's own adapters.
if TYPE_CHECKING:
    _Base = dspy.Adapter
else:
    _Base = object


class PooledAdapter(OneError, _Base):  # type: ignore[misc, valid-type]
    """Tells the pool's engine how an answer ends, and notes the parsed outputs of each call.

    A mixin before one of dspy's adapters.
    """

    format_name = ""
    constrain = False

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        inputs = with_history(signature, inputs)
        site = self._site(signature, inputs)
        token = CALL_SITE.set(site)
        try:
            values = super().__call__(lm, lm_kwargs, signature, demos, inputs)
        finally:
            CALL_SITE.reset(token)
        site.complete([_outputs(signature, value) for value in values])
        return values

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        inputs = with_history(signature, inputs)
        site = self._site(signature, inputs)
        token = CALL_SITE.set(site)
        try:
            values = await super().acall(lm, lm_kwargs, signature, demos, inputs)
        finally:
            CALL_SITE.reset(token)
        site.complete([_outputs(signature, value) for value in values])
        return values

    def _site(self, signature: Any, inputs: dict[str, Any]) -> CallSite:
        """Raises TypeError for an input that the call does not give: dspy only warns, and the prompt would lack its line."""
        known = signature.input_fields
        if missing := [name for name, field in known.items() if name not in inputs and is_needed(field)]:
            raise TypeError(
                f"{_caller(signature)} is called without its input {', '.join(map(repr, missing))}; pass it, or give the field "
                "a default"
            )
        return CallSite(
            stop=stop_strings(self, signature),
            constraint=constraint_for(signature, self.format_name) if self.constrain else None,
            inputs=fields.jsonable({name: inputs[name] for name in known if name in inputs}),
        )


class CompactAdapter(PooledAdapter, dspy.Adapter):  # type: ignore[misc]
    """Instructions and allowed values once, then `field: value` lines; strict when it reads.

    One output: the assistant writes its bare value. Several: `field: value` lines in the order of
    the signature, where the text of a field may go on over further lines.
    """

    format_name = "compact"

    def format_system_message(self, signature: Any) -> str:
        instructions = textwrap.dedent(signature.instructions).strip()
        lines = [instructions] if instructions else []
        for name, field in signature.input_fields.items():
            if desc := _desc(name, field):
                lines.append(f"{name}: {desc}")
        outputs = signature.output_fields
        several = len(outputs) > 1
        if several:
            lines.append("Answer in these lines:")
        for name, field in outputs.items():
            hint = "; ".join(part for part in (_desc(name, field), _allowed(field.annotation)) if part)
            if hint or several:
                lines.append(f"{name}: {hint or 'text'}")
        return "\n".join(lines)

    def format_user_message_content(
        self, signature: Any, inputs: dict[str, Any], prefix: str = "", suffix: str = "", main_request: bool = False
    ) -> str:
        lines = [prefix] if prefix else []
        for name, field in signature.input_fields.items():
            if name in inputs and field.annotation is not dspy.History:
                lines.append(f"{name}: {_shown(field, inputs[name])}")
        return "\n".join([*lines, suffix] if suffix else lines)

    def format_assistant_message_content(
        self, signature: Any, outputs: dict[str, Any], missing_field_message: str | None = None
    ) -> str:
        texts = {}
        for name, field in signature.output_fields.items():
            if _given(name, field, outputs):
                texts[name] = fields.to_text(field.annotation, outputs[name])
            elif missing_field_message is not None:
                texts[name] = missing_field_message
        if len(signature.output_fields) == 1:
            return "".join(texts.values())
        return "\n".join(f"{name}: {text}" for name, text in texts.items())

    def format_demos(self, signature: Any, demos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Demos as turns. A missing text output is shown as not supplied; a demo that lacks a typed
        output (or every input) is left out, because it would teach an answer that does not parse."""
        messages = []
        for demo in demos:
            missing = [name for name, field in signature.output_fields.items() if not _given(name, field, demo)]
            typed = [name for name in missing if fields.kind_of(signature.output_fields[name].annotation) != "text"]
            if typed or len(missing) == len(signature.output_fields) or not any(name in demo for name in signature.input_fields):
                continue
            answer = self.format_assistant_message_content(signature, demo, NOT_SUPPLIED)
            messages.append({"role": "user", "content": self.format_user_message_content(signature, demo)})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """Values of the output fields. AdapterParseError for anything that is not exactly as asked."""
        wanted = signature.output_fields
        texts = self._texts(signature, completion)
        values: dict[str, Any] = {}
        for name, text in texts.items():
            try:
                values[name] = fields.from_text(wanted[name].annotation, text)
            except ValueError as error:
                raise self._error(signature, completion, f"{name}: {error}.", values) from None
        values = apply_output_field_defaults(signature, values)
        missing = [name for name in wanted if name not in values]
        if missing:
            raise self._error(signature, completion, f"The answer lacks {', '.join(missing)}.", values)
        return values

    def _texts(self, signature: Any, completion: str) -> dict[str, str]:
        """Cut the answer into the texts of its fields."""
        names = list(signature.output_fields)
        if len(names) == 1:
            return {names[0]: completion}
        pattern = re.compile(rf"({'|'.join(re.escape(name) for name in names)}):[ \t]*(.*)", re.DOTALL)
        texts: dict[str, str] = {}
        current = -1
        for line in completion.split("\n"):
            match = pattern.fullmatch(line)
            if match and names.index(match[1]) <= current:
                raise self._error(signature, completion, f"The line of {match[1]} comes twice or too late.", {})
            if match:
                current = names.index(match[1])
                texts[match[1]] = match[2]
            elif current >= 0:
                texts[names[current]] += "\n" + line
            elif line.strip():
                raise self._error(signature, completion, f"The answer does not begin with the line of {names[0]}.", {})
        return texts

    def _error(self, signature: Any, completion: str, message: str, values: dict[str, Any]) -> AdapterParseError:
        return AdapterParseError(
            adapter_name="compact", signature=signature, lm_response=completion, message=message, parsed_result=values
        )


class ChatFormat(PooledAdapter, dspy.ChatAdapter):  # type: ignore[misc]
    """DSPy's chat format, one call per prediction."""

    format_name = "chat"

    def __init__(self) -> None:
        dspy.ChatAdapter.__init__(self, use_json_adapter_fallback=False)


class JSONFormat(PooledAdapter, dspy.JSONAdapter):  # type: ignore[misc]
    """DSPy's JSON format."""

    format_name = "json"

    def __init__(self) -> None:
        dspy.JSONAdapter.__init__(self, use_native_function_calling=False)


class XMLFormat(PooledAdapter, dspy.XMLAdapter):  # type: ignore[misc]
    """DSPy's XML format, one call per prediction."""

    format_name = "xml"

    def __init__(self) -> None:
        dspy.XMLAdapter.__init__(self, use_json_adapter_fallback=False)


def make_adapter(name: str, constrain: bool) -> PooledAdapter:
    """The adapter of a run: compact, chat, json or xml. With `constrain`, typed outputs are held to
    their values while decoding. Raises ValueError for another name."""
    kinds: dict[str, type[PooledAdapter]] = {"compact": CompactAdapter, "chat": ChatFormat, "json": JSONFormat, "xml": XMLFormat}
    if name not in kinds:
        raise ValueError(f"adapter {name!r} is unknown; take compact, chat, json or xml")
    adapter = kinds[name]()
    adapter.constrain = constrain
    return adapter


@lru_cache(maxsize=fields.TYPES_KEPT)
def stop_strings(adapter: PooledAdapter, signature: Any) -> tuple[str, ...]:
    """Where an answer surely ends; without them small models run on past their answer."""
    if isinstance(adapter, CompactAdapter) and len(signature.output_fields) == 1:
        annotation = next(iter(signature.output_fields.values())).annotation
        kind = fields.kind_of(annotation)
        if kind in ("bool", "int", "float") or (kind == "choice" and not any("\n" in c for c in fields.choices(annotation))):
            return ("\n",)
    return (COMPLETED,) if isinstance(adapter, ChatFormat) else ()


def render_row(
    adapter: PooledAdapter, signature: Any, candidate_predictor: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, list[dict[str, str]]]:
    """One call as a chat row for training.

    `candidate_predictor` holds "instructions" and "demos" of the predictor; `inputs` and `outputs`
    are the JSON values of a recorded call. Returns {"prompt": [messages], "completion": [message]}:
    the messages that the program would send, and the answer in the adapter's own form.
    """
    signature = signature.with_instructions(candidate_predictor["instructions"])
    prompt = adapter.format(signature, list(candidate_predictor["demos"]), with_history(signature, inputs))
    answer = adapter.format_assistant_message_content(signature, outputs)
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}


def with_history(signature: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs in which a conversation given as JSON is a dspy.History again."""
    given = dict(inputs)
    for name, field in signature.input_fields.items():
        if field.annotation is dspy.History and isinstance(given.get(name), (dict, list)):
            value = given[name]
            given[name] = dspy.History.model_validate(value if isinstance(value, dict) else {"messages": value})
    return given


def _shown(field: Any, value: Any) -> str:
    """An input as DSPy shows it. A string is shown as it is; DSPy makes a pydantic validator to find that out."""
    return value if type(value) is str else str(format_field_value(field_info=field, value=value))


def _given(name: str, field: Any, values: dict[str, Any]) -> bool:
    """Whether a value can be written; None is one where the type says so and has a text for it."""
    if values.get(name) is not None:
        return True
    return name in values and annotation_allows_none(field.annotation) and fields.kind_of(field.annotation) != "text"


def is_needed(field: Any) -> bool:
    """Whether a call must give this input. A conversation may have not begun yet; dspy itself fills defaults in."""
    return field.is_required() and field.annotation is not dspy.History and not annotation_allows_none(field.annotation)


def _caller(signature: Any) -> str:
    """The predictor that calls, by its name in the program where it has one, and its fields."""
    callers = [module for module in dspy.settings.caller_modules or [] if isinstance(module, dspy.Predict)]
    name = getattr(callers[-1], PREDICTOR_TAG, None) if callers else None
    return f"{f'predictor {name!r}' if name else 'a predictor'} ({signature.signature})"


def _outputs(signature: Any, value: dict[str, Any]) -> dict[str, Any]:
    return fields.jsonable({name: value.get(name) for name in signature.output_fields})


def _desc(name: str, field: Any) -> str:
    desc = str((field.json_schema_extra or {}).get("desc") or "")
    return "" if desc == f"${{{name}}}" else desc.strip()


def _allowed(annotation: Any) -> str:
    kind = fields.kind_of(annotation)
    if kind == "choice":
        return f"one of {', '.join(fields.choices(annotation))}"
    if kind == "json":
        return f"JSON of the schema {json.dumps(fields.json_schema(annotation), ensure_ascii=False)}"
    return {"bool": "True or False", "int": "a whole number", "float": "a number"}.get(kind, "")
