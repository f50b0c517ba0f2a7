"""What the type of an output field allows, and how its values look as text.

The compact adapter and the decoding constraints read the same table, so that what is allowed
while decoding is what the parser accepts. Values are strict both ways: nothing is guessed.
"""

from __future__ import annotations

import enum
import json
import math
import re
import types
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

import pydantic
from dspy import Reasoning
from dspy.adapters.utils import serialize_for_json

Kind = Literal["text", "choice", "bool", "int", "float", "json"]
NONE = "None"
TYPES_KEPT = 256  # types of which a schema and a validator are kept: to make them takes longer than a call's other work


def kind_of(annotation: Any) -> Kind:
    """The family that an output annotation belongs to; what is unknown travels as JSON."""
    inner = _without_none(annotation)
    if inner is str or inner is Any or inner is Reasoning:
        return "text"
    if get_origin(inner) is Literal or _is_enum(inner):
        return "choice"
    if inner is not annotation:
        return "json"  # an optional number has one more value, null
    if annotation is bool:
        return "bool"
    if annotation is int:
        return "int"
    if annotation is float:
        return "float"
    return "json"


def choices(annotation: Any) -> list[str]:
    """Texts of the allowed values of a `choice` annotation, in the order of its definition."""
    return [_choice_text(value) for value in _choice_values(annotation)]


def json_schema(annotation: Any) -> dict[str, Any]:
    """JSON schema of a `json` annotation, without the titles that only cost tokens. Shared: not to be changed."""
    return _schema(_Itself(annotation))


def to_text(annotation: Any, value: Any) -> str:
    """The text of one output value, as a model is taught to write it."""
    kind = kind_of(annotation)
    if kind == "json":
        return json.dumps(serialize_for_json(value), ensure_ascii=False)
    if kind == "choice":
        return _choice_text(value)
    return str(value)


def from_text(annotation: Any, text: str) -> Any:
    """Read one output value. Raises ValueError that says what is wrong with the text."""
    text = text.strip()
    kind = kind_of(annotation)
    if not text:
        raise ValueError("the value is empty")
    if kind == "choice":
        for value in _choice_values(annotation):
            if _choice_text(value) == text:
                return value
        raise ValueError(f"{text[:80]!r} is none of {', '.join(choices(annotation))}")
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text[:80]!r} is neither True nor False")
        return text.lower() == "true"
    if kind == "int":
        if not re.fullmatch(r"[+-]?[0-9]+", text):
            raise ValueError(f"{text[:80]!r} is no whole number")
        return int(text)
    if kind == "float":
        return _float(text)
    if kind == "text":
        return Reasoning(content=text) if _without_none(annotation) is Reasoning else text
    return _json(annotation, text)


def jsonable(value: Any) -> Any:
    """A JSON copy of any value of a program: models are dumped, the unknown becomes its text."""
    if value is None or (isinstance(value, (str, bool, int)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, enum.Enum):
        return jsonable(value.value)
    if isinstance(value, Reasoning):
        return str(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "toDict"):  # dspy.Example and dspy.Prediction
        return jsonable(dict(value.items()))
    return serialize_for_json(value)


class _Itself:
    """A type as the key of what is kept for it. Not by equality: Union[int, str] equals Union[str, int] and reads otherwise."""

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation

    def __hash__(self) -> int:
        return id(self.annotation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.annotation is other.annotation


@lru_cache(maxsize=TYPES_KEPT)
def _validator(key: _Itself) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(key.annotation)


@lru_cache(maxsize=TYPES_KEPT)
def _schema(key: _Itself) -> dict[str, Any]:
    schema: dict[str, Any] = _without_titles(_validator(key).json_schema())
    return schema


def _without_none(annotation: Any) -> Any:
    """X of Optional[X]; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(rest) == 1 and len(rest) < len(get_args(annotation)):
            return rest[0]
    return annotation


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _choice_values(annotation: Any) -> list[Any]:
    inner = _without_none(annotation)
    values: list[Any] = list(inner) if _is_enum(inner) else list(get_args(inner))
    return values if inner is annotation else [*values, None]


def _choice_text(value: Any) -> str:
    return NONE if value is None else str(value.value if isinstance(value, enum.Enum) else value)


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]!r} is no finite number")
    return number


def _json(annotation: Any, text: str) -> Any:
    adapter = _validator(_Itself(annotation))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        try:  # some dspy types, as Code, read their own plain text
            return adapter.validate_python(text)
        except pydantic.ValidationError:
            raise ValueError(f"no valid JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, a tower of brackets
        raise ValueError("no JSON of a size that can be read") from None
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"the JSON does not fit: {where}: {problem['msg']}") from None


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, dict):
        result = {}
        for key, value in schema.items():
            if key in ("properties", "$defs"):  # their keys are names, and `title` may be one
                result[key] = {name: _without_titles(item) for name, item in value.items()}
            elif key != "title":
                result[key] = _without_titles(value)
        return result
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    return schema
