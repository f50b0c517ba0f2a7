"""Everything that can be found wrong before an engine starts, each with one clear sentence."""

from __future__ import annotations

import copy
import functools
import inspect
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.data import Row, label_fields, load_splits, used_splits
from bt_ray.errors import ConfigError
from bt_ray.lm.types import Weights
from bt_ray.planning import budget_problem
from bt_ray.resources import expected_resources, refusal
from bt_ray.runs.identity import content_hash, file_sha256

METRIC_PROBES = 20  # rows that a metric is tried on
MAX_PROBE_S = 10.0  # a metric that runs code or asks a judge is tried on fewer
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
    from bt_ray.lm.models import located, resolve
    from bt_ray.rollout.call_sites import ungiven_inputs
    from bt_ray.rollout.program import check_fields, field_names, field_notes, load_metric, load_program, spec_of, unsupported
    from bt_ray.search.base import check_optimizer, source_id

    searchers = {}
    for name, step in config.steps.items():
        if isinstance(step, PromptStep):
            check_optimizer(step.optimizer, config.base_dir, step.options, step.auto or step.preset)
            searchers[name] = source_id(step.optimizer, config.base_dir)
    resources = expected_resources(config.cluster)
    if resources is not None and (reason := refusal(config, resources)):
        raise ConfigError(reason)
    splits = splits or load_splits(config.data, config.base_dir, config.seed)
    spec = spec_of(config, pickle_path)
    program = load_program(spec) if program is None else program
    metric = load_metric(spec)
    labels = label_fields(splits["train"])
    if problems := (
        unsupported(program) or check_fields(program, splits["train"][0]["inputs"], labels) or ungiven_inputs(program)
    ):
        raise ConfigError(" ".join(problems))
    probe_metric(metric, splits["train"])
    if config.controls.tfidf and config.controls.tfidf not in labels:
        raise ConfigError(f"controls.tfidf: the examples have no label {config.controls.tfidf!r}; they have {', '.join(labels)}.")
    weights = base_weights(config, list(field_names(program)))
    for model, _ in config.engines_beside():  # made and checked now, not when their step comes
        resolve(located(model, config.base_dir))
    check_targets(config, weights)
    identity = {
        "program": program_identity(program),
        "metric": object_identity(metric.function),
        "weights": weights.to_json(),
        "model": weights.id,
        "splits": {name: content_hash(rows) for name, rows in splits.items()},
        "vanilla": _vanilla(program),
        "signatures": field_names(program),
        "field_notes": field_notes(program),
        "code": source_of(type(program)),
        "follow": follow_example(splits["train"]),
        "pickle_path": pickle_path,
        "searchers": {name: source for name, source in searchers.items() if source},
    }
    check_context(config, program, used_splits(config, splits), weights)
    check_budget(config, splits, identity)
    return Prepared(config, splits, identity)


def base_weights(config: RunConfig, predictors: list[str]) -> Weights:
    """What the program starts from: the base weights of its model, or of its several. ConfigError, ModelError."""
    from bt_ray.lm.models import located, resolve
    from bt_ray.lm.weights import combined

    own = resolve(located(config.model, config.base_dir))
    parts = []
    for glob, name in config.assign.items():
        if not any(fnmatchcase(predictor, glob) for predictor in predictors):
            raise ConfigError(f"assign.{glob}: no predictor of the program matches; it has {', '.join(predictors)}.")
        part = resolve(located(config.models[name].model, config.base_dir))
        parts.append((glob, replace(part, model=name)))
    return combined([*parts, ("*", own)]) if parts else own


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


def check_targets(config: RunConfig, weights: Weights) -> None:
    """Refuse LoRA targets and layers that are in none of the models that a weight step tunes."""
    from bt_ray.lm.modules import adapter_problem, linear_names

    models = [part for _, part in weights.parts] or [weights]
    for name, step in config.steps.items():
        if isinstance(step, WeightStep) and step.tuning == "lora":
            for model in models:
                if problem := adapter_problem(step, linear_names(model.model_dir)):
                    of = f"models.{model.model}: " if model.model else ""
                    raise ConfigError(f"{of}steps.{name}.{problem}")


