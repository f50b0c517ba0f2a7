"""MIPRO's joint search: on a planted problem, and what TPE is told; no Ray."""

from __future__ import annotations

import logging
import random
import statistics
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from bt_ray.rollout.tasks import candidate_id
from bt_ray.search import mipro
from bt_ray.search.base import Candidate, Proposal, Searcher, build_searcher
from bt_ray.search.mipro import JointSearch, Mipro
from tests.support.planted_mipro import NUM_EXAMPLES, NUM_TRIALS, SIGNATURES, Planted, StubLM, drive, make_context

SEEDS = range(50)


def proposals(searcher: Searcher, seed: int = 0, max_outstanding: int = 1) -> list[Proposal]:
    """All proposals where several candidates are out and end in an order of chance; scores follow from the candidate."""
    found: list[Proposal] = []
    live: list[Candidate] = []
    rng = random.Random(seed)
    most = 0
    while True:
        proposal = searcher.propose()
        if proposal is not None:
            found.append(proposal)
            live.append(proposal["candidate"])
            most = max(most, len(live))
            if rng.random() < 0.7:
                continue
        elif not live:
            assert searcher.finished() and most == max_outstanding
            return found
        ended = candidate_id(live.pop(rng.randrange(len(live))))
        searcher.observe(ended, random.Random(ended).random(), True)


def joint(searcher: Mipro) -> JointSearch:
    assert searcher.joint is not None
    return searcher.joint


def test_the_incoming_prompts_and_index_zero_come_first_and_the_lm_is_asked_after_them() -> None:
    context = make_context(ask=(lm := StubLM()))
    searcher = build_searcher("mipro", context)
    assert isinstance(searcher, Mipro)
    first = [searcher.propose(), searcher.propose()]
    assert first == [
        {"label": "incoming", "candidate": context.incoming},
        {"label": "zero_shot", "candidate": context.student},
    ]
    assert not lm.prompts and not searcher.finished()
    for number, score in enumerate((0.25, 0.75)):
        searcher.observe(candidate_id(first[number]["candidate"]), score, True)  # type: ignore[index]
    third = searcher.propose()
    assert third is not None and third["label"] == "trial 1" and lm.prompts
    grid = joint(searcher).grid
    assert {name: options[0] for name, options in grid.instructions.items()} == {"route": "Do route.", "answer": "Do answer."}
    assert all(len(options) == 6 for options in [*grid.instructions.values(), *grid.demo_sets.values()])
    assert grid.candidate({}) == context.student
    known = joint(searcher).study.trials[0]
    assert set(known.params.values()) == {0} and len(known.params) == 4 and known.value == 0.75


def test_incoming_prompts_that_are_the_originals_are_proposed_once() -> None:
    labels = [proposal["label"] for proposal in proposals(Mipro(replace(make_context(ask=StubLM()), incoming=None)))]
    assert labels == ["incoming", *(f"trial {number}" for number in range(1, 9))]


def test_without_demos_the_search_is_over_instructions_alone() -> None:
    searcher = Mipro(make_context(ask=StubLM(), max_bootstrapped_demos=0, max_labeled_demos=0))
    found = [proposal["candidate"]["predictors"] for proposal in proposals(searcher)]
    assert len(found) == 10 and all(not predictor["demos"] for predictors in found for predictor in predictors.values())
    assert len({predictors["route"]["instructions"] for predictors in found}) > 3
    assert any("instructions alone" in note for note in searcher.notes)


def test_without_an_lm_the_search_is_over_demos_alone() -> None:
    searcher = Mipro(make_context())
    found = [proposal["candidate"]["predictors"] for proposal in proposals(searcher)][1:]
    assert len(found) == 9 and {predictors["route"]["instructions"] for predictors in found} == {"Do route."}
    assert len({len(predictors["answer"]["demos"]) for predictors in found}) > 1
    assert any("demos alone" in note for note in searcher.notes)


@pytest.mark.parametrize("passing", [0, 12])
def test_a_predictor_without_demos_or_a_choice_is_no_parameter(passing: int) -> None:
    searcher = Mipro(make_context(passing=passing))
    proposals(searcher)
    expected = {"route/demos": 6, "answer/demos": 6} if passing else {"answer/demos": 6}  # `route` has no labels
    assert joint(searcher).grid.num_options == expected


def test_a_small_grid_is_searched_to_its_end_without_repeats() -> None:
    searcher = Mipro(make_context(ask=StubLM(), num_instructions=2, num_candidates=50))
    ledger = drive(searcher, lambda candidate, example: float(int(example) < 10 * len(str(candidate)) % 100))
    assert len(ledger.entries) == 2**4 + 1 and ledger.num_duplicates == 0
    assert searcher.finished() and any("16 combinations" in note for note in searcher.notes)


def test_a_combination_that_is_asked_for_again_is_answered_with_its_score_and_at_most_20_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class AlwaysZero(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> int:
            return 0

    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed, **_: AlwaysZero(seed))
    searcher = Mipro(make_context(ask=StubLM()))
    found = proposals(searcher)
    assert len({candidate_id(proposal["candidate"]) for proposal in found}) == len(found) == 2 + 8
    trials = joint(searcher).study.trials
    zeros = [trial for trial in trials if not any(trial.params.values())]
    assert len(zeros) == 1 + 8 * mipro.NUM_REASKS and len({trial.value for trial in zeros}) == 1
    assert len(trials) - len(zeros) == 8


