"""What every stage will do, counted before it runs: program runs and an instruction writer's LM calls. Pure.

The tree is walked with names in place of content. A name stands for prompts or weights that no one
knows yet, so what is equal has one name and is counted once, as the steps' hashes do in a run: the
children of one parent share its rollouts. Walked without a `Chance` every search finds prompts of its
own and nothing is raced: that is the most that can be done. With one, racing stops candidates and a
search may pick what it was given: that is one run as it may go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from bt_ray.config import PromptStep, RunConfig, WeightStep
from bt_ray.report.chance import Chance
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

    def of(self, step: PromptStep) -> Sizes:
        """With those examples of train and search alone that the step uses."""
        return replace(self, train=step.num_train(self.train), search=step.num_search(self.search))


@dataclass(frozen=True)
class Prompts:
    """Prompts by their name. `demos`: of a call, the mean over the program's calls; None: an LM writes them, so nobody
    knows their length."""

    name: str
    demos: float | None


VANILLA = Prompts("vanilla", 0.0)
BASE = "base"  # the weights before any fine-tune


@dataclass(frozen=True)
class Work:
    """LM calls of one step: `runs` of the program (None: unknown) and `proposer_calls` of the LM that writes
    instructions. `demos`: as of `Prompts`. `other_model`: a model of its own makes the calls."""

    step: str  # rollout | search | evaluate
    runs: int | None
    demos: float | None
    proposer_calls: int = 0
    other_model: bool = False

    def lm_calls(self, calls_per_run: float) -> float | None:
        return None if self.runs is None else self.runs * calls_per_run + self.proposer_calls


@dataclass(frozen=True)
class SearchBound:
    """The most that a searcher asks for. `train_runs`: program runs on training examples beside the scored candidates."""

    candidates: int
    train_runs: int = 0
    proposer_calls: int = 0


def workload(nodes: Iterable[StageNode], config: RunConfig, sizes: Sizes, chance: Chance | None = None) -> dict[str, list[Work]]:
    """The work of every stage by id, parents first, and of `final` where there is a test split.

    Rollouts are counted where they are first needed. A fine-tune's own work is no LM call.
    """
    walk = _Walk(config, sizes, chance)
    found = {node.id: walk.stage(node) for node in nodes}
    return {**found, FINAL: walk.final()} if sizes.test else found


class _Walk:
    """Goes down the tree and remembers what each stage ends with, and which program runs were made."""

    def __init__(self, config: RunConfig, sizes: Sizes, chance: Chance | None) -> None:
        self._config, self._sizes, self._chance = config, sizes, chance
        self._ends: dict[str, tuple[Prompts, str]] = {}  # by stage: prompts, name of the weights
        self._made: dict[tuple[str, str, str], int] = {}  # what was run, and how often: rollout or split, prompts, weights

    def stage(self, node: StageNode) -> list[Work]:
        prompts, weights = self._ends[node.parent.id] if node.parent else (VANILLA, BASE)
        step = self._config.steps[node.name] if node.steps else None
        self._ends[node.id] = (prompts, weights)
        if isinstance(step, PromptStep):
            teacher = VANILLA if step.teacher_prompts == "original" else prompts
            model = None if isinstance(step.teacher, str) else step.teacher.model
            work = [*self._rollout(teacher, weights, self._sizes.of(step).train, model), self._search(node.id, step)]
            return [*work, *self._evaluate(node.id)]
        if isinstance(step, WeightStep):
            tuned = f"tuned by {node.id}"
            work = self._rollout(prompts, weights, self._sizes.train)
            for tried in (VANILLA, prompts):  # the better of the two goes on
                self._ends[node.id] = (tried, tuned)
                work += self._evaluate(node.id)
            if self._chance and self._chance.kept():
                self._ends[node.id] = (VANILLA, tuned)
            return work
        return self._evaluate(node.id)

    def final(self) -> list[Work]:
        """Every stage on test, and the controls. Stages that end with equal prompts and weights are run once."""
        runs, controls = self._sizes.test + 1, self._config.controls
        ends = list(self._ends.values())
        work = [item for prompts, weights in ends for item in self._run(("test", runs), prompts, weights)]
        pick = self._chance.one_of(ends) if self._chance else ends[-1]
        work.append(Work("evaluate", self._sizes.select + 1, pick[0].demos))  # the pick once more, for its flip rate
        if controls.gold and self._sizes.num_labelled:
            work += [*self._rollout(VANILLA, BASE, self._sizes.train), Work("evaluate", runs, VANILLA.demos)]
        if controls.equal_cost:  # it searches for as long as the pick's whole path took
            work.append(Work("search", None, None))
        return work

    def _rollout(self, prompts: Prompts, weights: str, examples: int, model: str | None = None) -> list[Work]:
        """`model`: a teacher's that has weights of its own."""
        runs = examples * self._config.rollout.samples
        return self._run(("rollout", runs), prompts, weights if model is None else f"model {model}")

    def _evaluate(self, stage_id: str) -> list[Work]:
        """`select`, and the followed training example."""
        return self._run(("select", self._sizes.select + 1), *self._ends[stage_id])

    def _run(self, what: tuple[str, int], prompts: Prompts, weights: str) -> list[Work]:
        """Program runs of this name and number, without those that were made before: fewer examples are some of more."""
        key = (what[0], prompts.name, weights)
        made = self._made.get(key, 0)
        if what[1] <= made:
            return []
        self._made[key] = what[1]
        step = "rollout" if what[0] == "rollout" else "evaluate"
        return [Work(step, what[1] - made, prompts.demos, other_model=weights.startswith("model "))]

    def _search(self, stage_id: str, step: PromptStep) -> Work:
        """Sets the prompts that the stage ends with, and gives the work of finding them."""
        prompts, weights = self._ends[stage_id]
        examples = self._sizes.of(step).search
        found = Prompts(f"best of {stage_id}", None)
        self._ends[stage_id] = (found, weights)
        if self._chance is None:
            bound = search_bound(step, self._sizes)
            if bound is None:
                return Work("search", None, None)
            return Work("search", bound.candidates * examples + bound.train_runs, None, bound.proposer_calls)
        field = candidates(step, self._sizes, prompts, stage_id)
        if field is None:
            return Work("search", None, None)
        tuned = weights != BASE
        proved = tuned or prompts != VANILLA  # found best before, or what the weights were tuned on
        best = prompts if proved and self._chance.kept() else self._chance.one_of(field)
        self._ends[stage_id] = (best, weights)
        runs = self._chance.runs(step, len(field), examples, tuned)
        demos = [item.demos for item in field if item.demos is not None]
        return Work("search", runs, sum(demos) / len(demos) if len(demos) == len(field) else None)


