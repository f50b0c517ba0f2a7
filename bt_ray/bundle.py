"""The picked program, ready to be called: its prompts, its weights, an engine in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from bt_ray.config_file import YAML_FAULTS, check_small
from bt_ray.errors import ConfigError, RunDirError
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import from_record
from bt_ray.runs.run_dir import RunDir


def outcome(run: RunDir, stage_id: str | None = None) -> dict[str, Any]:
    """Record of the picked stage, or of the one named. Raises RunDirError where there is none yet."""
    if stage_id is None:
        pick = run.pick()
        if pick is None:
            raise RunDirError(f"{run.shown} has no pick yet. Let the run end: bt-ray run CONFIG --run-dir {run.shown}")
        stage_id = pick["id"]
    record = run.stage_record(stage_id)
    if record is None or record["status"] != "done":
        done = sorted(path.parent.name for path in (run.root / "stages").glob("*/record.json"))
        raise RunDirError(f"{run.shown}: stage {stage_id!r} has no outcome. Stages with one: {', '.join(done) or 'none'}.")
    return record


def weights_of(run: RunDir, record: dict[str, Any]) -> Weights:
    """Weights of a stage record, with paths on this machine."""
    return from_record(record["weights"], run.root, Weights.from_json(run.header()["identity"]["weights"]))


def load(run: RunDir, stage_id: str | None = None) -> Any:
    """The program of a stage as a dspy module that answers by itself. The engine starts on the first call."""
    from bt_ray.lm.adapter import make_adapter
    from bt_ray.lm.dspy_engine import Binding, BoundProgram, LoopThread
    from bt_ray.lm.local import LocalPool
    from bt_ray.lm.routed import pools_of
    from bt_ray.rollout.candidates import apply
    from bt_ray.rollout.program import load_program, spec_of

    record = outcome(run, stage_id)
    config, identity = run.config(), run.header()["identity"]
    program = apply(load_program(spec_of(config, identity.get("pickle_path"))), record["candidate"])
    binding = Binding(
        pool=pools_of(config, lambda _, engine: LocalPool(engine)),
        weights=weights_of(run, record),
        adapter=make_adapter(config.adapter, config.rollout.constrain),
        max_tokens=config.rollout.max_tokens,
    )
    return BoundProgram(program, binding, LoopThread())


def answer(run: RunDir, texts: list[str], stage_id: str | None = None) -> dict[str, Any]:
    """Fields of the answer to one input: the text itself where the program takes one field, else key=value texts."""
    program = load(run, stage_id)
    names = list(run.config().data.inputs)
    inputs = read_inputs(names, texts, input_types(program, names, run.examples("train")))
    return dict(program(**inputs).items())


def input_types(program: Any, names: list[str], train: list[dict[str, Any]]) -> dict[str, Any]:
    """Type of each input of a program, as its first predictor with a field of that name has it.

    An input that no predictor takes is text where the training rows hold text, else anything.
    """
    signatures = [predictor.signature for predictor in program.predictors()]
    types: dict[str, Any] = {}
    for name in names:
        found = [signature.input_fields[name].annotation for signature in signatures if name in signature.input_fields]
        is_text = all(isinstance(row["inputs"].get(name), str) for row in train)
        types[name] = found[0] if found else (str if is_text else Any)
    return types


def read_inputs(names: list[str], texts: list[str], types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Input fields from the command line. Raises ConfigError for a missing, unknown or unreadable field.

    `types`: by name; a field without one is text.
    """
    types = types or {}
    if len(names) == 1 and not (len(texts) == 1 and texts[0].startswith(f"{names[0]}=")):
        return {names[0]: _read(names[0], " ".join(texts), types.get(names[0], str))}
    inputs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"ask: {text!r} is not of the form key=value with a key of {', '.join(names)}.")
        inputs[name] = _read(name, value, types.get(name, str))
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ConfigError(f"ask: the program also needs {', '.join(missing)}; add {missing[0]}=...")
    return inputs


class _Loader(yaml.SafeLoader):
    """YAML whose dates stay text, as they are in the examples."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _value(text: str) -> Any:
    """JSON first, as examples are written in it: to YAML 1e-3 is no number. The text itself where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        check_small(text)
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ConfigError, *YAML_FAULTS):
        return text


def _read(name: str, text: str, annotation: Any) -> Any:
    """One value as the examples would hold it: of plain lists, mappings and numbers, not of the field's own class."""
    if annotation is str:
        return text
    value = _value(text)
    try:
        fits = TypeAdapter(annotation).validate_python
    except PydanticUserError:  # a type without a schema; the program will tell
        return value
    for candidate in (value, text):  # the word `yes` may be a choice, and is a truth value of YAML
        try:
            fits(candidate)
        except ValidationError:
            continue
        return candidate
    kind = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
    raise ConfigError(
        f"ask: {name} takes {kind or annotation}, and {text[:80]!r} is none. Write it as YAML, like [a, b], {{key: value}} or 3."
    )
