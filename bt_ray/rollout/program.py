"""The user's program and metric: found, loaded and checked, with an error that says what to mend."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import dspy
from dspy.adapters.utils import get_annotation_name
from dspy.primitives.code_interpreter import resolve_interpreter_factory as interpreter_of

from bt_ray.config import RunConfig
from bt_ray.errors import ConfigError
from bt_ray.rollout.metric import Metric

MEDIA = (dspy.Image, dspy.Audio, dspy.File)  # the models read text only


@dataclass(frozen=True)
class ProgramSpec:
    """Where program and metric are, and how the program is run. Picklable, plain values."""

    program: str  # module:attr or path/to/file.py:attr
    metric: str
    adapter: str = "chat"
    constrain: bool = False
    base_dir: str = "."
    metric_threshold: float | None = None
    timeout_s: float = 120.0
    pickle_path: str | None = None  # a file of pickle_program; then the two references are not read


def load_program(spec: ProgramSpec) -> dspy.Module:
    """The user's program, a dspy.Module instance. Raises ConfigError."""
    if spec.pickle_path:
        _importable(spec.base_dir)
        return _unpickle(spec.pickle_path)["program"]
    found = resolve(spec.program, spec.base_dir, "program")
    if isinstance(found, dspy.Module):
        return found
    if not callable(found):
        raise ConfigError(
            f"program {spec.program!r} is a {type(found).__name__}; name a dspy.Module class, an instance of one, "
            "or a function that makes one."
        )
    needed = _required(found)
    if needed:
        raise ConfigError(
            f"program {spec.program!r} needs arguments ({', '.join(needed)}). Give them defaults, or name a function "
            "without arguments that makes the program."
        )
    try:
        program = found()
    except Exception as error:
        raise ConfigError(f"program {spec.program!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(program, dspy.Module):
        raise ConfigError(
            f"program {spec.program!r} gives a {type(program).__name__}, no dspy.Module. Let its class derive from dspy.Module."
        )
    return program


def load_metric(spec: ProgramSpec) -> Metric:
    """The user's metric, ready to be called. Raises ConfigError where it cannot take (example, prediction)."""
    if spec.pickle_path:
        _importable(spec.base_dir)
        return Metric.of(_unpickle(spec.pickle_path)["metric"], "metric")
    found = resolve(spec.metric, spec.base_dir, "metric")
    return Metric.of(found, f"metric {spec.metric!r}")


def resolve(reference: str, base_dir: str, what: str) -> Any:
    """The object of `module:attr` or `path/to/file.py:attr`. Raises ConfigError.

    `base_dir` is where relative paths start from; it joins sys.path, so that the user's file may
    import the files beside it.
    """
    where, colon, attribute = reference.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigError(f"{what} {reference!r} is not of the form module:attr or path/to/file.py:attr.")
    _importable(base_dir)
    found = _load_file(Path(base_dir, where), what, reference) if where.endswith(".py") else _load_module(where, what, reference)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = sorted(name for name in getattr(found, "__dict__", {}) if not name.startswith("_"))
            raise ConfigError(f"{what} {reference!r}: {where} has no {part!r}. It has: {', '.join(names[:20]) or 'nothing'}.")
        found = getattr(found, part)
    return found


def _importable(base_dir: str) -> None:
    """The user's files may import those beside them."""
    folder = str(Path(base_dir).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def predictor_signatures(program: dspy.Module) -> dict[str, type[dspy.Signature]]:
    """Signature of each named predictor, in the program's order."""
    return {name: predictor.signature for name, predictor in program.named_predictors()}


def field_names(program: dspy.Module) -> dict[str, dict[str, list[str]]]:
    """Field names of each named predictor: {predictor: {"inputs": [...], "outputs": [...]}}."""
    return {
        name: {"inputs": list(signature.input_fields), "outputs": list(signature.output_fields)}
        for name, signature in predictor_signatures(program).items()
    }


def field_notes(program: dspy.Module) -> dict[str, dict[str, str]]:
    """What the signatures say of their fields beside the names: {predictor: {field: "one of ...; description"}}.

    A field of plain text without a description has no note.
    """
    return {
        name: {field: note for field, info in signature.fields.items() if (note := _note(field, info))}
        for name, signature in predictor_signatures(program).items()
    }


def _note(name: str, field: Any) -> str:
    kind = "" if field.annotation is str else get_annotation_name(field.annotation)
    if get_origin(field.annotation) is Literal:
        kind = f"one of {', '.join(map(str, get_args(field.annotation)))}"
    description = (field.json_schema_extra or {}).get("desc", "")
    return "; ".join(part for part in (kind, "" if description == f"${{{name}}}" else description) if part)


def check_fields(program: dspy.Module, inputs: Iterable[str], labels: Iterable[str]) -> list[str]:
    """What is wrong between the data's fields and the program, as far as it can be known.

    Known are the parameters of the program's own `forward`, and the fields of a program that is
    one predictor. Returns sentences; an empty list means nothing was found.
    """
    given, others = list(inputs), set(labels)
    method = getattr(type(program), "aforward", None) or type(program).forward
    parameters = list(inspect.signature(method).parameters.values())[1:]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    known = {p.name for p in named}
    predictors = program.predictors()
    if open_ended and isinstance(program, (dspy.Predict, dspy.ChainOfThought)) and len(predictors) == 1:
        fields = predictors[0].signature.input_fields
        needed, known, open_ended = [name for name, field in fields.items() if field.is_required()], set(fields), False
    problems = []
    for name in needed:
        if name not in given:
            hint = (
                "it is a label; list it under data.inputs" if name in others else "add the field to the data and to data.inputs"
            )
            problems.append(f"The program needs the input {name!r}, which data.inputs does not list; {hint}.")
    for name in given:
        if not open_ended and name not in known:
            takes = ", ".join(sorted(known)) or "nothing"
            problems.append(f"data.inputs lists {name!r}, which the program does not take; it takes {takes}.")
    return problems


def unsupported(program: dspy.Module) -> list[str]:
    """What of a program cannot be run, each with its place; empty where nothing was found. docs/programs.md lists the rest."""
    lms = [_lm_key(predictor) for predictor in program.predictors()]
    problems = [] if lms else ["The program has no predictor to improve; add a dspy.Predict, in a module that is not frozen."]
    if isinstance(program, (dspy.CodeAct, dspy.RLM)):  # the one awaits predictors it lacks, the other blocks the loop it asks on
        problems.append(f"{type(program).__name__} cannot be awaited, as programs are; call it in the `forward` of a module.")
    deno = shutil.which("deno") or importlib.util.find_spec("deno")
    for path, module in program.named_sub_modules(dspy.Module):
        where = f"{type(module).__name__} {path.removeprefix('self.')!r}"
        if module.callbacks:
            problems.append(f"{where}: a module's callbacks are lost when it is copied; use dspy.configure(callbacks=[...]).")
        if (code := vars(module).get("_interpreter_factory")) and not deno and interpreter_of(code) is dspy.PythonInterpreter:
            problems.append(f"{where} needs Deno to run code: pip install 'dspy[deno]', or give it an interpreter_factory.")
        for field, info in (module.signature.fields if isinstance(module, dspy.Predict) else {}).items():
            media = [kind for kind in MEDIA if kind.extract_custom_type_from_annotation(info.annotation)]
            problems += [f"{where}, field {field!r} is a dspy.{kind.__name__}; the models read text only." for kind in media]
        if isinstance(module, dspy.Predict) and module.lm is not None and set(lms) != {_lm_key(module)}:
            problems.append(f"{where} has an LM that others lack; remove `lm`, or call it under dspy.context(lm=...).")
    return problems


def _lm_key(predictor: dspy.Predict) -> str:
    return repr((getattr(predictor.lm, "model", predictor.lm), getattr(predictor.lm, "kwargs", None)))


def pickle_program(program: dspy.Module, metric: Callable[..., Any], folder: str) -> str:
    """Write program and metric that no reference can name (made in a notebook) for this user's own workers.

    Returns the path; its name carries the content's hash, which loading checks. Only the owner may
    read the file back: unpickling runs code.
    """
    import cloudpickle

    Metric.of(metric, "metric")
    data = cloudpickle.dumps({"program": program, "metric": metric})
    path = Path(folder, f"program-{hashlib.sha256(data).hexdigest()[:16]}.pkl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return str(path)


def _unpickle(path: str) -> dict[str, Any]:
    import cloudpickle

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"program: there is no file {path}. It was written when the run started; start the run again.")
    if file.is_symlink():
        raise ConfigError(
            f"program: {path} is a symbolic link, and reading it would run code from elsewhere. Start the run again."
        )
    if file.stat().st_uid != os.getuid():
        raise ConfigError(
            f"program: {path} belongs to another user, and reading it would run their code. Start a run of your own."
        )
    if file.stat().st_mode & 0o022:
        raise ConfigError(f"program: others may write to {path}, and reading it would run their code. Start the run again.")
    data = file.read_bytes()
    if file.stem != f"program-{hashlib.sha256(data).hexdigest()[:16]}":
        raise ConfigError(f"program: {path} does not hold what its name says. It was changed; start the run again.")
    return cloudpickle.loads(data)


def _load_file(path: Path, what: str, reference: str) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"{what} {reference!r}: there is no file {path}. Paths start from the config's folder.")
    name = f"bt_ray_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what} {reference!r}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{what} {reference!r}: importing {path} fails with {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, what: str, reference: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{what} {reference!r}: there is no module {error.name!r}. Install it, or name a file as path/to/file.py:attr."
            ) from None
        raise ConfigError(f"{what} {reference!r}: importing {name} fails with {type(error).__name__}: {error}") from error


def _required(function: Callable[..., Any]) -> list[str]:
    # dspy's metaclass hides a module's parameters behind (*args, **kwargs); its __init__ has them.
    target = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    try:
        parameters = list(inspect.signature(target).parameters.values())[1 if inspect.isclass(function) else 0 :]
    except (TypeError, ValueError):  # builtins have no signature; calling them tells
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def spec_of(config: RunConfig, pickle_path: str | None = None) -> ProgramSpec:
    """The spec that a run's config asks for."""
    rollout = config.rollout
    return ProgramSpec(
        program=config.program,
        metric=config.metric,
        adapter=config.adapter,
        constrain=rollout.constrain,
        base_dir=config.base_dir,
        metric_threshold=rollout.metric_threshold,
        timeout_s=rollout.timeout_s,
        pickle_path=pickle_path,
    )
