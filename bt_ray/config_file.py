"""Reads a config file: YAML, overrides, and one clear sentence per problem.

`load` reads and checks; it changes nothing on disk.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from bt_ray.config import PromptStep, RunConfig, Section, WeightStep
from bt_ray.config_base import SECRET_NAME
from bt_ray.errors import ConfigError

MAX_CONFIG_BYTES = 100_000  # pyyaml reads some 100 kB a second
MAX_DEPTH = 50
MAX_SENTENCES = 20
# What pyyaml raises for scalars that look like a date, a number or a tagged value and are none (2024-99-99, `!!bool x`).
YAML_FAULTS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML config, apply `key.sub=value` overrides and check it. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config: there is no file {path}. Name a YAML file; `bt_ray/tasks/*/config.yaml` are examples.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"config: {path} is larger than {MAX_CONFIG_BYTES} bytes. A config is a page of text.")
    text = path.read_text(encoding="utf-8", errors="replace")
    data = _read_yaml(text, path)
    for item in overrides:
        _override(data, item)
    data.setdefault("base_dir", str(path.resolve().parent))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, text, str(path), data)) from None


def with_overrides(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """A config with `key.sub=value` overrides. Raises ConfigError."""
    data = config.model_dump(mode="json", exclude_unset=True)
    for item in overrides:
        _override(data, item)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "", "--set", data)) from None


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        check_small(text, f"config: {path}")
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), (), path)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config: {path} is no valid YAML{where}: {getattr(error, 'problem', error)}. Mend that line."
        ) from None
    except YAML_FAULTS as error:
        raise ConfigError(
            f"config: {path} holds a value that YAML cannot read ({_first_line(error)}). Put it in quotes, if text is meant."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"config: {path} holds no mapping of keys. Start with `program: module:Class`.")
    return data


def check_small(text: str, where: str = "the text") -> None:
    """Raise ConfigError for YAML that could grow without bound as it is read: aliases, or a tower of brackets.

    Raises YAMLError where the text is none. It reads events alone, and so stops at the first of them.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where} uses YAML aliases (*name), which a config does not need. Write the values out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where} is nested deeper than {MAX_DEPTH} levels. A config has a handful.")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def _refuse_twice(node: yaml.Node | None, above: tuple[str, ...], path: Path) -> None:
    """Raise ConfigError for a key that stands twice in one section: YAML would silently take the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, above, path)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first:
            raise ConfigError(
                f"config: {path}, line {line}: the key {'.'.join((*above, name))!r} stands twice, first at line {first[name]}; "
                "keep one of the two."
            )
        first[name] = line
        _refuse_twice(value, (*above, name), path)


def _override(data: dict[str, Any], item: str) -> None:
    """Set one `key.sub=value` in place; the value is read as YAML."""
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item!r} is not of the form key.sub=value.")
    *parents, last = key.split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item!r}: {part!r} is a value, not a section.")
        node = child
    try:
        check_small(value, f"--set {key}")
        node[last] = yaml.safe_load(value)
    except (yaml.YAMLError, *YAML_FAULTS):
        raise ConfigError(f"--set {item!r}: the value is no valid YAML.") from None


def explain(error: ValidationError, text: str, where: str, data: dict[str, Any] | None = None) -> str:
    """One sentence per problem: what, at which line, what to do.

    `data`: what was read. It says of which kind a step is, and so which keys it knows.
    """
    sentences = []
    root = _composed(text)
    problems = error.errors(include_url=False)
    for problem in problems[:MAX_SENTENCES]:
        loc = [str(part) for part in problem["loc"]]
        path = loc[:2] + [part for part in loc[2:] if part not in ("PromptStep", "WeightStep", "function-before")]
        message = problem["msg"].removeprefix("Value error, ")
        # A problem of the whole config names its key in the message.
        line = _line_of(root, path or message.partition(":")[0].split("."))
        at = f"{where}, line {line}" if line else where
        name = ".".join(path)
        if problem["type"] == "extra_forbidden":
            sentences.append(f"config: {at}: unknown key {name!r}; {_hint(path, data or {})}")
        elif problem["type"] == "missing":
            sentences.append(f"config: {at}: the key {name!r} is missing; add it.")
        elif not path:
            sentences.append(f"config: {at}: {message}.")
        else:
            sentences.append(f"config: {at}: {name}: {message}{_got(path, problem['input'])}{_near(problem)}")
    if len(problems) > MAX_SENTENCES:
        sentences.append(f"config: {where}: and {len(problems) - MAX_SENTENCES} more.")
    return "\n".join(sentences)


def _hint(path: list[str], data: dict[str, Any]) -> str:
    """What the unknown key at `path` may have been meant to be."""
    *above, key = path
    kind = _step_class(above[1], data) if len(above) == 2 and above[0] == "steps" else None
    if kind is PromptStep and key in WeightStep.model_fields:
        return f"`{key}` is a key of weight steps (`method`), and steps.{above[1]} is a prompt step"
    if kind is WeightStep and key in PromptStep.model_fields:
        return f"`{key}` is a key of prompt steps (`optimizer`), and steps.{above[1]} is a weight step"
    known = _keys_at(above, data)
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"known keys: {', '.join(known)}" if known else "remove it"


def _near(problem: Mapping[str, Any]) -> str:
    """The end of a sentence on a word that is none of those known: the nearest of them."""
    expected = str(problem.get("ctx", {}).get("expected", "")) if problem["type"] == "literal_error" else ""
    near = difflib.get_close_matches(_text(problem["input"])[:80], re.findall(r"'([^']+)'", expected), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _step_class(name: str, data: dict[str, Any]) -> type[Section] | None:
    """The class that a step is read into, by the key that decides it; None where `data` does not say."""
    steps = data.get("steps")
    step = steps.get(name) if isinstance(steps, dict) else None
    if not isinstance(step, dict):
        return None
    return PromptStep if "optimizer" in step else WeightStep


def _keys_at(path: list[str], data: dict[str, Any]) -> list[str]:
    """Known keys of the section at `path`."""
    model: type[Section] | None = RunConfig
    if path[:1] == ["steps"]:
        model, path = _step_class(path[1], data), path[2:]
    for part in path:
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)]
        model = found[0] if found else None
    return sorted(model.model_fields) if model else []


def _got(path: list[str], value: Any) -> str:
    """What was read, unless it may be a secret that was written where a name belongs: a section is named by its keys."""
    if "proposer" in path or "options" in path or any(SECRET_NAME.search(part.removesuffix("_env")) for part in path):
        return ""
    if isinstance(value, dict):
        return f" (its keys: {', '.join(map(str, value))[:80]})"
    return f" (got {_text(value)[:80]!r})"


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # a number of thousands of digits
        return "a very long number"


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None


def _line_of(node: yaml.Node | None, path: list[str]) -> int | None:
    """1-based line of the key at `path`, or of its nearest ancestor that the document has."""
    line = None
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            break
        for key, value in node.value:
            if key.value == part:
                line, node = key.start_mark.line + 1, value
                break
        else:
            break
    return line
