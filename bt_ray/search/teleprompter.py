"""DSPy's own optimisers (`optimizer: dspy.SIMBA`), or any class that derives from their Teleprompter.

Such an optimiser runs the program itself, in the stage's process with the pool's LM, over the
training and search examples. What it compiles is one candidate beside the incoming prompts, the
student's and none: the search scores them like any other. An optimiser that draws without a seed
compiles something else when it is run again after a crash.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter
from dspy.utils.exceptions import AdapterParseError

from bt_ray.errors import CandidateError, ConfigError
from bt_ray.rollout.session import PROPOSER_KEY
from bt_ray.search.base import Candidate, Proposal, SearchContext
from bt_ray.search.demos import with_demos

# Arguments that the search gives, or that stay at their default: the program's LM, or the step's proposer.
OURS = ("student", "metric", "trainset", "devset", "valset", "teacher", "prompt_model", "task_model", "reflection_lm")
# Bases, or names, of optimisers that train weights.
WEIGHT_TUNERS = ("FinetuneTeleprompter", "BetterTogether", "GRPO")


@dataclass(frozen=True)
class TeleprompterFactory:
    """Makes the searcher around one class of optimiser. `name` is how the config calls it.

    Raises ConfigError for a class that trains weights.
    """

    name: str
    kind: type[Any]

    def __post_init__(self) -> None:
        _refuse_weight_tuners(self.name, *(base.__name__ for base in self.kind.__mro__))

    def __call__(self, context: SearchContext) -> TeleprompterSearcher:
        self.check_options(context.step.options)
        if context.compile is None:
            raise ConfigError(
                f"optimizer: {self.name} runs the program itself, and this search lends it none. Take `random_fewshot`."
            )
        return TeleprompterSearcher(self, context)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigError where the class cannot be called with these options."""
        takes = {method: parameters(self.kind, method) for method in ("__init__", "compile")}
        if "student" not in takes["compile"]:
            raise ConfigError(f"optimizer: {self.name} compiles no single program (`student`), so it cannot optimise one here.")
        free = [name for known in takes.values() for name in known if name not in OURS]
        for name in options:
            if name in OURS:
                raise ConfigError(
                    f"options.{name}: the search sets this argument of {self.name} itself. Yours are: {', '.join(free)}."
                )
            if name not in free:
                near = difflib.get_close_matches(name, free, n=1, cutoff=0.0)
                hint = f"did you mean {near[0]!r}? It takes {', '.join(free)}." if near else "It takes none."
                raise ConfigError(f"options.{name}: {self.name} has no such argument; {hint}")
        for known in takes.values():
            lacking = [name for name, needed in known.items() if needed and name not in (*options, *OURS)]
            if lacking:
                raise ConfigError(f"optimizer: {self.name} needs {', '.join(lacking)}. Give them under the step's `options`.")

    def compile(
        self, context: SearchContext, program: Any, metric: Callable[..., Any], examples: tuple[list[Any], list[Any]]
    ) -> Any:
        """The program that the optimiser returns. `examples`: training and search examples.

        Each argument goes where it is taken: to the constructor, else to `compile`. Runs inside the
        session, because constructors look for the LM in DSPy's settings.
        """
        given = {"metric": metric, "trainset": examples[0], "devset": examples[0], "valset": examples[1]}
        given["seed"] = random.Random(f"{context.seed}/teleprompter").randrange(2**31)
        made_with = parameters(self.kind, "__init__")
        writes = {"temperature": context.step.proposer_temperature, "max_tokens": context.step.proposer_max_tokens}
        other = dspy.settings.get(PROPOSER_KEY)
        if other is not None:
            given["prompt_model"] = other.copy(**writes)
        if "reflection_lm" in made_with:
            given["reflection_lm"] = (other or dspy.settings.lm).copy(**writes)
        given |= context.step.options
        optimiser = self.kind(**{name: value for name, value in given.items() if name in made_with})
        split = [name for name in given if name in made_with and name in context.step.options]
        compiled_with = [name for name in parameters(self.kind, "compile") if name in given and name not in split]
        return optimiser.compile(program, **{name: given[name] for name in compiled_with})


