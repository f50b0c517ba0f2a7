"""What a searcher is, what it is given, and how one is found by name.

A searcher proposes candidates and may learn from their scores; it never runs the program. Running,
parallelism, racing and resume are the experiment's. README.md shows a whole searcher.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypedDict, runtime_checkable

from bt_ray.config import PromptStep
from bt_ray.errors import ConfigError
from bt_ray.runs.identity import content_hash, file_sha256

Candidate = dict[str, Any]  # {"predictors": {name: {"instructions": str, "demos": [{field: value}, ...]}}}
Row = dict[str, Any]
CheckOptions = Callable[[Mapping[str, Any]], None]  # raises ConfigError for options that an optimiser does not take

# A name stands for a file of this folder with a `build` in it, and `check_options` where it has options.
SEARCHERS = MappingProxyType(
    {
        "labeled": "bt_ray.search.labeled",
        "random_fewshot": "bt_ray.search.random_fewshot",
        "mipro": "bt_ray.search.mipro",
        "opro": "bt_ray.search.opro",
        "gpo": "bt_ray.search.gpo",
        "gepa": "bt_ray.search.gepa",
    }
)


class AskLM(Protocol):
    """The LM that writes instructions."""

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        """One answer per prompt, in their order; blocks. Sampled with `step.proposer_temperature`.

        Equal prompts of one call are drawn apart; the same call again, in a search that goes on
        after a crash, is answered from its journal. Answers are raw text and may be empty. Raises BudgetError,
        before any prompt goes out, where the budget does not pay for all: let it pass, it ends the search.
        """


class RunRows(Protocol):
    """Runs a candidate on training examples."""

    def __call__(self, candidate: Candidate, example_ids: Sequence[str]) -> list[Row]:
        """Greedy rollout rows in the order of the ids, with `calls`, `score`, `feedback` and `error`; blocks.
        A call has a `feedback` of its own where the metric takes (pred_name, pred_trace) and said something.
        Rows that were committed before are read, not run. BudgetError as of AskLM."""


class CompileProgram(Protocol):
    """Lends the program itself to an optimiser that runs it."""

    def __call__(self, work: Callable[[Any, Any, list[Any], list[Any]], Any]) -> Candidate:
        """Prompts of the program that `work(program, metric, trainset, valset)` returns; blocks.

        All four are DSPy's: a module with the student's prompts, metric(example, prediction,
        trace=None), examples for training, and those that candidates are scored on. LM calls inside
        `work` are answered by the pool, and once: a search that goes on after a crash reads them.
        BudgetError, whatever `work` made of it, where the budget does not pay for a call.
        """


class Proposal(TypedDict):
    """A candidate and its short name in the report (`incoming`, `draw 3`)."""

    label: str
    candidate: Candidate


@dataclass(frozen=True)
class SearchContext:
    """All that a searcher may look at. Plain data, from the training examples only."""

    step: PromptStep
    student: Candidate  # the prompts that the search starts from
    rollouts: Sequence[dict[str, Any]]  # the teacher's rollout rows on the training examples, accepted or not
    examples: list[dict[str, Any]]  # {"id", "inputs": {field: value}, "labels": {field: value}}
    labelled: dict[str, list[str]]  # predictor -> its output fields that the labels hold
    signatures: dict[str, dict[str, list[str]]]  # predictor -> {"inputs": [...], "outputs": [...]}
    seed: int
    incoming: Candidate | None = None  # the prompts that the step received; None: the student's
    ask: AskLM | None = None  # None: no LM is lent
    run_rows: RunRows | None = None  # None: no runs beside the scored candidates
    program_code: str = ""  # source of the program's class, "" where it has none
    search_ids: tuple[str, ...] = ()  # ids of the examples that candidates are scored on (their content stays hidden)
    compile: CompileProgram | None = None  # None: the program is not lent
    field_notes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # predictor -> field -> type and description


@runtime_checkable
class Searcher(Protocol):
    """Proposes candidates. All calls come one at a time, from one thread that is not Ray Tune's, so
    a searcher needs no locks and may take its time.

    Optional members are used when a searcher has them: `notes`, a list of sentences for the
    report; `observe_examples(candidate_id: str, scores: dict[str, float]) -> None`, called
    just before `observe` with the scores by example (for a Pareto front over examples, say);
    `racing = False`, when every candidate must be scored on all examples; `lineage`, a list of
    {candidate_id, label, parents, score} for the record; `close()`, called when the search ends or fails.
    """

    def propose(self) -> Proposal | None:
        """The next candidate, or None for "no more now": then it is asked again after the next
        `observe`, unless `finished()`. A batch is proposed by answering call after call."""

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        """A score: the mean over all examples (complete), or over those until racing stopped the
        candidate. Called again at once with the known score when an equal candidate is proposed."""

    def finished(self) -> bool:
        """True when nothing will be proposed any more, whatever is still observed."""


class Evaluator(Protocol):
    """Runs a candidate on examples. Picklable: every trial process has its own copy."""

    def evaluate(self, candidate: Candidate, example_ids: list[str]) -> dict[str, float]:
        """Scores by example id; blocks. Rows already committed are not run again. An id is left
        out when the metric itself failed on it. An exception fails the whole search."""


class ListSearcher:
    """A searcher over a list known beforehand: no learning. Base of the few-shot searchers."""

    def __init__(self, proposals: list[Proposal], notes: list[str] | None = None) -> None:
        self._left = list(proposals)
        self.notes = notes or []

    def propose(self) -> Proposal | None:
        return self._left.pop(0) if self._left else None

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        """Scores change nothing here."""

    def finished(self) -> bool:
        return not self._left


def build_searcher(name: str, context: SearchContext, base_dir: str = ".") -> Searcher:
    """Make the searcher that `step.optimizer` names.

    `name` is a key of SEARCHERS, `dspy.X` for an optimiser of DSPy, `package.module:attribute`, or
    `path/to/file.py:attribute` with the path relative to `base_dir`. The attribute is a class or
    function that takes the context, or a class derived from DSPy's Teleprompter. Raises ConfigError.
    """
    factory, _ = _factory(name, base_dir)
    searcher = factory(context)
    lacking = [method for method in ("propose", "observe", "finished") if not callable(getattr(searcher, method, None))]
    if lacking:
        kind = type(searcher).__name__
        raise ConfigError(f"optimizer: {name!r} gives a {kind} without {', '.join(lacking)}. Add those methods.")
    return searcher


def check_optimizer(name: str, base_dir: str, options: Mapping[str, Any] | None = None, sizes: str | None = None) -> None:
    """Raise ConfigError unless `name` names a searcher that can be imported, and that takes these options.

    `sizes`: the step's `auto` or `preset`, which an optimiser of DSPy does not read.
    """
    _, check_options = _factory(name, base_dir)
    if sizes and check_options is not None and name not in SEARCHERS:
        raise ConfigError(f"optimizer {name} takes its sizes from `options`, not from {sizes!r}. Remove auto and preset.")
    if options is None:
        return
    if check_options is not None:
        check_options(options)
    elif options and name in SEARCHERS:
        raise ConfigError(f"options: {name} has none; its settings are fields of the step. Remove {', '.join(options)}.")


def source_id(name: str, base_dir: str) -> str | None:
    """Hash of the files that define the user's own searcher; None where `name` is of this package or of DSPy.

    The file that is named, and the one that holds the class, where that is another. Raises ConfigError.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        return None
    files = [str(Path(base_dir) / place)] if place.endswith(".py") else []
    module = _load_file(Path(files[0])) if files else _import(place, name)
    for thing in (module, getattr(module, attribute, None)):
        try:
            files.append(inspect.getsourcefile(thing) or "")  # type: ignore[arg-type]
        except TypeError:  # an object, or a module without a file
            continue
    paths = dict.fromkeys(Path(file).resolve() for file in files if file)
    return content_hash([file_sha256(path) for path in paths if path.is_file()])