def check_budget(config: RunConfig, splits: dict[str, list[Row]], identity: dict[str, Any]) -> None:
    """Refuse a budget that pays for no candidate. Without a probe (`bt-ray plan`) each predictor is called once a run."""
    from bt_ray.report.probes import kept_probe

    probe = kept_probe(config, identity)
    calls_per_run = probe.calls_per_run if probe else len(identity["signatures"])
    if problem := budget_problem(config, {name: len(rows) for name, rows in splits.items()}, calls_per_run):
        raise ConfigError(problem)


def probe_metric(metric: Any, train: list[Row]) -> None:
    """Score a few rows' own labels, and those of another row, as if they were the answer; each result must be a score.

    A metric that raises here may do so for want of a field that only the program gives: that is
    left to the rollouts, where it costs its row. A name that nothing defines is no row's fault.
    """
    import dspy

    from bt_ray.rollout.runner import NoScore, score_of

    until = time.monotonic() + MAX_PROBE_S
    for number, row, other in _probes(train):
        if time.monotonic() > until:
            break
        given, answer = copy.deepcopy(row), copy.deepcopy(other["labels"])  # a metric may sort what it is given in place
        example = dspy.Example(**given["inputs"], **given["labels"]).with_inputs(*row["inputs"])
        where = f"train row {number} (id {row['id']}) answered with {'its own' if other is row else 'other'} labels"
        try:
            with dspy.context(lm=None):  # a run lends the metric its own LM; what was configured here is not asked
                value = metric(example, dspy.Prediction(**answer))
        except NameError as error:
            if place := _undefined(error):
                raise ConfigError(f"metric: {error} ({place}), on {where}. Define or import that name.") from None
            continue
        except Exception:  # the user's code; what it raises on a real prediction becomes that row's reason
            continue
        try:
            score_of(value)
        except NoScore as error:
            raise ConfigError(
                f"metric: it returned {error} for {where}. It must return a bool, a finite number, or "
                "dspy.Prediction(score=, feedback=), on every path through it."
            ) from None


def _probes(train: list[Row]) -> Iterator[tuple[int, Row, Row]]:
    """Number and row of the first rows, each with itself and with a row whose labels are others, where there is one."""
    for number, row in enumerate(train[:METRIC_PROBES], 1):
        yield number, row, row
        # From the row on, so that not all of them are answered with the same labels.
        others = (other for other in [*train[number:], *train[:number]] if other["labels"] != row["labels"])
        if other := next(others, None):
            yield number, row, other


def _undefined(error: NameError) -> str | None:
    """File and line of the code that uses a name that nothing defines. None where that is the row's fault: a branch that
    did not assign its variable, or text that the metric evaluates."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, UnboundLocalError) or place.filename == "<string>":
        return None
    return f"{place.filename}, line {place.lineno}"


def check_context(config: RunConfig, program: Any, splits: dict[str, list[Row]], weights: Weights) -> None:
    """Refuse prompts that cannot fit the context: the longest inputs of any split, with the most demos."""
    from bt_ray.lm.routed import context_of
    from bt_ray.lm.tokenize import ChatTokenizer
    from bt_ray.rollout.program import spec_of
    from bt_ray.rollout.render import longest_prompts

    tokenizer, answer = functools.cache(ChatTokenizer), config.rollout.max_tokens
    most = max(
        (max(s.max_bootstrapped_demos, s.max_labeled_demos) for s in config.steps.values() if isinstance(s, PromptStep)),
        default=0,
    )
    for num_demos in sorted({0, most}):
        for prompt in longest_prompts(spec_of(config), program, splits, num_demos):
            model_dir, context = context_of(config, weights, prompt.predictor)
            tokens = tokenizer(model_dir).count(prompt.messages)
            if tokens + answer > context:
                fewer = "max_bootstrapped_demos, max_labeled_demos or " if num_demos else ""
                raise ConfigError(
                    f"engine.max_model_len: the longest prompt of {prompt.predictor!r} ({prompt.split} row, id {prompt.row_id}) with "
                    f"{num_demos} demos takes {tokens} tokens, the answer up to {answer} (rollout.max_tokens), and the context holds "
                    f"{context}. Raise engine.max_model_len, shorten the row, or lower {fewer}rollout.max_tokens."
                )
