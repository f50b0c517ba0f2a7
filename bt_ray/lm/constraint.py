"""From a signature to the decoding constraint that makes its answer parse.

Pure: the result is what `Sampling.constraint` holds, one of {"choice": [...]}, {"regex": "..."},
{"json": {schema}}, or None where the answer is free. Which characters a text field may hold while
it is constrained: one line (`[^\\n]+`), because a regular expression cannot tell where a
many-line text ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape as xml_escape

from bt_ray.lm import fields

ADAPTERS = ("compact", "chat", "json", "xml")
COMPLETED = "[[ ## completed ## ]]"
# Bounded repetition: a model that may go on writing digits sometimes does.
INT_PATTERN = "-?[0-9]{1,18}"
FLOAT_PATTERN = r"-?[0-9]{1,18}(\.[0-9]{1,12})?"
TEXT_PATTERN = r"[^\n]+"
XML_TEXT_PATTERN = r"[^\n<&]+"


def constraint_for(signature: Any, adapter: str) -> dict[str, Any] | None:
    """The constraint of one call.

    `signature` is a dspy Signature class, `adapter` one of compact, chat, json, xml. None where
    nothing typed is asked for, or where a field (nested JSON among other fields) fits no regex.
    Raises ValueError for an unknown adapter.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter {adapter!r} is unknown; take {', '.join(ADAPTERS[:-1])} or {ADAPTERS[-1]}")
    outputs = {name: field.annotation for name, field in signature.output_fields.items()}
    kinds = {name: fields.kind_of(annotation) for name, annotation in outputs.items()}
    if adapter == "json":
        return {"json": _object_schema(outputs)}  # a JSON string ends by itself, so free text fits too
    if all(kind == "text" for kind in kinds.values()) and (len(outputs) < 2 or adapter != "compact"):
        return None
    if adapter == "compact" and len(outputs) == 1:
        return _single(next(iter(outputs.values())))
    if "json" in kinds.values():
        return None
    if adapter == "compact":
        return {"regex": r"\n".join(f"{name}: {_pattern(a)}" for name, a in outputs.items())}
    if adapter == "chat":
        parts = [f"{_literal(f'[[ ## {name} ## ]]')}\\n{_pattern(a)}" for name, a in outputs.items()]
        return {"regex": r"\n\n".join([*parts, _literal(COMPLETED)])}
    parts = [f"<{name}>\\n{_pattern(a, XML_TEXT_PATTERN, xml_escape)}\\n</{name}>" for name, a in outputs.items()]
    return {"regex": r"\n\n".join(parts)}


def _single(annotation: Any) -> dict[str, Any] | None:
    kind = fields.kind_of(annotation)
    if kind == "choice":
        return {"choice": fields.choices(annotation)}
    if kind == "bool":
        return {"choice": ["True", "False"]}
    if kind == "json":
        return {"json": fields.json_schema(annotation)}
    return {"regex": _pattern(annotation)}


def _pattern(annotation: Any, text: str = TEXT_PATTERN, escape: Callable[[str], str] = str) -> str:
    """A regular expression of one value, without anchors."""
    kind = fields.kind_of(annotation)
    if kind == "choice":
        return "(" + "|".join(_literal(escape(choice)) for choice in fields.choices(annotation)) + ")"
    return {"bool": "(True|False)", "int": INT_PATTERN, "float": FLOAT_PATTERN}.get(kind, text)


def _literal(text: str) -> str:
    # re.escape also escapes spaces and dashes, which grammar compilers do not all accept.
    return "".join(f"\\{char}" if char in r"\.^$*+?{}[]|()" else char for char in text).replace("\n", r"\n")


def _object_schema(outputs: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of the object that dspy's JSONAdapter reads, closed and with every field."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for name, annotation in outputs.items():
        if fields.kind_of(annotation) == "text":
            properties[name] = {"type": "string"}
            continue
        schema = dict(fields.json_schema(annotation))
        definitions.update(schema.pop("$defs", {}))
        properties[name] = schema
    whole: dict[str, Any] = {"type": "object", "properties": properties}
    whole.update({"required": list(properties), "additionalProperties": False})
    return {**whole, "$defs": definitions} if definitions else whole
