"""The engine through which dspy programs talk to an LMPool.

`PoolLM("local/...", engine=PoolEngine(), async_engine=AsyncPoolEngine())` is one LM for the
whole program. Which predictor calls is read from dspy's stack of caller modules, whose
predictors carry their names as a tag: the tag survives `deepcopy`, so modules that copy their
inner program (dspy.BestOfN, dspy.Refine) are still told apart.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy import lm15

from bt_ray.errors import ConfigError, PromptTooLongError
from bt_ray.lm.call_context import CALL_SITE, DYNAMIC, PREDICTOR_TAG, SETTINGS_KEY, CallContext, CallRecord
from bt_ray.lm.pool_lm import PoolLM
from bt_ray.lm.types import LMAnswer, LMCall, LMPool, Sampling, Weights

MODEL = "local/bt_ray"
ENDPOINT_KEYS = ("lm", "api_base", "base_url", "api_key", "model_list")  # of a predictor's saved state
PROMPT_KEYS = ("signature", "extended_signature", "fields", "demos", "traces", "train")  # its fields may have any name


class PoolEngine:
    """Sync engine of dspy.LM: for programs without `aforward`, which run in a thread.

    `weights`: what its calls ask for where that is not what the rollout's context says.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        self._weights = weights

    def __deepcopy__(self, memo: dict[int, Any]) -> PoolEngine:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request of the current rollout; blocks the calling thread."""
        return _response(request, self.ask(_messages(request), request.config))

    def ask(self, messages: list[dict[str, str]], config: lm15.Config) -> LMAnswer:
        """The pool's answer to chat messages. As `complete`, without DSPy's forms of request and response."""
        context = current_context()
        if _running_loop() is context.loop:
            raise RuntimeError(
                "a predictor was called without await inside an async program, which would block every other "
                "program run; write `await predictor.acall(...)`, or give the program `forward` instead of `aforward`"
            )
        call, record = build_call(context, messages, config, self._weights)
        try:
            return context.submit(call, record).result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the program run was cancelled while it waited for the LM") from None
        except PromptTooLongError as error:
            raise lm15.ContextLengthError(str(error)) from error


class AsyncPoolEngine:
    """Async engine of dspy.LM: for programs with `aforward`. `weights` as in PoolEngine."""

    def __init__(self, weights: Weights | None = None) -> None:
        self._weights = weights

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncPoolEngine:
        return self

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request of the current rollout. Cancelling it cancels the pool's call."""
        return _response(request, await self.ask(_messages(request), request.config))

    async def ask(self, messages: list[dict[str, str]], config: lm15.Config) -> LMAnswer:
        """As PoolEngine.ask."""
        context = current_context()
        call, record = build_call(context, messages, config, self._weights)
        try:
            if _running_loop() is context.loop:
                return await context.answer(call, record)
            # The program runs a loop of its own in its thread.
            return await asyncio.wrap_future(context.submit(call, record))
        except PromptTooLongError as error:
            # dspy's own type for it: modules such as ReAct shorten their prompt and try again.
            raise lm15.ContextLengthError(str(error)) from error


def make_lm() -> PoolLM:
    """The LM of a program whose calls belong to the CallContext in dspy's settings."""
    return PoolLM(MODEL, engine=PoolEngine(), async_engine=AsyncPoolEngine(), cache=False, num_retries=0)


def current_context() -> CallContext:
    """The CallContext of the running program. RuntimeError in a thread that dspy does not know."""
    context = dspy.settings.get(SETTINGS_KEY)
    if not isinstance(context, CallContext):
        raise RuntimeError(
            "an LM call came from a thread that does not carry dspy's context; start threads with dspy.Parallel, "
            "dspy.asyncify or contextvars.copy_context().run"
        )
    return context


def build_call(
    context: CallContext, messages: list[dict[str, str]], config: lm15.Config, weights: Weights | None = None
) -> tuple[LMCall, CallRecord]:
    """The pool's call for one of dspy's, and its open record.

    What the program sets for a predictor (temperature, max_tokens, top_p, stop) is part of the
    program and wins over the rollout's values. Greedy calls carry no seed.
    """
    record, seed = context.open_record(_predictor_name())
    site = CALL_SITE.get()
    temperature = context.temperature if config.temperature is None else float(config.temperature)
    stop = tuple(config.stop or ())
    if site is not None:
        record["inputs"] = site.inputs
        site.records.append(record)
        stop = (*site.stop, *stop)
    sampling = Sampling(
        temperature=temperature,
        max_tokens=context.max_tokens if config.max_tokens is None else int(config.max_tokens),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        seed=seed if temperature > 0 else None,
        stop=stop,
        constraint=None if site is None else site.constraint,
    )
    part = (weights or context.weights).part_for(record["predictor"])
    return LMCall(weights=part, sampling=sampling, messages=tuple(messages)), record


