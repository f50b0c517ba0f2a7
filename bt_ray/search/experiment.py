"""Run a search on Ray Tune: a trial is a candidate, a training step is a rung.

Tune gives parallel trials and their processes. What it does not decide:
proposals come from a `Searcher`, verdicts from the `Ledger`. Tune's own state is written to a
scratch folder and never read back: a resumed search proposes again, and the evaluator answers
from the rows that it has committed.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher as TuneSearcher

from bt_ray.environment import environment
from bt_ray.errors import BtRayError, BudgetError, ConfigError
from bt_ray.search.base import Candidate, Evaluator, SearchContext, build_searcher
from bt_ray.search.conduct import Answer, Conduct, Refuse, Unaffordable
from bt_ray.search.fits import misfit
from bt_ray.search.ledger import Entry, Ledger, Verdict
from bt_ray.search.racing import StopRule
from bt_ray.search.room import TRIAL_CPUS, Starts
from bt_ray.search.trial import CandidateTrial

SLOW_TRIAL_S = 0.5  # a trial that runs for longer is worth more processes; see _Proposals
LOST_PROCESSES = 2  # deaths of its process that a candidate survives; an exception is never retried
TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json or tensorboard files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must interrupt, not end the search as if it were done
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its tables even when told to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the user's relative paths keep their meaning
}
# What these say is no news: where Tune's files lie, and that there are no result files.
TUNE_LOGS = {"ray.tune": logging.WARNING, "ray.tune.analysis": logging.ERROR}


@dataclass(frozen=True)
class SearchPlan:
    """How candidates are scored."""

    example_ids: list[str]  # their order does not matter: the search draws its own from the seed
    rungs: tuple[float, ...]  # shares of the examples after which hopeless candidates stop
    stop_rule: StopRule
    max_parallel: int
    scratch_dir: str  # local folder for Ray Tune's files; nothing in it is needed afterwards
    base_dir: str = "."  # where a searcher's path/to/file.py starts from
    refuse: Refuse | None = None  # why a candidate must not be run (its prompt does not fit), or None
    unaffordable: Unaffordable | None = None  # why the budget does not pay for one more candidate, or None
    # Is given, before the search begins, how to learn how many examples those that are being scored still lack.
    watch: Callable[[Callable[[], int]], None] | None = None


@dataclass(frozen=True)
class SearchResult:
    """The winner, and the book of the search."""

    best: Candidate
    candidate_id: str
    label: str
    score: float  # mean over all examples of the plan
    trials: list[dict[str, Any]]  # one row per candidate, in the order of the proposals
    notes: list[str]
    lineage: list[dict[str, Any]]  # parents of candidates, where the searcher tells: {candidate_id, label, parents, score}


def run_search(searcher_name: str, context: SearchContext, evaluator: Evaluator, plan: SearchPlan) -> SearchResult:
    """Search until the searcher has finished; needs an initialised Ray.

    The winner has the highest mean over all examples among the fully scored candidates; a tie goes
    to fewer demos, then to the shorter prompt, then to the earlier proposal. With `max_parallel` 1
    everything is deterministic; otherwise the order in which candidates end can change which of
    them racing stops. Raises what the evaluator or the searcher raised, ConfigError for a searcher
    or a plan that cannot work, BudgetError where the budget pays for no candidate.
    """
    if not plan.example_ids:
        raise ConfigError("search: there are no examples to score candidates on. Give `data.val` more rows.")
    if len(set(plan.example_ids)) != len(plan.example_ids):
        raise ConfigError("search: example ids are not unique. Give every example of `data.val` its own id.")
    searcher = build_searcher(searcher_name, context, plan.base_dir)
    # Racing's error holds for a random order; the file's own order may be sorted by label.
    order = sorted(plan.example_ids)
    random.Random(f"{context.seed}/rungs").shuffle(order)
    ledger = Ledger(order, plan.rungs if getattr(searcher, "racing", True) else (), plan.stop_rule)
    conduct = Conduct(searcher, ledger, functools.partial(_refused, context.student, plan.refuse), plan.unaffordable)
    if plan.watch:
        plan.watch(ledger.owed)
    _run_tune(conduct, evaluator, plan)
    best = ledger.best()
    if best is None and conduct.over_budget:
        raise BudgetError(f"{conduct.over_budget}.")
    if best is None:
        raise ConfigError(f"search: {searcher_name!r} {ledger.why_none()}")
    if best.missing == len(order):
        raise ConfigError(
            f"search: none of {len(order)} examples got a score (the metric failed, or the process died). See the errors in the rows."
        )
    notes = [*getattr(searcher, "notes", []), *ledger.notes(), *conduct.notes]
    return SearchResult(
        best.candidate, best.candidate_id, best.label, best.score, ledger.trials(), notes, getattr(searcher, "lineage", [])
    )


def _refused(student: Candidate, also: Refuse | None, candidate: Candidate) -> str | None:
    return misfit(candidate, student) or (also(candidate) if also else None)


class _Proposals(TuneSearcher):
    """Tune's view of the searcher.

    Starting a process costs seconds of CPU, and Tune would start one per parallel trial at once,
    and more while the first ones already wait for work. So the first trial runs alone until it has
    run for SLOW_TRIAL_S: scores that come from committed rows then need one process in all.

    A candidate whose process died is proposed again. Tune's own retries leave out a process that dies
    between two candidates, which it serves both.
    """

    def __init__(self, conduct: Conduct, starts: Starts) -> None:
        super().__init__(metric="score", mode="max")
        self._conduct = conduct
        self._starts = starts
        self._live: dict[str, Entry] = {}  # by trial
        self._again: deque[Entry] = deque()
        self._deaths: Counter[str] = Counter()  # by candidate
        self._ended = False
        self._slow = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._conduct.failure is not None:
            return TuneSearcher.FINISHED
        now = time.monotonic()
        self._slow = self._slow or any(now - self._starts.at_s.get(trial, now) > SLOW_TRIAL_S for trial in self._live)
        if self._live and not self._slow:
            return None
        entry = self._next()
        if entry is None:
            return TuneSearcher.FINISHED if self._ended and not self._live else None
        self._live[trial_id] = entry
        return {"candidate_id": entry.candidate_id, "candidate": json.dumps(entry.candidate)}

    def _next(self) -> Entry | None:
        if self._again:
            return self._again.popleft()
        if not self._ended:
            with _remembered(self._conduct):
                entry = self._conduct.next()
            if not isinstance(entry, Answer):
                return entry
            self._ended = entry is Answer.END
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        entry = self._live.pop(trial_id)
        if not error or self._conduct.failure is not None:
            return
        self._deaths[entry.candidate_id] += 1
        if self._deaths[entry.candidate_id] <= LOST_PROCESSES:
            self._again.append(entry)
            return
        self._conduct.failure = BtRayError(
            f"search: the process that scores the candidate {entry.label!r} died {LOST_PROCESSES + 1} times. "
            "See the Ray logs of its node; out of memory is the usual cause."
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Tune's state is not read back."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search that was cut off is run again, its scores read from committed rows."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Racing(FIFOScheduler):
    """Tune's view of the ledger's verdicts."""

    def __init__(self, conduct: Conduct) -> None:
        super().__init__()
        self._conduct = conduct

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        with _remembered(self._conduct):
            verdict = self._conduct.heard(result)
        return FIFOScheduler.CONTINUE if verdict is Verdict.CONTINUE else FIFOScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def _remembered(conduct: Conduct) -> Iterator[None]:
    """Keep an exception for run_search: Tune turns what is raised in its loop into text."""
    try:
        yield
    except Exception as error:
        conduct.failure = conduct.failure or error
        raise


def _run_tune(conduct: Conduct, evaluator: Evaluator, plan: SearchPlan) -> None:
    work = [ray.put((evaluator, conduct.ledger.batches))]
    folder = Path(plan.scratch_dir).resolve() / f"tune-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    starts = Starts(conduct)
    trainable = tune.with_resources(tune.with_parameters(CandidateTrial, work=work), {"CPU": TRIAL_CPUS})
    try:
        with _tune_environment():
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    search_alg=_Proposals(conduct, starts),
                    scheduler=_Racing(conduct),
                    num_samples=-1,
                    max_concurrent_trials=plan.max_parallel,
                    reuse_actors=True,
                    trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
                    trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(folder),
                    verbose=0,
                    callbacks=[starts],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=0),  # see _Proposals
                ),
            )
            tuner.fit()
    except BaseException as error:
        conduct.close(wait=False)
        if conduct.failure is not None and isinstance(error, Exception):
            raise conduct.failure from None  # what Tune made of it is its text only
        raise
    conduct.close(wait=conduct.failure is None)
    if conduct.failure is not None:
        raise conduct.failure
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _tune_environment() -> Iterator[None]:
    """Tune's switches in the environment, its quiet logs and SIGUSR1, which it takes; all given back."""
    levels = {name: logging.getLogger(name).level for name in TUNE_LOGS}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGUSR1) if in_main and hasattr(signal, "SIGUSR1") else None
    for name, level in TUNE_LOGS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with environment(TUNE_ENV):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if handler is not None:
            signal.signal(signal.SIGUSR1, handler)
