"""`gepa`: an LM reads what went wrong on a few examples and rewrites an instruction; a Pareto front over examples
says which candidates are worth rewriting.

Source: Agrawal et al. (2025, arXiv 2507.19457). The package `gepa` does the search: it selects
parents, reflects and merges. It is lent rows, scores and an LM. Its loop blocks, so it runs in a
thread of its own: what it wants scored on all search examples goes out as a proposal, and the
thread waits for the scores: the rows of a mini-batch or of a candidate run side by side, candidates
come one after another. Demos are the student's; only instructions change.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import gepa

from bt_ray.errors import ConfigError
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search.base import Proposal, SearchContext
from bt_ray.search.gepa_adapter import Abort, Book, ComponentName, RowsAdapter, to_texts

OPTIONS = (
    "candidate_selection_strategy", "skip_perfect_score", "perfect_score", "reflection_minibatch_size",
    "reflection_prompt_template", "module_selector", "use_merge", "max_merge_invocations",
    "merge_val_overlap_floor", "max_metric_calls", "acceptance_criterion",
)  # fmt: skip
logger = logging.getLogger(__name__)


def build(context: SearchContext) -> GepaSearcher:
    """The searcher. Raises ConfigError for options that `gepa.optimize` does not take from here, and
    where the context lends no LM, no rows or no examples."""
    check_options(context.step.options)
    lacking = {
        "an LM to write instructions (context.ask)": context.ask,
        "runs on training examples (context.run_rows)": context.run_rows,
        "training examples": context.examples,
        "ids of search examples": context.search_ids,
        "a predictor whose instruction may change": context.student["predictors"],
    }
    for what, given in lacking.items():
        if not given:
            raise ConfigError(f"optimizer: gepa needs {what}, and this search has none. Take `random_fewshot` instead.")
    return GepaSearcher(context)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is no argument of `gepa.optimize`, or one that the search sets itself."""
    known = inspect.signature(gepa.optimize).parameters
    for name in options:
        if name in OPTIONS:
            continue
        if name in known:
            raise ConfigError(f"options.{name}: the search sets this argument of gepa itself. Yours are: {', '.join(OPTIONS)}.")
        near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)
        raise ConfigError(f"options.{name}: gepa has no such argument; did you mean {near[0]!r}? There is {', '.join(OPTIONS)}.")


class GepaSearcher:
    """Proposes `incoming`, the student (gepa's seed), then what gepa keeps after a mini-batch.

    `lineage`: {"candidate_id", "label", "parents": [candidate_id, ...], "score"} of each candidate
    in gepa's pool, in the order of their scoring; a merge has two parents, the student none.
    """

    racing = False  # gepa's front needs the score of every candidate on every example

    def __init__(self, context: SearchContext) -> None:
        self._exchange = _Exchange({"label": "incoming", "candidate": context.incoming or context.student})
        self._book = Book(context.student, context.step.num_candidates)
        self._adapter = RowsAdapter(context, self._exchange, self._book)
        self._work = functools.partial(_optimise, context, self._adapter, self._book)
        self._thread: threading.Thread | None = None
        self._heard: dict[str, dict[str, float]] = {}
        # The thread knows the exchange but not the searcher, so it ends when the searcher is dropped.
        weakref.finalize(self, self._exchange.close)

    def propose(self) -> Proposal | None:
        """Blocks while gepa runs rows or asks the LM. Raises what those raised, or gepa itself."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._exchange.run, args=(self._work,), name="bt_ray-gepa", daemon=True)
            self._thread.start()
        return self._exchange.take()

    def observe_examples(self, candidate_id: str, scores: dict[str, float]) -> None:
        self._heard[candidate_id] = scores

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        self._exchange.tell(candidate_id, self._heard.pop(candidate_id))

    def finished(self) -> bool:
        return self._exchange.finished()

    def close(self) -> None:
        """End gepa's thread at its next call; nothing more is proposed."""
        self._exchange.close()

    @property
    def lineage(self) -> list[dict[str, Any]]:
        return list(self._book.lineage)

    @property
    def notes(self) -> list[str]:
        return [*self._book.notes(), *self._adapter.notes()]