class TeleprompterSearcher:
    """Proposes `incoming`, `student`, `zero_shot`, and what the optimiser compiled."""

    def __init__(self, factory: TeleprompterFactory, context: SearchContext) -> None:
        self._factory, self._context = factory, context
        first: list[Proposal] = [
            {"label": "incoming", "candidate": context.incoming or context.student},
            {"label": "student", "candidate": context.student},
            {"label": "zero_shot", "candidate": with_demos(context.student, {})},
        ]
        self._left = [proposal for place, proposal in enumerate(first) if _is_new(proposal, first[:place])]
        self._compiled = False
        self.notes: list[str] = []

    def propose(self) -> Proposal | None:
        """Blocks in the compile, while the first candidates are scored. Raises what it raises;
        ConfigError where the optimiser refuses its arguments or returns another program."""
        if self._left:
            return self._left.pop(0)
        if self._compiled:
            return None
        self._compiled = True
        try:
            candidate = self._compile()
        except AdapterParseError as error:  # raised where an optimiser cannot read what the LM proposes
            answer = str(getattr(error, "lm_response", ""))[:80]
            self.notes.append(
                f"{self._factory.name} gave up: it could not read the LM's proposal ({answer!r}), so it compiled nothing."
            )
            return None
        except CandidateError as error:
            self.notes.append(f"The program that {self._factory.name} compiled was refused: {error}.")
            return None
        if candidate == self._context.student:
            self.notes.append(f"{self._factory.name} returned the prompts that it started from.")
        return {"label": self._factory.name, "candidate": candidate}

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        """Scores change nothing here: the optimiser has its own."""

    def finished(self) -> bool:
        return self._compiled

    def _compile(self) -> Candidate:
        def work(program: Any, metric: Callable[..., Any], trainset: list[Any], valset: list[Any]) -> Any:
            return self._factory.compile(self._context, program, metric, (trainset, valset))

        assert self._context.compile is not None  # the factory has looked
        try:
            return self._context.compile(work)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"optimizer: {self._factory.name} stopped with {type(error).__name__}: {error}. Change the step's `options`, or the data."
            ) from error


def named(name: str) -> TeleprompterFactory:
    """The optimiser that `dspy.X` names. Raises ConfigError with the nearest name."""
    short = name.removeprefix("dspy.")
    _refuse_weight_tuners(name, short)
    found: Any = getattr(dspy, short, None) or getattr(dspy.teleprompt, short, None)
    if not is_teleprompter(found):
        places = (dspy, dspy.teleprompt)
        known = sorted({key for place in places for key, value in vars(place).items() if is_teleprompter(value)})
        near = difflib.get_close_matches(short, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"optimizer: dspy has no optimiser {short!r}; did you mean 'dspy.{near[0]}'? There is {', '.join(known)}."
        )
    return TeleprompterFactory(name, found)


def is_teleprompter(thing: Any) -> bool:
    """Whether it is a class of optimiser, other than the base itself."""
    return inspect.isclass(thing) and issubclass(thing, Teleprompter) and thing is not Teleprompter


def _refuse_weight_tuners(name: str, *bases: str) -> None:
    """Raise ConfigError where one of the class names is that of an optimiser that trains weights."""
    if any(base in WEIGHT_TUNERS for base in bases):
        raise ConfigError(
            f"optimizer: {name} trains weights. That is a step of its own: give it `method` instead of `optimizer`."
        )


def parameters(kind: type[Any], method: str) -> dict[str, bool]:
    """Names that a method takes, and whether it needs them.

    Where it passes **kwargs on, those of the next base that defines the method count too. Names
    that would only vanish in **kwargs do not count, so that a misspelt option is found.
    """
    found: dict[str, bool] = {}
    for base in kind.__mro__:
        function = vars(base).get(method)
        if function is None:
            continue
        own = list(inspect.signature(function).parameters.values())[1:]
        for parameter in own:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter.default is parameter.empty)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return found


def _is_new(proposal: Proposal, earlier: list[Proposal]) -> bool:
    return all(proposal["candidate"] != other["candidate"] for other in earlier)
