"""The user's program in this process, for optimisers that run it themselves (DSPy's teleprompters).

Its LM is the pool, and each call is answered once: `JournalPool` keeps the answers, and a sampled
call's seed follows from what is asked and not from when. So an interrupted compile that is run
again finds its answers, whatever order its threads had.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from bt_ray.errors import CandidateError, ConfigError
from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.call_context import DYNAMIC, SETTINGS_KEY, CallContext, CallRecord, call_seed
from bt_ray.lm.dspy_engine import MODEL, AsyncPoolEngine, LoopThread, PoolEngine
from bt_ray.lm.journal import JournalPool, call_key
from bt_ray.lm.types import LMAnswer, LMCall, LMPool, Weights
from bt_ray.rollout import candidates
from bt_ray.rollout.program import Metric, ProgramSpec, field_names, load_metric, load_program
from bt_ray.rollout.runner import read_score

# DSPy stops an optimiser after ten examples that fail. A run that fails is a low score here; only
# the pool's faults end a compile.
MAX_ERRORS = 10**9

PROPOSER_KEY = "bt_ray_proposer"  # name of the proposer's LM in dspy.settings; None where it is the program's

Candidate = dict[str, Any]
Row = dict[str, Any]
Work = Callable[[dspy.Module, Callable[..., Any], list[dspy.Example], list[dspy.Example]], dspy.Module]


@dataclass(frozen=True)
class ProgramSession:
    """Where and how an optimiser runs the program.

    `temperature` and `max_tokens` hold where neither the program nor the optimiser sets its own.
    `proposer_max_tokens` is for the optimiser's own predictors, which write more than the
    program's answers; predictors that the program builds while it runs get it too.
    """

    spec: ProgramSpec
    pool: JournalPool
    weights: Weights
    temperature: float = 0.0
    max_tokens: int = 256
    proposer_max_tokens: int = 256
    seed: int = 0
    num_threads: int = 8  # program runs at once, unless the optimiser is told a number
    proposer: tuple[LMPool, Weights] | None = None  # the LM of the optimiser's own predictors, where it is another

    def compile(self, student: Candidate, trainset: Sequence[Row], valset: Sequence[Row], work: Work) -> Candidate:
        """The prompts of the program that `work(program, metric, trainset, valset)` returns; blocks.

        `student`: the prompts that `program` starts with. Rows are {"id", "inputs", "labels"}.
        `work` gets a metric(example, prediction, trace=None), which with a trace says whether the run
        passes. Raises what `work` raises; PoolError, CanaryError and BudgetError, whatever `work` made of them;
        ConfigError where the program has other predictors than before, CandidateError where they have other fields.
        """
        # Its lines hold examples, instructions and answers: rows and journals have them, and no log.
        logging.getLogger("dspy").setLevel(logging.CRITICAL)
        program = candidates.apply(load_program(self.spec), student)
        metric = _metric(load_metric(self.spec), self.spec.metric_threshold)
        fields = field_names(program)  # now: an optimiser may change the program that it is given
        train, val = ([_example(row) for row in rows] for rows in (trainset, valset))
        with self._calls() as context, dspy.context(**self._settings(context)):
            compiled = work(program, metric, train, val)
        return _prompts(compiled, fields)

    @contextmanager
    def _calls(self) -> Iterator[_SessionCalls]:
        """The calls of one compile, on a loop of their own. Raises the pool's fault, if there was one."""
        thread = LoopThread()
        draw = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        own = {"proposer_max_tokens": self.proposer_max_tokens, "proposer": self.proposer}
        context = _SessionCalls(self.pool, self.weights, thread.loop, **draw, **own)  # type: ignore[arg-type]
        try:
            yield context
        finally:
            context.close()
            thread.close()
            if context.fatal is not None:
                raise context.fatal

    def _settings(self, context: _SessionCalls) -> dict[str, Any]:
        return {
            "lm": _lm(None),
            PROPOSER_KEY: _lm(self.proposer[1]) if self.proposer else None,
            "adapter": make_adapter(self.spec.adapter, self.spec.constrain),
            "trace": [],
            "num_threads": self.num_threads,
            "max_errors": MAX_ERRORS,
            "disable_history": True,
            "warn_on_type_mismatch": False,
            SETTINGS_KEY: context,
        }


@dataclass
class _Draws:
    """Which draw of equal requests a call is: DSPy's rollout_id, and the number within `n` completions."""

    rollout_id: int = 0
    made: int = 0


_DRAWS: ContextVar[_Draws | None] = ContextVar("bt_ray_draws", default=None)


