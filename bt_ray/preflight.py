"""Everything that can be found wrong before an engine starts, each with one clear sentence."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.data import Row, load_splits
from bt_ray.errors import ConfigError
from bt_ray.resources import expected_resources, refusal
from bt_ray.runs.identity import content_hash, file_sha256

METRIC_PROBES = 3
MAX_SOURCE = 6000  # characters of the program's class that a proposer is shown
PLAIN = (str, int, float, bool, type(None), list, tuple, dict)  # values whose repr says all of them


@dataclass(frozen=True)
class Prepared:
    """A config that was found runnable: its examples and the identity of all its parts."""

    config: RunConfig
    splits: dict[str, list[Row]]
    identity: dict[str, Any]


def prepare(
    config: RunConfig, splits: dict[str, list[Row]] | None = None, pickle_path: str | None = None, program: Any = None
) -> Prepared:
    """Check program, metric, data, model and resources. Raises ConfigError and its kin.

    `program`: an instance whose prompts are the vanilla ones, in place of the config's own.
    """
    from bt_ray.lm.models import resolve
    from bt_ray.rollout.program import check_fields, field_names, load_metric, load_program, spec_of, unsupported
    from bt_ray.search.base import check_optimizer

    for step in config.steps.values():
        if isinstance(step, PromptStep):
            check_optimizer(step.optimizer, config.base_dir, step.options)
    resources = expected_resources(config.cluster)
    if resources is not None and (reason := refusal(config, resources)):
        raise ConfigError(reason)
    splits = splits or load_splits(config.data, config.base_dir, config.seed)
    spec = spec_of(config, pickle_path)
    program = load_program(spec) if program is None else program
    metric = load_metric(spec)
    first = splits["train"][0]
    if problems := unsupported(program) or check_fields(program, first["inputs"], first["labels"]):
        raise ConfigError(" ".join(problems))
    probe_metric(metric, splits["train"])
    if config.controls.tfidf and config.controls.tfidf not in first["labels"]:
        raise ConfigError(
            f"controls.tfidf: the examples have no label {config.controls.tfidf!r}; they have {', '.join(first['labels'])}."
        )
    weights = resolve(config.model)
    check_targets(config, weights.model_dir)
    identity = {
        "program": program_identity(program),
        "metric": object_identity(metric.function),
        "weights": weights.to_json(),
        "model": weights.id,
        "splits": {name: content_hash(rows) for name, rows in splits.items()},
        "vanilla": _vanilla(program),
        "signatures": field_names(program),
        "code": source_of(type(program)),
        "follow": follow_example(splits["train"]),
        "pickle_path": pickle_path,
    }
    check_context(config, program, splits["train"], weights.model_dir)
    return Prepared(config, splits, identity)


def _vanilla(program: Any) -> dict[str, Any]:
    from bt_ray.rollout.candidates import extract

    return extract(program)


def follow_example(train: list[Row]) -> str:
    """The train example shown through all stages: of middle length, so that it is like most."""
    by_length = sorted(train, key=lambda row: (len(str(row["inputs"])), row["id"]))
    return str(by_length[len(by_length) // 2]["id"])


def program_identity(program: Any) -> str:
    """Hash of a program: its class, and name, type and description of every predictor's fields.

    A factory may build one class with other fields. Types count by their JSON schema, which does
    not depend on how the user's file was imported.
    """
    from bt_ray.rollout.program import predictor_signatures

    fields = {
        name: {
            field: [schema_of(info.annotation), str((info.json_schema_extra or {}).get("desc"))]
            for field, info in signature.fields.items()
        }
        for name, signature in predictor_signatures(program).items()
    }
    identity = {"class": object_identity(type(program)), "fields": fields}
    if fixed := fixed_prompts(program):
        identity["fixed"] = fixed
    return content_hash(identity)


def fixed_prompts(program: Any) -> dict[str, Any]:
    """Instructions and demos of predictors in frozen modules: no candidate holds them, so the identity does."""
    import dspy

    named = {id(predictor) for _, predictor in program.named_predictors()}
    return {
        path: [module.signature.instructions, [str(demo) for demo in module.demos]]
        for path, module in program.named_sub_modules(dspy.Predict)
        if id(module) not in named
    }


def source_of(thing: Any) -> str:
    """Source text of a class, for an LM that reads it; "" where there is none."""
    try:
        return inspect.getsource(thing)[:MAX_SOURCE]
    except (OSError, TypeError):
        return ""


def schema_of(annotation: Any) -> Any:
    """JSON schema of a field's type; the name of a type that has none."""
    try:
        return TypeAdapter(annotation).json_schema()
    except PydanticUserError:
        return getattr(annotation, "__qualname__", str(annotation))


