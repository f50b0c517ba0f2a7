"""Candidates: the prompts of a program as plain JSON, taken from it and put onto copies of it."""

from __future__ import annotations

import copy
import types
from typing import Any

import dspy
from dspy.primitives.base_module import BaseModule

from bt_ray.errors import ConfigError
from bt_ray.lm.call_context import PREDICTOR_TAG
from bt_ray.lm.fields import jsonable
from bt_ray.lm.types import FIXED
from bt_ray.rollout.tasks import candidate_id

__all__ = ["apply", "candidate_id", "copy_program", "extract"]


def extract(program: dspy.Module) -> dict[str, Any]:
    """Instruction and demos of each named predictor: {"predictors": {name: {"instructions", "demos"}}}.

    Demos keep the fields of the predictor's signature, as JSON values. Predictors of frozen modules
    (`_compiled = True`) are none of them: DSPy does not name their parameters.
    """
    predictors = {}
    for name, predictor in program.named_predictors():
        known = predictor.signature.fields
        demos = [{key: jsonable(demo[key]) for key in known if key in demo} for demo in predictor.demos]
        predictors[name] = {"instructions": predictor.signature.instructions, "demos": demos}
    return {"predictors": predictors}


def apply(program: dspy.Module, candidate: dict[str, Any]) -> dspy.Module:
    """A copy of the program with the candidate's prompts, without LMs, its predictors named.

    Predictors that the candidate leaves out keep their prompts. Those that DSPy does not name (of
    frozen modules) keep theirs too, and their calls are recorded as `(fixed) path`. Raises
    ConfigError for a predictor that the program does not have.
    """
    program = copy_program(program)
    named = dict(program.named_predictors())
    for name, state in candidate["predictors"].items():
        if name not in named:
            raise ConfigError(
                f"The candidate has prompts for predictor {name!r}, but the program's are {', '.join(named) or 'none'}. It was "
                "made with another program; start again from that program."
            )
        named[name].signature = named[name].signature.with_instructions(state["instructions"])
        named[name].demos = [dspy.Example(**demo) for demo in state["demos"]]
    for path, module in list(program.named_sub_modules(dspy.Predict)):
        module.lm = None  # every call goes to the pool, whatever LM the user set while writing the program
        setattr(module, PREDICTOR_TAG, f"{FIXED} {path.removeprefix('self.')}")
    for name, predictor in named.items():
        setattr(predictor, PREDICTOR_TAG, name)
    return program


def copy_program(program: dspy.Module) -> dspy.Module:
    """A deep copy of the modules that shares what else the program holds.

    A retriever's index or a table of a gigabyte is not copied with every candidate.
    """
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    _share(program, memo, seen)
    return copy.deepcopy(program, memo)


def _share(module: BaseModule, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter into `memo` the attributes below `module` that deepcopy shall return as they are."""
    seen.add(id(module))
    own = ("demos", "traces", "train", "config", "fields") if isinstance(module, dspy.Predict) else ()
    for name, value in vars(module).items():
        if name in own:
            continue
        if not _holds_modules(value, memo, seen):
            memo[id(value)] = value


def _holds_modules(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    if isinstance(value, BaseModule):
        if id(value) not in seen:
            _share(value, memo, seen)
        return True
    if isinstance(value, dspy.Tool):
        return _holds_modules(value.func, memo, seen)
    if isinstance(value, types.MethodType):
        return _holds_modules(value.__self__, memo, seen)
    items = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else []
    found = [_holds_modules(item, memo, seen) for item in items]  # all of them: each enters what it shares
    return any(found)
