"""The LM pool: engines as replicas of one Ray Serve application, and the client that calls them.

`deploy` makes or finds the application, `ServePool` is what travels. The client retries what a lost
replica causes and nothing else: a refused prompt or a failed canary comes back as itself, at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from typing import Any, TypeVar

from bt_ray.config import EngineConfig
from bt_ray.errors import PoolError
from bt_ray.lm import lease, serve_app
from bt_ray.lm.replica import EngineReplica, Refused
from bt_ray.lm.service import ServiceOptions
from bt_ray.lm.types import LMAnswer, LMCall, Weights
from bt_ray.resources import reachable_gpus

log = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_LEASE_S = 600.0
DEFAULT_START_TIMEOUT_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


def app_of(app_name: str, model: str) -> str:
    """Name of the application of one of a run's models; the run's own model has the empty name."""
    return f"{app_name}-{model}" if model else app_name


class ServePool:
    """Client of one pool; implements LMPool. Picklable, connects by the application's name on first use.

    `start_timeout_s` bounds how long calls are retried while no replica can answer; a call that a
    living replica works on is never cut off.
    """

    def __init__(
        self,
        app_name: str,
        replicas: int = 1,
        start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
    ) -> None:
        self.app_name, self.replicas, self.start_timeout_s = app_name, replicas, start_timeout_s
        self._handle: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ServePool, (self.app_name, self.replicas, self.start_timeout_s)

    async def ensure(self, weights: Weights) -> None:
        """Return when at least one replica answers with these weights, scaling up from zero if need be."""
        if not sum((await asyncio.to_thread(serve_app.replica_states, self.app_name)).values()):
            # One is enough to go on with: the others join as they come, and may never where nodes run short.
            await asyncio.to_thread(serve_app.set_replicas, self.app_name, max(1, self.replicas), self.start_timeout_s, 1)
        await self.load(weights)

    async def generate(self, call: LMCall) -> LMAnswer:
        """Answer with exactly `call.weights`. PromptTooLongError, PoolError, CanaryError, ConfigError.

        Cancelling the awaiting task aborts the request in the engine.
        """
        return await self._call("generate", call)

    async def load(self, weights: Weights) -> None:
        """Make a replica hold these weights and check the canary.

        Serve picks the replica; the others swap when a call that names the weights reaches them.
        """
        await self._call("load", weights)

    def begin_load(self, weights: Weights) -> None:
        """Ask a replica for these weights and do not wait. What goes wrong is told to the call that needs them."""
        serve_app.handle(self.app_name).load.remote(weights)

    async def scale(self, num_replicas: int) -> None:
        """Set the number of replicas and wait until it is so. 0 gives the devices back. PoolError."""
        await asyncio.to_thread(serve_app.set_replicas, self.app_name, num_replicas, self.start_timeout_s)

    async def close(self) -> None:
        """Delete this pool's application; Serve and other applications stay."""
        await asyncio.to_thread(serve_app.delete, self.app_name)

    def renew(self) -> None:
        """Renew the lease: without this, or calls, the replicas go after the `lease_s` seconds of `deploy`."""
        lease.renew(self.app_name)

    async def pid(self) -> int:
        """Process id of one replica."""
        return await self._call("pid")

    # -- inside ------------------------------------------------------------------------------

    async def _call(self, method: str, *args: Any) -> Any:
        """One call, again and again while the infrastructure fails, until `start_timeout_s` after the first failure."""
        deadline_s, pause_s = None, FIRST_PAUSE_S
        while True:
            try:
                answer = await self._once(method, args)
            except serve_app.infrastructure_errors() as error:
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + self.start_timeout_s
                if now_s >= deadline_s:
                    raise PoolError(
                        f"pool {self.app_name}: no replica answered for {self.start_timeout_s:g} s "
                        f"({type(error).__name__}: {error}). See the replicas' logs; `ray status` shows missing resources."
                    ) from error
                log.warning("pool %s: %s; trying again in %.1f s", self.app_name, type(error).__name__, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if isinstance(answer, Refused):
                raise answer.error
            return answer

    async def _once(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._handle is None:
            self._handle = await asyncio.to_thread(serve_app.handle, self.app_name)
        response = getattr(self._handle, method).remote(*args)
        task = asyncio.ensure_future(_result(response))
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=self.start_timeout_s)
                if done:
                    return task.result()
                await self._check_alive()
        finally:
            if not task.done():
                response.cancel()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _check_alive(self) -> None:
        """A long wait is fine while a replica runs; without one it would never end."""
        states = await asyncio.to_thread(serve_app.replica_states, self.app_name)
        if not states.get("RUNNING"):
            raise PoolError(
                f"pool {self.app_name}: no replica runs after {self.start_timeout_s:g} s (states: {states or 'none'}). "
                "Call ensure() or scale(1), or free the resources that it waits for."
            )


async def _result(response: Any) -> Any:
    """Serve's response is awaitable but no coroutine. Its TaskError wraps what the replica raised."""
    from ray.exceptions import RayTaskError

    try:
        return await response
    except RayTaskError as error:
        if isinstance(error.cause, serve_app.infrastructure_errors()):
            raise error.cause from None
        raise PoolError(f"the replica failed: {error.cause!r}. Its log has the traceback.") from error


def deploy(
    app_name: str,
    config: EngineConfig,
    lease_s: float = DEFAULT_LEASE_S,
    engine_factory: str | None = None,
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
) -> ServePool:
    """Make the application `app_name`, or find it if it runs with this very config. Blocks. PoolError.

    Needs a connected Ray. No HTTP proxy is started. The engines start with their first call.
    `engine_factory` ("module:attr") replaces the vLLM engine, for tests.
    """
    key = f"{config.model_dump_json()}|{lease_s}|{engine_factory}"
    plan = serve_app.AppPlan(
        app_name=app_name,
        deployment_name=f"engine-{hashlib.sha256(key.encode()).hexdigest()[:12]}",
        replica_class=EngineReplica,
        replica_args=(_options(config, engine_factory), app_name, lease_s),
        replicas=max(1, config.replicas.min),
        max_ongoing=max(64, 4 * config.max_num_seqs),
        num_cpus=config.num_cpus,
        gpus=_gpus_per_engine(config),
        resources=config.resources,
    )
    lease.renew(app_name)
    serve_app.get_or_create(plan, start_timeout_s)
    return ServePool(app_name, max(1, config.replicas.min), start_timeout_s)


def _gpus_per_engine(config: EngineConfig) -> int:
    """GPUs that one engine takes: none where the cluster never has one."""
    return config.tensor_parallel_size if reachable_gpus() else 0


def _options(config: EngineConfig, engine_factory: str | None) -> ServiceOptions:
    gpus = _gpus_per_engine(config)
    # With more than one GPU the replica's own actor holds none: its workers do.
    return ServiceOptions(config, engine_factory, gpus=gpus if gpus > 1 else None)