def test_what_is_proposed_does_not_depend_on_the_order_in_which_parallel_candidates_end() -> None:
    first, again, other = (
        proposals(Mipro(make_context(seed, StubLM(), max_parallel=3, num_candidates=30)), order, max_outstanding=3)
        for seed, order in ((1, 0), (1, 1), (2, 0))
    )
    assert first == again and len(first) == 32
    assert first[2:] != other[2:]


def test_partial_scores_of_stopped_candidates_are_told_to_the_study() -> None:
    planted = Planted(0)
    searcher = Mipro(planted.context)
    ledger = drive(searcher, planted.score)
    search = joint(searcher)
    told = {candidate_id(search.grid.candidate(trial.params)): trial.value for trial in search.study.trials}
    entries = list(ledger.entries.values())[:-1]  # after the last one nothing is asked any more
    stopped = [entry for entry in entries if entry.stopped_at is not None]
    assert len(stopped) > 10 and all(len(entry.scores) < NUM_EXAMPLES for entry in stopped)
    assert {entry.candidate_id: entry.score for entry in entries}.items() <= told.items()


def test_a_short_search_learns_too() -> None:
    assert [mipro.num_startup(num_trials) for num_trials in (1, 6, 15, 60)] == [3, 3, 5, 10]


def test_optunas_log_level_stays_the_users_own() -> None:
    level = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.INFO)
        proposals(Mipro(make_context(ask=StubLM(), num_candidates=1)))
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(level)


# The planted problem


def search(seed: int) -> tuple[float, int]:
    """True mean of the winner, and runs of the program."""
    planted = Planted(seed)
    ledger = drive(Mipro(planted.context), planted.score)
    best = ledger.best()
    assert best is not None and len(ledger.entries) == NUM_TRIALS + 1
    return planted.mean(best.candidate), sum(len(entry.scores) for entry in ledger.entries.values())


@cache
def searches() -> list[tuple[float, int]]:
    return [search(seed) for seed in SEEDS]


def found(means: list[float]) -> float:
    """Share of the searches whose winner is the planted one."""
    return sum(mean > 0.899 for mean in means) / len(means)


def test_tpe_finds_the_planted_best_far_more_often_than_random_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = [mean for mean, _ in searches()]
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed, **_: optuna.samplers.RandomSampler(seed=seed))
    drawn = [search(seed)[0] for seed in SEEDS]
    print("tpe", found(learned), statistics.mean(learned), "random", found(drawn), statistics.mean(drawn))
    assert found(learned) >= found(drawn) + 0.3
    assert statistics.mean(learned) >= statistics.mean(drawn) + 0.08


class StubProgram:
    """What DSPy's optimiser needs of a program: predictors with instructions and demos, and copies."""

    def __init__(self, predictors: list[tuple[str, list[Any]]]) -> None:
        self._predictors = [SimpleNamespace(signature=StubSignature(text), demos=demos) for text, demos in predictors]

    def predictors(self) -> list[Any]:
        return self._predictors

    def deepcopy(self) -> StubProgram:
        return StubProgram([(predictor.signature.instructions, predictor.demos) for predictor in self._predictors])

    def candidate(self) -> Candidate:
        pairs = zip(SIGNATURES, self._predictors, strict=True)
        return {"predictors": {name: {"instructions": p.signature.instructions, "demos": p.demos} for name, p in pairs}}


class StubSignature:
    def __init__(self, instructions: str) -> None:
        self.instructions = instructions

    def with_instructions(self, text: str) -> StubSignature:
        return StubSignature(text)


def dspy_search(seed: int, min_runs: int) -> tuple[float, int]:
    """DSPy's own joint search (its sampler and mini-batch schedule) on the same options, with as many runs or more."""
    from dspy.teleprompt import MIPROv2

    planted, num_runs = Planted(seed), 0

    def evaluate(program: StubProgram, devset: list[str], **_: Any) -> Any:
        nonlocal num_runs
        num_runs += len(devset)
        return SimpleNamespace(score=100 * statistics.mean(planted.score(program.candidate(), example) for example in devset))

    minibatch, full_every = 35, 5  # its defaults
    num_trials = 1
    while NUM_EXAMPLES + minibatch * num_trials + NUM_EXAMPLES * (num_trials // full_every) < min_runs:
        num_trials += 1
    optimiser = MIPROv2(metric=max, prompt_model="none", task_model="none", auto=None, num_candidates=6, track_stats=False)
    optimiser.rng = random.Random(seed)
    best = optimiser._optimize_prompt_parameters(
        StubProgram([(options[0], []) for options in planted.instructions.values()]),
        dict(enumerate(planted.instructions.values())),
        list(planted.demo_sets.values()),
        evaluate,
        [str(example) for example in range(NUM_EXAMPLES)],
        num_trials,
        True,
        minibatch,
        full_every,
        seed,
    )
    return planted.mean(best.candidate()), num_runs


def test_finds_the_planted_best_at_least_as_often_as_dspy_at_the_same_number_of_runs() -> None:
    logging.getLogger("dspy.teleprompt.mipro_optimizer_v2").setLevel(logging.ERROR)
    ours = searches()
    theirs = [dspy_search(seed, num_runs) for seed, (_, num_runs) in zip(SEEDS, ours, strict=True)]
    runs, their_runs = (sum(num for _, num in results) for results in (ours, theirs))
    means, their_means = ([mean for mean, _ in results] for results in (ours, theirs))
    print(
        "ours", found(means), statistics.mean(means), runs, "dspy", found(their_means), statistics.mean(their_means), their_runs
    )
    assert runs <= their_runs
    assert found(means) >= found(their_means)
    assert statistics.mean(means) >= statistics.mean(their_means)
