"""How a program's own code calls its predictors: inputs that no call gives, found without running it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter, defaultdict

import dspy

from bt_ray.lm.adapter import is_needed

ITSELF = "self"  # in the count of uses: the program as a whole
ALL_OF_THEM = {"__dict__", "named_predictors", "predictors", "named_sub_modules", "map_named_predictors"}
CALLED_BY = {"acall", "aforward", "forward", "__call__"}  # methods through which a predictor is called, beside itself


def ungiven_inputs(program: dspy.Module) -> list[str]:
    """Sentences on inputs of predictors that none of the program's calls gives; an empty list means nothing was found.

    Looks at `self.NAME(field=...)` in the classes of the program. A predictor that is also used otherwise (positional or
    `**` arguments, another signature, handed on) is left out: what its calls give is not known. Nothing is known of a
    program one of whose classes cannot be read, or that hands itself or all of its predictors on.
    """
    problems = []
    for name, calls in _calls(type(program)).items():
        predictor = vars(program).get(name)
        predictor = predictor.predict if type(predictor) is dspy.ChainOfThought else predictor
        if type(predictor) is not dspy.Predict or any("signature" in given for given in calls):
            continue
        needed = [field for field, info in predictor.signature.input_fields.items() if is_needed(info)]
        missing = [field for field in needed if not any(field in given for given in calls)]
        if missing:
            problems.append(
                f"The predictor {name!r} needs the input {', '.join(map(repr, missing))}, and no call of it in "
                f"{type(program).__name__} gives it; pass it, or give the field a default."
            )
    return problems


def _calls(cls: type) -> dict[str, list[set[str]]]:
    """Keyword arguments of each call of `self.NAME`, for names of which every use is such a call."""
    calls: dict[str, list[set[str]]] = defaultdict(list)
    uses: Counter[str] = Counter()
    for tree in _sources(cls):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "self":
                uses[ITSELF] += 1
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                uses[ITSELF] -= node.attr not in ALL_OF_THEM  # no use of the whole
            if (used := _attribute(node)) is not None:
                uses[used] += 1
            if isinstance(node, ast.Call) and (name := _called(node.func)) is not None:
                given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                if not node.args and len(given) == len(node.keywords):
                    calls[name].append(given)
    return {name: found for name, found in calls.items() if len(found) == uses[name] and not uses[ITSELF]}


def _sources(cls: type) -> list[ast.AST]:
    """Syntax trees of a class and of those of its bases that are not dspy's; none where the source of one cannot be read."""
    own = [one for one in cls.__mro__ if one is not object and one.__module__.split(".")[0] != "dspy"]
    try:
        return [ast.parse(textwrap.dedent(inspect.getsource(one))) for one in own]
    except (OSError, TypeError, SyntaxError):  # made in a shell, or by a function
        return []


def _called(function: ast.expr) -> str | None:
    """NAME where `self.NAME(...)` or `self.NAME.acall(...)` is called."""
    if isinstance(function, ast.Attribute) and function.attr in CALLED_BY:
        return _attribute(function.value)
    return _attribute(function)


def _attribute(node: ast.AST) -> str | None:
    """NAME of a `self.NAME` that is read."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node.ctx, ast.Load) else None  # type: ignore[attr-defined]