def object_identity(thing: Any) -> str:
    """Hash of a class or function: its qualified name and the source file that defines it.

    The same for a program named in YAML and passed from Python. Objects of a notebook, without a
    file, are known by their own source; a partial or an object that is called, by its function or
    class and the values that it holds.
    """
    if isinstance(thing, functools.partial):
        return content_hash([object_identity(thing.func), repr(thing.args), repr(sorted(thing.keywords.items()))])
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        held = {name: value for name, value in sorted(getattr(thing, "__dict__", {}).items()) if isinstance(value, PLAIN)}
        return content_hash([object_identity(type(thing)), repr(held)])
    try:
        path = inspect.getsourcefile(thing)
        source = file_sha256(path) if path and Path(path).is_file() else content_hash(inspect.getsource(thing))
    except (OSError, TypeError):
        source = "no source"
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return content_hash({"name": name, "source": source})


def check_targets(config: RunConfig, model_dir: str) -> None:
    """Refuse LoRA targets that match no layer of the model. A text other than all-linear is a pattern of PEFT's own."""
    from bt_ray.lm.modules import linear_names, unmatched_targets

    for name, step in config.steps.items():
        if isinstance(step, WeightStep) and step.tuning == "lora" and not isinstance(step.target_modules, str):
            problem = unmatched_targets(step.target_modules, linear_names(model_dir))
            if problem:
                raise ConfigError(f"steps.{name}.{problem}")


def probe_metric(metric: Any, train: list[Row]) -> None:
    """Score the labels of a few rows as if they were the answer; the result must be a number.

    A metric that raises here may do so for want of a field that only the program gives: that is
    left to the rollouts, where it costs its row.
    """
    import dspy

    for number, row in enumerate(train[:METRIC_PROBES], 1):
        example = dspy.Example(**row["inputs"], **row["labels"]).with_inputs(*row["inputs"])
        try:
            value = metric(example, dspy.Prediction(**row["labels"]))
        except Exception:  # the user's code; what it raises on a real prediction becomes that row's reason
            continue
        score = getattr(value, "score", value)
        if isinstance(score, bool):
            continue
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ConfigError(
                f"metric: it returned {score!r} for train row {number} (id {row['id']}). It must return a bool, a finite number, "
                "or dspy.Prediction(score=, feedback=)."
            )


def check_context(config: RunConfig, program: Any, train: list[Row], model_dir: str) -> None:
    """Refuse prompts that cannot fit the context: the longest example with the most demos."""
    from bt_ray.lm.tokenize import ChatTokenizer
    from bt_ray.rollout.program import spec_of
    from bt_ray.rollout.render import longest_prompts

    tokenizer = ChatTokenizer(model_dir)
    context, answer = config.engine.max_model_len, config.rollout.max_tokens
    most = max(
        (max(s.max_bootstrapped_demos, s.max_labeled_demos) for s in config.steps.values() if isinstance(s, PromptStep)),
        default=0,
    )
    for num_demos in (0, most):
        for name, messages in longest_prompts(spec_of(config), program, train, num_demos).items():
            tokens = tokenizer.count(messages)
            if tokens + answer > context:
                raise ConfigError(
                    f"engine.max_model_len: the longest prompt of {name!r} with {num_demos} demos takes {tokens} tokens, the answer up to "
                    f"{answer} (rollout.max_tokens), and the context holds {context}. Raise engine.max_model_len, or lower "
                    "max_bootstrapped_demos, max_labeled_demos or rollout.max_tokens."
                )
