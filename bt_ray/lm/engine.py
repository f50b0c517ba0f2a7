"""One vLLM engine: start, answer, swap weights, and never answer before its canary agreed."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

from bt_ray.errors import CanaryError, ConfigError, PoolError, PromptTooLongError
from bt_ray.lm import canary, engine_vllm, node_cache
from bt_ray.lm.settings import EngineSettings
from bt_ray.lm.types import CanaryCase, LMAnswer, LMCall, Weights
from bt_ray.lm.weights import engine_key, lora_rank, swap_mode

log = logging.getLogger(__name__)
READER_END_S = 5.0  # at the interpreter's exit; it has nothing left to do


class NeedsRestart(Exception):
    """The engine cannot take these weights in place; close it and start one with them."""


class EngineDied(Exception):
    """The engine's process is gone; nothing that was asked of it will be answered."""


class Engine:
    """Wraps one AsyncLLM, whose core runs in a process of its own.

    Not for concurrent `start`/`swap`/`close`: the caller's gate lets one of them run, and only
    while no `generate` does. Every method raises EngineDied once the engine's process is gone.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.held: Weights | None = None  # what answers; None: nothing, start() is next
        self._llm: Any = None
        self._tokenizer: Any = None
        self._at_exit: Callable[[], None] = lambda: None
        self._adapters: dict[str, asyncio.Task[None]] = {}  # canary runs of run-time adapters, by weights id
        self._ranks: dict[str, int] = {}  # ranks of adapters seen, by weights id
        self._folders: dict[str, str] = {}  # where run-time adapters are read from, by weights id

    def key(self, weights: Weights) -> str:
        """Weights of equal keys are answered at the same time; others need `swap` in between."""
        # On a CPU vLLM gives base requests the adapter of the last slot when both stand in one batch.
        if self.settings.lora != "runtime" or self.settings.device == "cpu":
            return engine_key(weights, "merge")
        key = engine_key(weights, "runtime")
        # An adapter that does not fit the kernels' rank waits until the others have left.
        return key if self._rank(weights) <= self.settings.max_lora_rank else f"{key}:rank {self._rank(weights)}"

    async def start(self, weights: Weights) -> None:
        """Start with `weights` and run their canary. CanaryError leaves no engine behind."""
        _need_canary(weights)
        await self.close()
        settings = self.settings
        if self._at_run_time(weights):
            settings = settings.with_lora_rank(self._rank(weights))
        log.info("%s; weights %s", settings.describe(), weights.id)
        # In a thread, as what follows: it blocks for as long as the disk or the engine takes, and this loop has other requests.
        near = node_cache.base_folder if self._at_run_time(weights) else node_cache.model_folder
        folder = await asyncio.to_thread(near, weights)
        node_cache.keep_only([folder])
        try:
            await asyncio.to_thread(self._start_llm, settings, folder)
        except engine_vllm.start_errors() as error:
            gc.collect()  # half an engine holds memory, too
            raise PoolError(
                f"engine: vLLM did not start ({type(error).__name__}: {str(error)[:300]}). It was to be: "
                f"{settings.describe().removeprefix('engine: ')}. Its log, in that of the replica, has the cause. Where memory "
                "is short, lower engine.kv_cache_gib, engine.max_model_len or engine.replicas, or raise "
                "engine.tensor_parallel_size."
            ) from error
        self.settings = settings
        # Late, so that it comes before multiprocessing's own at the exit, which waits for the engine's process for ever.
        self._at_exit = functools.partial(_end, weakref.ref(self), asyncio.get_running_loop())
        atexit.register(self._at_exit)
        self._tokenizer = self._llm.get_tokenizer()
        await self._hold(weights)

    def _start_llm(self, settings: EngineSettings, folder: str) -> None:
        """Returns nothing: the thread's future would hold the AsyncLLM for as long as a frame of its start is remembered."""
        self._llm = engine_vllm.start_llm(settings, folder)

    async def swap(self, weights: Weights) -> None:
        """Take `weights` in place and run their canary. Raises NeedsRestart where that cannot be right."""
        _need_canary(weights)
        if self.settings.lora == "runtime":
            return await self._swap_adapter(weights)
        mode = "restart" if self._llm is None else swap_mode(self.held, weights)
        if mode == "restart":
            raise NeedsRestart(weights.id)
        if mode == "hot":
            self.held = None
            await self._reload(weights)
            await self._hold(weights)

    async def _reload(self, weights: Weights) -> None:
        folder = await asyncio.to_thread(node_cache.model_folder, weights)
        try:
            await self._llm.pause_generation(mode="wait")
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            if not await self._llm.reset_prefix_cache():
                raise NeedsRestart(weights.id)  # blocks of the old weights would be reused
            await self._llm.resume_generation()
            node_cache.keep_only([folder])
        except engine_vllm.dead_engine_errors() as error:
            raise EngineDied(str(error)) from error

    async def _swap_adapter(self, weights: Weights) -> None:
        held = self.held
        if self._llm is None or held is None or engine_key(held, "runtime") != engine_key(weights, "runtime"):
            raise NeedsRestart(weights.id)
        if self._rank(weights) > self.settings.max_lora_rank:
            raise NeedsRestart(weights.id)
        await self._checked_adapter(weights)
        self.held = weights

    async def generate(self, call: LMCall, request_id: str) -> LMAnswer:
        """Answer with the held weights. PromptTooLongError, ConfigError (a constraint vLLM refuses).

        Cancelling the awaiting task aborts the request. `max_tokens` shrinks to what the context leaves.
        """
        if self.held is None or self.key(self.held) != self.key(call.weights):
            raise PoolError(f"engine: asked for weights {call.weights.id}, but it holds {self.held and self.held.id}.")
        if self.settings.lora == "runtime":
            _need_canary(call.weights)
            await self._checked_adapter(call.weights)
        prompt = list(call.prompt_token_ids) if not call.messages else canary.render(self._tokenizer, call.messages)
        room = self.settings.max_model_len - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens and asks for {call.sampling.max_tokens} more, "
                f"the context holds {self.settings.max_model_len}. "
                "Shorten the input, use fewer demos or raise engine.max_model_len."
            )
        params = engine_vllm.sampling_params(call.sampling, min(call.sampling.max_tokens, room))
        try:
            output = await self._final(prompt, params, request_id, call.weights)
        except engine_vllm.request_errors() as error:
            raise ConfigError(f"engine: vLLM refuses the request ({error}). Check rollout.constrain and the signature.") from None
        best = output.outputs[0]
        self._check_stamp(best, call.weights)
        if best.finish_reason == "abort":
            raise PoolError(f"engine: request {request_id} was aborted by the engine.")
        return LMAnswer(
            text=best.text,
            token_ids=tuple(best.token_ids),
            prompt_token_ids=tuple(prompt),
            finish_reason="length" if best.finish_reason == "length" else "stop",
            weights_id=call.weights.id,
            cached_tokens=output.num_cached_tokens or 0,
        )

    async def pulse(self) -> None:
        """Return once the engine's process has answered, which it does between two steps; at once where there is none."""
        if self._llm is not None:
            with contextlib.suppress(*engine_vllm.dead_engine_errors()):  # the calls themselves find that out
                await self._llm.is_sleeping()

    async def close(self) -> None:
        """Stop the engine's process and wait for its end."""
        llm, self._llm, self.held = self._llm, None, None
        self._adapters = {}
        if llm is not None:
            atexit.unregister(self._at_exit)
            await asyncio.to_thread(llm.shutdown)
            llm = None
            gc.collect()  # AsyncLLM stands in reference cycles, and its __del__ fails once the interpreter ends

    # -- inside ------------------------------------------------------------------------------

    def _at_run_time(self, weights: Weights) -> bool:
        return self.settings.lora == "runtime" and weights.kind == "lora"

    def _rank(self, weights: Weights) -> int:
        if weights.kind != "lora":
            return 0
        if weights.id not in self._ranks:
            self._ranks[weights.id] = lora_rank(weights.adapter_dir or "")
        return self._ranks[weights.id]

    async def _hold(self, weights: Weights) -> None:
        """Stamp the engine with `weights`, run the canary, and only then let it answer."""
        if self.settings.lora == "runtime":
            await self._checked_adapter(weights)
            self.held = weights
            return
        await self._llm.update_weight_version(weights.id)
        await self._run_canary(weights)
        self.held = weights

    async def _checked_adapter(self, weights: Weights) -> None:
        """Run the canary of `weights` once, however many calls ask at the same time."""
        task = self._adapters.get(weights.id)
        if task is None:
            task = self._adapters[weights.id] = asyncio.create_task(self._run_canary(weights))
        try:
            await asyncio.shield(task)
        finally:
            if task.done() and (task.cancelled() or task.exception()):
                self._adapters.pop(weights.id, None)  # asked again, it is checked again

    async def _run_canary(self, weights: Weights) -> None:
        """Raise CanaryError, and close the engine, unless every case answers as transformers does. CommitError for an adapter
        whose files are not those of its id."""
        if self._at_run_time(weights):
            self._folders[weights.id] = await asyncio.to_thread(node_cache.adapter_folder, weights)
        runs = [self._canary_case(case, weights, number) for number, case in enumerate(weights.canary)]
        found = [f"case {number}: {text}" for number, text in enumerate(await asyncio.gather(*runs)) if text]
        if found:
            await self._let_go()
            raise CanaryError(
                f"canary: the engine ({self.settings.dtype}, adapters {self.settings.lora}) disagrees with transformers "
                f"on weights {weights.id}: {'; '.join(found)}. Nothing was promoted; the next call starts a fresh engine."
            )
        log.info("canary of weights %s passed (%d cases)", weights.id, len(weights.canary))

    async def _let_go(self) -> None:
        """After a failed canary: a run-time adapter is refused alone, merged weights take the engine down."""
        if self.settings.lora == "merge" or self.held is None:
            await self.close()

    async def _canary_case(self, case: CanaryCase, weights: Weights, number: int) -> str | None:
        params = engine_vllm.canary_params(len(case.token_ids))
        output = await self._final(list(case.prompt_token_ids), params, f"canary-{weights.id}-{number}", weights)
        best = output.outputs[0]
        margins = engine_vllm.margins_of(best.logprobs)
        return canary.compare(case, best.token_ids, canary.tie_margin(self.settings.dtype), margins)

    async def _final(self, prompt: list[int], params: Any, request_id: str, weights: Weights) -> Any:
        adapter = None
        if self._at_run_time(weights):
            adapter = engine_vllm.adapter_request(weights.id, self._folders[weights.id])
        final: Any = None
        stream = self._llm.generate({"prompt_token_ids": prompt}, params, request_id, lora_request=adapter)
        try:
            async for output in stream:
                final = output
        except engine_vllm.dead_engine_errors() as error:
            raise EngineDied(str(error)) from error
        if final is None:
            raise PoolError(f"engine: request {request_id} ended without an answer.")
        return final

    def _check_stamp(self, completion: Any, weights: Weights) -> None:
        """vLLM says which weights made each token; with merged weights they must be the call's."""
        spans = getattr(completion, "weight_versions", None)
        if self.settings.lora == "merge" and spans:
            found = {span.version for span in spans}
            if found != {weights.id}:
                raise PoolError(f"engine: answered with weights {sorted(map(str, found))} instead of {weights.id}.")


def _end(engine: weakref.ref[Engine], loop: asyncio.AbstractEventLoop) -> None:
    """Stop the process of an engine that nobody closed, as its interpreter ends. `loop`: the engine's.

    Its reader goes first: else it takes the process's end for a failure, logs that, and holds the AsyncLLM until nothing is
    left that its __del__ calls.
    """
    found = engine()
    if found is None or found._llm is None:
        return
    llm, found._llm = found._llm, None
    if loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_reader(llm), loop).result(READER_END_S)
    llm.shutdown()
    llm = None
    gc.collect()  # as in close()


async def _end_reader(llm: Any) -> None:
    if (reader := llm.output_handler) is not None:
        reader.cancel()
        await asyncio.wait([reader])


def _need_canary(weights: Weights) -> None:
    if not weights.canary:
        raise CanaryError(f"canary: weights {weights.id} carry no canary cases; compute them where the weights are made.")