def candidates(step: PromptStep, sizes: Sizes, incoming: Prompts, stage_id: str) -> list[Prompts] | None:
    """The different candidates of a search, as many as are to be expected; None where an LM or a foreign optimiser
    writes them. The program as written is taken to have no demos of its own."""
    drawn = _DRAWN.get(step.optimizer)
    if drawn is None:
        return None
    share = sizes.num_labelled / sizes.num_predictors  # of the predictors: those that labelled demos are for
    bare = VANILLA if step.student == "original" or incoming == VANILLA else Prompts(f"bare {incoming.name}", 0.0)
    named = [(f"{number} of {stage_id}", demos) for number, demos in enumerate(drawn(step, share)) if demos]
    return list({prompts.name: prompts for prompts in [incoming, bare, *(Prompts(*item) for item in named)]}.values())


def _random_fewshot_demos(step: PromptStep, share: float) -> Sequence[float]:
    """Demos of a call: labels, first, and draws, whose number of traces is uniform from 1 to the most."""
    traces, labels = step.max_bootstrapped_demos, step.max_labeled_demos
    if not traces:
        return [share * labels] * (1 + step.num_candidates)
    sizes = [traces, *(1 + number * traces // step.num_candidates for number in range(step.num_candidates))]
    return [share * labels, *((1 - share) * size + share * max(size, labels) for size in sizes)]


def _labeled_demos(step: PromptStep, share: float) -> Sequence[float]:
    return [share * step.max_labeled_demos] * step.num_candidates


_DRAWN: MappingProxyType[str, Callable[[PromptStep, float], Sequence[float]]] = MappingProxyType(
    {"random_fewshot": _random_fewshot_demos, "labeled": _labeled_demos}
)


def search_bound(step: PromptStep, sizes: Sizes) -> SearchBound | None:
    """The most that the step's searcher proposes and asks; None for an optimiser that is not ours.

    Candidates that are equal are scored once, and racing stops the hopeless ones, so a search
    costs less than candidates x search examples.
    """
    counted = _BOUNDS.get(step.optimizer)
    return counted(step, sizes.of(step)) if counted else None


def _random_fewshot(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, labels, first (it needs a bootstrapped demo), and the draws."""
    fixed = 4 if step.max_bootstrapped_demos else 3
    return SearchBound(fixed + step.num_candidates)


def _labeled(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, and the draws."""
    return SearchBound(2 + (step.num_candidates if step.max_labeled_demos else 0))


def _mipro(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, zero_shot, and the trials. Asked for a summary of the data and for the instructions of each
    predictor but its original; an answer of no use is asked for again."""
    asked = 1 + sizes.num_predictors * (step.num_instructions - 1) if step.num_instructions > 1 else 0
    return SearchBound(2 + step.num_candidates, proposer_calls=asked * (1 + NUM_RETRIES))


def _opro(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, student, and one instruction for each slot; an answer of no use is asked for again."""
    return SearchBound(2 + step.num_candidates, proposer_calls=step.num_candidates * (1 + ASKED_AGAIN))


def _gepa(step: PromptStep, sizes: Sizes) -> SearchBound:
    """incoming, student, and the proposals. An iteration runs its parent on a mini-batch of train, reflects on it,
    and runs the child on it if there is one; a row that was run before is read."""
    from bt_ray.search.gepa_adapter import ITERATIONS_PER_PROPOSAL

    proposals, iterations = step.num_candidates, ITERATIONS_PER_PROPOSAL * step.num_candidates
    minibatch = int(step.options.get("reflection_minibatch_size") or GEPA_MINIBATCH)
    rewritten = sizes.num_predictors if step.options.get("module_selector") == "all" else 1
    parents = min(iterations * minibatch, (1 + proposals) * sizes.train)
    train_runs = parents + proposals * minibatch
    return SearchBound(2 + proposals, train_runs, iterations * rewritten * GEPA_ASKS)


_BOUNDS: MappingProxyType[str, Callable[[PromptStep, Sizes], SearchBound]] = MappingProxyType(
    {"random_fewshot": _random_fewshot, "labeled": _labeled, "mipro": _mipro, "opro": _opro, "gpo": _opro, "gepa": _gepa}
)
