"""What every stage will do, counted before it runs: program runs and an instruction writer's LM calls. Pure.

The tree is walked with names in place of content. A name stands for prompts or weights that no one
knows yet, so what is certainly equal has one name and is counted once, as the steps' hashes do in a
run: the children of one parent share its rollouts. What may turn out equal (a search that picks the
incoming prompts) is counted, and flagged `at_most`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType

from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.search.grounding import NUM_RETRIES
from bt_ray.search.opro import ASKED_AGAIN
from bt_ray.strategy import StageNode

FINAL = "final"  # the stage that opens test; no step may have its name
GEPA_MINIBATCH = 3  # training examples of a reflection, where options.reflection_minibatch_size does not say
GEPA_ASKS = 2  # gepa asks once more after a reflection without an instruction


@dataclass(frozen=True)
class Sizes:
    """Counts that costs follow from."""

    train: int  # examples of each split
    search: int
    select: int
    test: int
    num_predictors: int
    calls_per_run: float  # LM calls of one run of the program; without a probe each predictor is taken to be called once
    num_labelled: int = 0  # predictors whose outputs all have labels: what the gold control trains


@dataclass(frozen=True)
class Prompts:
    """Prompts as far as a plan knows them. `max_demos`: per predictor, at most; None: an LM writes
    them, so nobody knows their length."""

    name: str
    max_demos: int | None


VANILLA = Prompts("vanilla", 0)
BASE = "base"  # the weights before any fine-tune


@dataclass(frozen=True)
class Work:
    """LM calls of one step: `runs` of the program (None: unknown) and `proposer_calls` of the LM that writes
    instructions. `at_most`: an upper bound."""

    step: str  # rollout | search | evaluate
    runs: int | None
    max_demos: int | None
    proposer_calls: int = 0
    at_most: bool = False

    def lm_calls(self, calls_per_run: float) -> float | None:
        return None if self.runs is None else self.runs * calls_per_run + self.proposer_calls


@dataclass(frozen=True)
class SearchBound:
    """The most that a searcher asks for. `train_runs`: program runs on training examples beside the scored candidates."""

    candidates: int
    max_demos: int | None
    train_runs: int = 0
    proposer_calls: int = 0


def workload(nodes: Iterable[StageNode], config: RunConfig, sizes: Sizes) -> dict[str, list[Work]]:
    """The work of every stage by id, parents first, and of `final` where there is a test split.

    Rollouts are counted where they are first needed. A fine-tune's own work is no LM call.
    """
    walk = _Walk(config, sizes)
    found = {node.id: walk.stage(node) for node in nodes}
    return {**found, FINAL: walk.final()} if sizes.test else found


class _Walk:
    """Goes down the tree and remembers what each stage ends with, and which rollouts were made."""

    def __init__(self, config: RunConfig, sizes: Sizes) -> None:
        self._config, self._sizes = config, sizes
        self._ends: dict[str, tuple[Prompts, str]] = {}  # by stage: prompts, name of the weights
        self._rolled: set[tuple[str, str]] = set()

    def stage(self, node: StageNode) -> list[Work]:
        prompts, weights = self._ends[node.parent.id] if node.parent else (VANILLA, BASE)
        step = self._config.steps[node.name] if node.steps else None
        if isinstance(step, PromptStep):
            bound = search_bound(step, self._sizes)
            best = _longer(prompts.max_demos, bound.max_demos) if bound else None
            self._ends[node.id] = (Prompts(f"best of {node.id}", best), weights)
            teacher = VANILLA if step.teacher == "original" else prompts
            work = [*self._rollout(teacher, weights), self._search(bound, best)]
            return [*work, self._evaluate(best, at_most=True)]  # a search may pick prompts that were evaluated before
        if isinstance(step, WeightStep):
            tuned = f"tuned by {node.id}"
            work = [*self._rollout(prompts, weights), self._evaluate(0)]
            self._ends[node.id] = (VANILLA, tuned)
            if prompts != VANILLA:  # the better of the two goes on
                self._ends[node.id] = (Prompts(f"carried by {node.id}", prompts.max_demos), tuned)
                work.append(self._evaluate(prompts.max_demos, at_most=True))
            return work
        self._ends[node.id] = (prompts, weights)
        return [self._evaluate(0)]

    def final(self) -> list[Work]:
        """Every stage on test, and the controls. Stages that end with equal prompts and weights are run once."""
        runs, controls = self._sizes.test + 1, self._config.controls
        work = [Work("evaluate", runs, prompts.max_demos, at_most=prompts != VANILLA) for prompts, _ in self._ends.values()]
        demos = [prompts.max_demos for prompts, _ in self._ends.values()]
        longest = functools.reduce(_longer, demos[1:], demos[0])
        work.append(self._evaluate(longest, at_most=longest != 0))  # the pick once more, for its flip rate
        if controls.gold and self._sizes.num_labelled:
            work += [*self._rollout(VANILLA, BASE), Work("evaluate", runs, 0)]
        if controls.equal_cost:  # it searches for as long as the pick's whole path took
            work.append(Work("search", None, None))
        return work

    def _rollout(self, prompts: Prompts, weights: str) -> list[Work]:
        if (prompts.name, weights) in self._rolled:
            return []
        self._rolled.add((prompts.name, weights))
        return [Work("rollout", self._sizes.train * self._config.rollout.samples, prompts.max_demos)]

    def _evaluate(self, max_demos: int | None, at_most: bool = False) -> Work:
        """`select`, and the followed training example."""
        return Work("evaluate", self._sizes.select + 1, max_demos, at_most=at_most)

    def _search(self, bound: SearchBound | None, max_demos: int | None) -> Work:
        if bound is None:
            return Work("search", None, None)
        runs = bound.candidates * self._sizes.search + bound.train_runs
        return Work("search", runs, max_demos, bound.proposer_calls, at_most=True)


def search_bound(step: PromptStep, sizes: Sizes) -> SearchBound | None:
    """The most that the step's searcher proposes and asks; None for an optimiser that is not ours.

    Candidates that are equal are scored once, and racing stops the hopeless ones, so a search
    costs less than candidates x search examples.
    """
    counted = _BOUNDS.get(step.optimizer)
    return counted(step, sizes) if counted else None


def _random_fewshot(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, labels, first (it needs a bootstrapped demo), and the draws."""
    fixed = 4 if step.max_bootstrapped_demos else 3
    return SearchBound(fixed + step.num_candidates, max(step.max_bootstrapped_demos, step.max_labeled_demos))