class _SessionLM(dspy.LM):  # type: ignore[misc]
    """Notes the rollout_id of each call, which DSPy keeps from the engine."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _DRAWS.set(self._draws(kwargs))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _DRAWS.reset(token)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        token = _DRAWS.set(self._draws(kwargs))
        try:
            return await super().acall(*args, **kwargs)
        finally:
            _DRAWS.reset(token)

    def _draws(self, kwargs: dict[str, Any]) -> _Draws:
        return _Draws({**self.kwargs, **kwargs}.get("rollout_id") or 0)


def _lm(weights: Weights | None) -> _SessionLM:
    """An LM of the session: with the program's weights, or with others."""
    engines = {"engine": PoolEngine(weights), "async_engine": AsyncPoolEngine(weights)}
    return _SessionLM(MODEL, **engines, cache=False, num_retries=0)


@dataclass(frozen=True)
class _TwoPools:
    """Calls that name the proposer's weights go to its pool."""

    program: LMPool
    proposer: LMPool
    weights: Weights

    async def generate(self, call: LMCall) -> LMAnswer:
        pool = self.proposer if call.weights.id == self.weights.id else self.program
        return await pool.generate(call)


@dataclass
class _SessionCalls(CallContext):
    """The LM calls of one compile.

    As with DSPy's own cache, equal requests have one answer unless their rollout_id differs.
    """

    proposer_max_tokens: int = field(default=256, kw_only=True)
    proposer: tuple[LMPool, Weights] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.proposer is not None:
            self.pool = _TwoPools(self.pool, *self.proposer)  # type: ignore[assignment]

    def open_record(self, predictor: str) -> tuple[CallRecord, int]:
        """A record that is not kept: a compile makes very many, and the journal has the answers."""
        return {"predictor": predictor, "inputs": {}, "outputs": None, "text": None}, 0

    def submit(self, call: LMCall, record: CallRecord) -> concurrent.futures.Future[LMAnswer]:
        return super().submit(self._drawn(call, record["predictor"]), record)

    def _drawn(self, call: LMCall, predictor: str) -> LMCall:
        sampling = call.sampling
        if predictor == DYNAMIC and sampling.max_tokens == self.max_tokens:
            sampling = replace(sampling, max_tokens=max(self.max_tokens, self.proposer_max_tokens))
        draws = _DRAWS.get() or _Draws()
        draws.made += 1
        if sampling.temperature > 0:
            key = call_key(replace(call, sampling=replace(sampling, seed=None)))
            sampling = replace(sampling, seed=call_seed(self.seed, key, draws.rollout_id, draws.made))
        return replace(call, sampling=sampling)


def _metric(metric: Metric, threshold: float | None) -> Callable[..., Any]:
    """The user's metric as DSPy's optimisers call it; the last two parameters are those of GEPA's metrics."""

    def judge(example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        if pred_name is not None and metric.takes_predictor:
            return metric.of_predictor(example, prediction, trace, pred_name, pred_trace)
        value = metric(example, prediction, trace)
        if trace is None or threshold is None or pred_name is not None:
            return value
        return read_score(value, ("of the compile", 0))[0] >= threshold

    return judge


def _example(row: Row) -> dspy.Example:
    return dspy.Example(**row["inputs"], **row["labels"]).with_inputs(*row["inputs"])


def _prompts(compiled: Any, fields: dict[str, dict[str, list[str]]]) -> Candidate:
    if not isinstance(compiled, dspy.Module):
        raise ConfigError(f"The optimiser returned a {type(compiled).__name__}; its compile must return the program.")
    candidate = candidates.extract(compiled)
    if set(candidate["predictors"]) != set(fields):
        raise ConfigError(
            f"The optimiser returned a program with predictors {', '.join(candidate['predictors']) or 'none'} where the program has "
            f"{', '.join(fields)}. A step can change prompts only; take an optimiser that keeps the program's modules."
        )
    if changes := _changed_fields(fields, field_names(compiled)):
        raise CandidateError(f"{', '.join(changes)}. A step can change prompts only")
    for name, predictor in compiled.named_predictors():
        # DSPy gives every predictor the labelled examples; without any of its outputs one shows nothing.
        state = candidate["predictors"][name]
        state["demos"] = [
            demo for demo in state["demos"] if any(demo.get(field) is not None for field in predictor.signature.output_fields)
        ]
    return candidate


def _changed_fields(before: dict[str, dict[str, list[str]]], after: dict[str, dict[str, list[str]]]) -> list[str]:
    """Fields that predictors lost or got, in words."""
    return [
        f"the predictor {name!r} {word} the {kind.removesuffix('s')} {field!r}"
        for name, kinds in before.items()
        for kind, fields in kinds.items()
        for word, here, there in (("lost", fields, after[name][kind]), ("got", after[name][kind], fields))
        for field in here
        if field not in there
    ]


__all__ = ["ProgramSession"]
