"""`mipro`: instructions and demo sets, searched jointly by a tree-structured Parzen estimator (TPE).

Source: MIPRO of Opsahl-Ong et al. (2024, arXiv 2406.11695). Each predictor gets a list of
instructions (grounding.py) and a list of demo sets; a candidate takes one of each for every
predictor. TPE (Bergstra et al., NeurIPS 2011; Optuna's multivariate form) learns from the scores
which of them go well together. Scores come from nested mini-batches: a candidate that racing stops
counts with what it has so far, and those that lead are scored on every example.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import optuna

from bt_ray.rollout.tasks import candidate_id as identify
from bt_ray.search import random_fewshot
from bt_ray.search.base import Candidate, Proposal, SearchContext
from bt_ray.search.demos import Demo, with_demos
from bt_ray.search.grounding import propose_instructions

NUM_REASKS = 20  # questions to TPE for a combination that was not proposed before
# Scores that TPE waits for before it takes over from uniform draws: a share of the trials, within bounds.
STARTUP_SHARE, MIN_STARTUP, MAX_STARTUP = 1 / 3, 3, 10

Indices = dict[str, int]  # parameter of the study -> index of its option


@dataclass(frozen=True)
class Grid:
    """All that a search can combine: options by predictor; index 0 is the original, without demos."""

    instructions: dict[str, list[str]]
    demo_sets: dict[str, list[list[Demo]]]

    @property
    def num_options(self) -> Indices:
        """Parameters that leave a choice, with their number of options."""
        counts = {}
        for name in self.instructions:
            counts[f"{name}/instruction"] = len(self.instructions[name])
            counts[f"{name}/demos"] = len(self.demo_sets[name])
        return {parameter: count for parameter, count in counts.items() if count > 1}

    @property
    def size(self) -> int:
        return math.prod(self.num_options.values())

    def candidate(self, indices: Indices) -> Candidate:
        """The candidate of these indices; a parameter that is not named has index 0."""
        predictors = {}
        for name, instructions in self.instructions.items():
            demos = self.demo_sets[name][indices.get(f"{name}/demos", 0)]
            instruction = instructions[indices.get(f"{name}/instruction", 0)]
            predictors[name] = {"instructions": instruction, "demos": [dict(demo) for demo in demos]}
        return {"predictors": predictors}


class JointSearch:
    """TPE over a grid: is asked for candidates, and told scores by candidate id.

    The zero combination counts as asked from the start.
    """

    def __init__(self, grid: Grid, num_trials: int, seed: str) -> None:
        counts = grid.num_options
        self.grid = grid
        self.study = _study(random.Random(f"{seed}/tpe").getrandbits(31), num_startup(num_trials))
        self._space = {name: optuna.distributions.CategoricalDistribution(range(count)) for name, count in counts.items()}
        self._rng = random.Random(f"{seed}/unseen")
        self._scores: dict[str, float] = {}  # told, by candidate id
        self._running: dict[str, Any] = {}  # trials of the study that wait for their score, by candidate id
        self._tried: set[tuple[int, ...]] = {(0,) * len(counts)}
        self._start(self._fixed_trial(dict.fromkeys(counts, 0)))

    @property
    def exhausted(self) -> bool:
        """Whether every combination is among the proposals."""
        return len(self._tried) >= self.grid.size

    def tell(self, candidate_id: str, score: float) -> None:
        """Take a score; one of a candidate that was never asked for is kept in case it will be."""
        self._scores[candidate_id] = score
        trial = self._running.pop(candidate_id, None)
        if trial is not None:
            self.study.tell(trial, score)

    def ask(self, proposed: Collection[str]) -> Candidate | None:
        """A candidate whose id is not in `proposed`, or None when the grid has no such one.

        TPE is asked NUM_REASKS times at most, then a new combination is drawn uniformly.
        """
        for _ in range(NUM_REASKS):
            trial = self.study.ask(self._space)
            if self._is_new(trial.params, proposed):
                return self._start(trial)
            self._tell_again(trial)
        while not self.exhausted:
            indices = {name: self._rng.randrange(count) for name, count in self.grid.num_options.items()}
            if self._is_new(indices, proposed):
                return self._start(self._fixed_trial(indices))
        return None

    def _is_new(self, indices: Indices, proposed: Collection[str]) -> bool:
        # Also where the incoming prompts happen to be a combination: it is tried then.
        self._tried.add(tuple(indices[name] for name in self._space))
        return identify(self.grid.candidate(indices)) not in proposed

    def _start(self, trial: Any) -> Candidate:
        candidate = self.grid.candidate(trial.params)
        self._running[identify(candidate)] = trial
        return candidate

    def _tell_again(self, trial: Any) -> None:
        """Answer a trial whose candidate was proposed before: with its score if that is known."""
        score = self._scores.get(identify(self.grid.candidate(trial.params)))
        if score is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)  # TPE leaves failed trials out
        else:
            self.study.tell(trial, score)

    def _fixed_trial(self, indices: Indices) -> Any:
        self.study.enqueue_trial(indices)
        return self.study.ask(self._space)


class Mipro:
    """Proposes `incoming`, `zero_shot` (index 0 everywhere), then `step.num_candidates` trials.

    A trial is drawn from the scores of all proposals but the last `max_parallel - 1`, told in the
    order of the proposals. So a draw does not depend on which of several candidates ends first, and
    a search that is run again proposes the same.
    """

    def __init__(self, context: SearchContext) -> None:
        self.notes: list[str] = []
        self.joint: JointSearch | None = None  # made once the first candidates are out, because it asks the LM
        self._context = context
        zero_shot = with_demos(context.student, {})
        self._first: list[Proposal] = [{"label": "incoming", "candidate": context.incoming or context.student}]
        if zero_shot != self._first[0]["candidate"]:
            self._first.append({"label": "zero_shot", "candidate": zero_shot})
        self._order: list[str] = []  # ids of the proposals
        self._scores: dict[str, float] = {}
        self._num_trials = 0

    def propose(self) -> Proposal | None:
        """The next candidate; None while a score is missing that it should follow from. Raises what `ask` raises."""
        if self._first:
            return self._out(self._first.pop(0))
        if self.joint is None:
            self.joint = self._prepare()
        if self.finished() or not self._tell(self.joint):
            return None
        candidate = self.joint.ask(self._order)
        if candidate is None:
            return None
        self._num_trials += 1
        return self._out({"label": f"trial {self._num_trials}", "candidate": candidate})

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        """Keep the score, also the partial one of a candidate that racing stopped."""
        self._scores[candidate_id] = score

    def finished(self) -> bool:
        if self._first or self.joint is None:
            return False
        return self._num_trials >= self._context.step.num_candidates or self.joint.exhausted

    def _out(self, proposal: Proposal) -> Proposal:
        self._order.append(identify(proposal["candidate"]))
        return proposal

    def _prepare(self) -> JointSearch:
        context = self._context
        instructions, notes = propose_instructions(context)
        demo_sets, demo_notes = make_demo_sets(context)
        grid = Grid(instructions, demo_sets)
        num_trials = context.step.num_candidates
        self.notes += [*notes, *demo_notes, _size_note(grid, num_trials)]
        return JointSearch(grid, num_trials, f"{context.seed}/mipro")

    def _tell(self, joint: JointSearch) -> bool:
        """Tell every score that the next trial may follow from; False while one is missing."""
        due = self._order[: max(0, len(self._order) + 1 - self._context.step.max_parallel)]
        if any(key not in self._scores for key in due):
            return False
        for key in due:
            joint.tell(key, self._scores[key])
        return True


def build(context: SearchContext) -> Mipro:
    """The searcher. It asks the LM when its first candidates are out, so that they are scored meanwhile."""
    return Mipro(context)


def make_demo_sets(context: SearchContext) -> tuple[dict[str, list[list[Demo]]], list[str]]:
    """Demo sets by predictor, and notes: no demos, then those of random few-shot's candidates.

    At most `step.num_instructions` sets, each once. A set that is empty for one predictor (its
    outputs have no labels, say) is left out for that predictor alone.
    """
    step = context.step
    sets: dict[str, list[list[Demo]]] = {name: [[]] for name in context.student["predictors"]}
    if not step.max_bootstrapped_demos and not step.max_labeled_demos:
        return sets, ["Demos are switched off (their maxima are 0): the search is over instructions alone."]
    drawn = random_fewshot.build(replace(context, step=step.model_copy(update={"num_candidates": step.num_instructions})))
    while (proposal := drawn.propose()) is not None:
        if proposal["label"] == "incoming":
            continue
        for name, options in sets.items():
            demos = proposal["candidate"]["predictors"][name]["demos"]
            if len(options) < step.num_instructions and demos not in options:
                options.append(demos)
    return sets, drawn.notes


def num_startup(num_trials: int) -> int:
    """Scores that TPE waits for: fewer in a short search, which would else be drawn at random alone."""
    return min(MAX_STARTUP, max(MIN_STARTUP, int(STARTUP_SHARE * num_trials)))


def _study(seed: int, num_startup_trials: int) -> Any:
    """A study in memory. Optuna's own line about it is no news."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=num_startup_trials, multivariate=True, constant_liar=True, seed=seed
        )
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(level)


def _size_note(grid: Grid, num_trials: int) -> str:
    options = ", ".join(
        f"{name} {len(grid.instructions[name])} instructions and {len(grid.demo_sets[name])} demo sets"
        for name in grid.instructions
    )
    return f"{grid.size} combinations ({options}) for {num_trials} trials."