class LoopThread:
    """An event loop in a daemon thread, for programs that are called outside a rollout."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="bt_ray-lm", daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        """Stop the loop; its thread ends."""
        self.loop.call_soon_threadsafe(self.loop.stop)


@dataclass(frozen=True)
class Binding:
    """What a program needs to answer outside a rollout."""

    pool: LMPool
    weights: Weights
    adapter: dspy.Adapter
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0


class BoundProgram(dspy.Module):  # type: ignore[misc]
    """A program with its weights and adapter, called like any dspy module.

    The inner program stays reachable as `program`, for saving or inspection. Raises the pool's own
    error where the pool fails, whatever the program made of it.
    """

    def __init__(self, program: dspy.Module, binding: Binding, thread: LoopThread) -> None:
        super().__init__()
        self.program = program
        self._binding = binding
        self._thread = thread

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, settings = self._open()
        try:
            with dspy.context(**settings):
                return self.program(*args, **kwargs)
        finally:
            if context.fatal is not None:
                raise context.fatal

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        context, settings = self._open()
        try:
            with dspy.context(**settings):
                return await self.program.acall(*args, **kwargs)
        finally:
            if context.fatal is not None:
                raise context.fatal

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """State of the inner program, which loads it as it is, and under `bt_ray` what it was tuned with."""
        bound = self._binding
        tuned = {"adapter": getattr(bound.adapter, "format_name", type(bound.adapter).__name__), "weights": bound.weights.id}
        return {**self.program.dump_state(json_mode=json_mode), "bt_ray": tuned}

    def load_state(self, state: dict[str, Any], **options: Any) -> None:
        """Load a state into the inner program. Raises ConfigError for prompts that another adapter was used with."""
        theirs = (state.get("bt_ray") or {}).get("adapter")
        mine = getattr(self._binding.adapter, "format_name", None)
        if theirs is not None and theirs != mine:
            raise ConfigError(
                f"the state was tuned with the adapter {theirs!r}, this program answers with {mine!r}. Use {theirs!r}."
            )
        if named := endpoint_in(state):
            raise ConfigError(
                f"the state names an LM or endpoint of its own ({named}), to which every prompt would go. This program answers "
                f"with its own weights: remove {named!r} from the file."
            )
        self.program.load_state(state, **options)

    def load(self, path: str | Path, **options: Any) -> None:
        """Load a saved state. Raises ConfigError for a file that is no JSON state: a pickle could run anyone's code."""
        if Path(path).suffix != ".json":
            raise ConfigError(f"{path} is no .json file: a program's state is never unpickled. Save it with `save('NAME.json')`.")
        try:
            super().load(path, **options)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} holds no state of this program ({type(error).__name__}: {str(error)[:200]}). Save it again."
            ) from None

    def _open(self) -> tuple[CallContext, dict[str, Any]]:
        bound = self._binding
        draw = {"temperature": bound.temperature, "max_tokens": bound.max_tokens, "seed": bound.seed}
        context = CallContext(bound.pool, bound.weights, self._thread.loop, **draw)  # type: ignore[arg-type]
        return context, {SETTINGS_KEY: context, "lm": make_lm(), "adapter": bound.adapter}

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProgram:
        # The pool, its loop and the weights are shared; only the program is copied.
        return BoundProgram(self.program.deepcopy(), self._binding, self._thread)


def endpoint_in(state: Any, above: str = "") -> str | None:
    """Dotted name of the first entry of a program's state that would send its calls elsewhere, or None. Pure."""
    for key, value in state.items() if isinstance(state, dict) else ():
        name = f"{above}.{key}" if above else str(key)
        if key in ENDPOINT_KEYS and value:
            return name
        if key not in PROMPT_KEYS and (found := endpoint_in(value, name)):
            return found
    return None


def _predictor_name() -> str:
    for module in reversed(dspy.settings.caller_modules or []):
        if isinstance(module, dspy.Predict):
            return str(getattr(module, PREDICTOR_TAG, DYNAMIC))
    return DYNAMIC


def _messages(request: lm15.Request) -> list[dict[str, str]]:
    messages = []
    if request.system:
        messages.append({"role": "system", "content": request.system})
    messages.extend({"role": message.role, "content": message.text} for message in request.messages)
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(f"a {message['role']} message holds more than text; the pool's models read text only")
    return messages


def _response(request: lm15.Request, answer: LMAnswer) -> lm15.Response:
    usage = lm15.Usage(
        input_tokens=len(answer.prompt_token_ids),
        output_tokens=len(answer.token_ids),
        total_tokens=len(answer.prompt_token_ids) + len(answer.token_ids),
        cache_read_tokens=answer.cached_tokens,
    )
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message.assistant([lm15.TextPart(answer.text)]),
        finish_reason="length" if answer.finish_reason == "length" else "stop",
        usage=usage,
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
