"""How a program's own code calls its predictors: inputs that no call gives, found without running it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator

import dspy

from bt_ray.lm.adapter import is_needed

CALLED_BY = {"acall", "aforward", "forward", "__call__"}  # methods through which a predictor is called, beside itself


def ungiven_inputs(program: dspy.Module) -> list[str]:
    """Sentences on inputs of predictors that none of the program's calls gives; an empty list means nothing was found.

    Looks at `self.NAME(field=...)` in the classes of the program. A predictor that is also used otherwise (positional or
    `**` arguments, handed on, called from elsewhere) is left out: what its calls give is not known.
    """
    problems = []
    for name, calls in _calls(type(program)).items():
        predictor = getattr(program, name, None)
        predictor = getattr(predictor, "predict", None) if isinstance(predictor, dspy.ChainOfThought) else predictor
        if not isinstance(predictor, dspy.Predict):
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
            if (used := _attribute(node)) is not None:
                uses[used] += 1
            if isinstance(node, ast.Call) and (name := _called(node.func)) is not None:
                given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                if not node.args and len(given) == len(node.keywords):
                    calls[name].append(given)
    return {name: found for name, found in calls.items() if len(found) == uses[name]}


def _sources(cls: type) -> Iterator[ast.AST]:
    """Syntax trees of a class and of those of its bases that are not dspy's; of none whose source cannot be read."""
    for one in cls.__mro__:
        if one is object or one.__module__.split(".")[0] == "dspy":
            continue
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(one)))
        except (OSError, TypeError, SyntaxError):  # made in a shell, or by a function
            continue


def _called(function: ast.expr) -> str | None:
    """NAME where `self.NAME(...)` or `self.NAME.acall(...)` is called."""
    if isinstance(function, ast.Attribute) and function.attr in CALLED_BY:
        return _attribute(function.value)
    return _attribute(function)


def _attribute(node: ast.AST) -> str | None:
    """NAME of a `self.NAME` that is read."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node.ctx, ast.Load) else None  # type: ignore[attr-defined]