class _Exchange:
    """Hands candidates from gepa's thread to the searcher's, and scores back. Each side has its own methods."""

    def __init__(self, first: Proposal) -> None:
        self._changed = threading.Condition()
        self._proposals = deque([first])
        self._proposed = {candidate_id(first["candidate"])}
        self._scores: dict[str, dict[str, float]] = {}
        self._awaited: str | None = None  # id of the candidate that gepa waits for
        self._failure: Exception | None = None
        self._ended = self._closed = False

    def run(self, work: Callable[[], None]) -> None:
        """gepa's thread: do all the work and keep what it raised for `take`."""
        failure: Exception | None = None
        try:
            work()
        except Abort as abort:
            failure = abort.error
        except Exception as error:
            failure = error
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()

    def score(self, proposal: Proposal) -> dict[str, float]:
        """gepa's thread: scores by example id; waits for them. Raises Abort when the search is over."""
        key = candidate_id(proposal["candidate"])
        with self._changed:
            if key not in self._proposed:
                self._proposed.add(key)
                self._proposals.append(proposal)
            self._awaited = key
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or key in self._scores)
            self._awaited = None
            self.check()
            return self._scores[key]

    def check(self) -> None:
        """gepa's thread: raises Abort when the search is over."""
        if self._closed:
            raise Abort()

    def take(self) -> Proposal | None:
        """The next candidate; None when gepa waits for scores or has ended. Raises what ended it."""
        with self._changed:
            self._changed.wait_for(self._decided)
            if self._proposals:
                return self._proposals.popleft()
            if self._failure is not None:
                raise self._failure
            return None

    def tell(self, key: str, scores: dict[str, float]) -> None:
        with self._changed:
            self._scores[key] = scores
            self._changed.notify_all()

    def finished(self) -> bool:
        with self._changed:
            return not self._proposals and self._failure is None and (self._ended or self._closed)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _decided(self) -> bool:
        waiting = self._awaited is not None and self._awaited not in self._scores
        return bool(self._proposals) or waiting or self._ended or self._closed


class _Log:
    """gepa's log, which prints by default."""

    def log(self, message: str) -> None:
        logger.debug(message)


def _optimise(context: SearchContext, adapter: RowsAdapter, book: Book) -> None:
    """Run gepa to its end. Raises what it raises; ConfigError where it refuses the options' values."""
    options = dict(context.step.options)
    template = options.get("reflection_prompt_template")
    if isinstance(template, dict):
        options["reflection_prompt_template"] = {ComponentName(name): text for name, text in template.items()}
    # A merge swaps instructions of several predictors; with one there is nothing to swap.
    options.setdefault("use_merge", len(context.student["predictors"]) > 1)
    lent: dict[str, Any] = {"adapter": adapter, "reflection_lm": adapter.reflect, "stop_callbacks": book, "callbacks": [book]}
    quiet: dict[str, Any] = {"logger": _Log(), "run_dir": None, "track_best_outputs": False, "display_progress_bar": False}
    seed = random.Random(f"{context.seed}/gepa").randrange(2**31)
    data: dict[str, Any] = {"trainset": context.examples, "valset": list(context.search_ids)}
    try:
        gepa.optimize(to_texts(context.student), **data, **lent, **quiet, seed=seed, raise_on_exception=True, **options)
    except (ValueError, TypeError, AssertionError) as error:
        if "Total of weights" in str(error):
            raise ConfigError(
                "optimizer: gepa cannot merge candidates whose scores are below 0; set options.use_merge: false."
            ) from error
        if adapter.started:
            raise
        raise ConfigError(f"optimizer: gepa refuses its options {dict(context.step.options)}: {error}") from error
