"""Reads a config file: YAML, overrides, and one clear sentence per problem.

`load` reads and checks; it changes nothing on disk.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from bt_ray.config import PromptStep, RunConfig, Section, WeightStep
from bt_ray.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000


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
        raise ConfigError(explain(error, text, str(path))) from None


def with_overrides(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """A config with `key.sub=value` overrides. Raises ConfigError."""
    data = config.model_dump(mode="json", exclude_unset=True)
    for item in overrides:
        _override(data, item)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "", "--set")) from None


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"config: {path} uses YAML aliases (*name), which a config does not need. Write the values out.")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config: {path} is no valid YAML{where}: {getattr(error, 'problem', error)}. Mend that line."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"config: {path} holds no mapping of keys. Start with `program: module:Class`.")
    return data


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
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item!r}: the value is no valid YAML.") from None


def explain(error: ValidationError, text: str, where: str) -> str:
    """One sentence per problem: what, at which line, what to do."""
    sentences = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"] if part not in ("PromptStep", "WeightStep", "function-before")]
        line = _line_of(text, path)
        at = f"{where}, line {line}" if line else where
        name = ".".join(path)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _keys_at(path[:-1]), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_keys_at(path[:-1]))}"
            sentences.append(f"config: {at}: unknown key {name!r}; {hint}")
        elif problem["type"] == "missing":
            sentences.append(f"config: {at}: the key {name!r} is missing; add it.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"config: {at}: {name or 'config'}: {message} (got {str(problem['input'])[:80]!r}).")
    return "\n".join(sentences)


def _keys_at(path: list[str]) -> list[str]:
    """Known keys of the section at `path`."""
    model: Any = RunConfig
    for part in path:
        if model is RunConfig and part == "steps":
            return sorted({*PromptStep.model_fields, *WeightStep.model_fields})
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)]
        if not found:
            return []
        model = found[0]
    return sorted(model.model_fields)


def _line_of(text: str, path: list[str]) -> int | None:
    """1-based line of the key at `path`, or of its nearest ancestor that the text has."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
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