def _labeled(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, and the draws."""
    return SearchBound(2 + (step.num_candidates if step.max_labeled_demos else 0), step.max_labeled_demos)


def _mipro(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, and the trials. Asked for a summary of the data and for the instructions of each
    predictor but its original; an answer of no use is asked for again."""
    asked = 1 + sizes.num_predictors * (step.num_instructions - 1) if step.num_instructions > 1 else 0
    return SearchBound(2 + step.num_candidates, None, proposer_calls=asked * (1 + NUM_RETRIES))


def _opro(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, student, and one instruction for each slot; an answer of no use is asked for again."""
    return SearchBound(2 + step.num_candidates, None, proposer_calls=step.num_candidates * (1 + ASKED_AGAIN))


def _gepa(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, student, and the proposals. An iteration runs its parent on a mini-batch of train, reflects on it,
    and runs the child on it if there is one; a row that was run before is read."""
    from bt_ray.search.gepa_adapter import ITERATIONS_PER_PROPOSAL

    proposals, iterations = step.num_candidates, ITERATIONS_PER_PROPOSAL * step.num_candidates
    minibatch = int(step.options.get("reflection_minibatch_size") or GEPA_MINIBATCH)
    rewritten = sizes.num_predictors if step.options.get("module_selector") == "all" else 1
    parents = min(iterations * minibatch, (1 + proposals) * sizes.train)
    train_runs = parents + proposals * minibatch
    return SearchBound(2 + proposals, None, train_runs, iterations * rewritten * GEPA_ASKS)


_BOUNDS: MappingProxyType[str, Callable[[PromptStep, Sizes], SearchBound]] = MappingProxyType(
    {"random_fewshot": _random_fewshot, "labeled": _labeled, "mipro": _mipro, "opro": _opro, "gpo": _opro, "gepa": _gepa}
)


def _longer(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)