def _factory(name: str, base_dir: str) -> tuple[Callable[[SearchContext], Any], CheckOptions | None]:
    if name in SEARCHERS:
        module = importlib.import_module(SEARCHERS[name])
        return module.build, getattr(module, "check_options", None)
    if name.startswith("dspy.") and ":" not in name:
        from bt_ray.search.teleprompter import named

        optimiser = named(name)
        return optimiser, optimiser.check_options
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        near = difflib.get_close_matches(name, SEARCHERS, n=1, cutoff=0.0)
        raise ConfigError(
            f"optimizer: there is no searcher {name!r}; did you mean {near[0]!r}? Known: {', '.join(SEARCHERS)}, "
            "dspy.X for an optimiser of DSPy, or your own as module:Class or path/to/file.py:Class."
        )
    module = _load_file(Path(base_dir) / place) if place.endswith(".py") else _import(place, name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name a class or function of it."
        raise ConfigError(f"optimizer: {place} has no class or function {attribute!r}; {hint}")
    if _is_teleprompter(factory):
        from bt_ray.search.teleprompter import TeleprompterFactory

        optimiser = TeleprompterFactory(name, factory)
        return optimiser, optimiser.check_options
    return factory, None


def _is_teleprompter(found: Any) -> bool:
    # A class derives from DSPy's only where DSPy was imported; other searchers need not wait for it.
    teleprompt = sys.modules.get("dspy.teleprompt.teleprompt")
    return teleprompt is not None and inspect.isclass(found) and issubclass(found, teleprompt.Teleprompter)


def _import(module_name: str, name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"optimizer: {name!r} cannot be imported: {error}. Install the module or give path/to/file.py:Class."
        ) from None
    except (Exception, SystemExit) as error:  # the user's code
        raise ConfigError(f"optimizer: importing {module_name} fails {_fault(error)}. Mend it.") from error


def _fault(error: BaseException) -> str:
    """Where in the user's code and with what: `in searcher.py, line 3, with NameError: ...`."""
    name = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"in {error.filename}, line {error.lineno}, with {name}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f"in {theirs[-1].filename}, line {theirs[-1].lineno}, " if theirs else ""
    return f"{place}with {name}: {error}"


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"optimizer: there is no file {path}. The path starts from the config's folder.")
    # A stable name of its own: the user's file may be called like an installed module.
    module_name = "bt_ray_user_searcher_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"optimizer: {path} cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code
        del sys.modules[module_name]
        raise ConfigError(f"optimizer: importing {path} fails {_fault(error)}. Mend it.") from error
    return module
