"""The Serve deployment's class: one engine service, a watchdog for the lease, and hard exits."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from dataclasses import dataclass

from bt_ray.environment import exit_hard
from bt_ray.errors import BtRayError, PoolError
from bt_ray.lm import lease
from bt_ray.lm.engine import EngineDied
from bt_ray.lm.service import EngineService, ServiceOptions
from bt_ray.lm.types import LMAnswer, LMCall, Weights

log = logging.getLogger(__name__)
LOOKS_PER_LEASE = 10


@dataclass(frozen=True)
class Refused:
    """An error of ours on its way to the client; returned and not raised, so that Ray neither wraps nor logs it."""

    error: BtRayError


class EngineReplica:
    """One replica: the engine starts with the first call, with the weights which that call names."""

    def __init__(self, options: ServiceOptions, app_name: str, lease_s: float) -> None:
        _log_to_stderr()
        self._service = EngineService(options, on_stall=exit_hard)
        self._app_name, self._lease_s = app_name, lease_s
        self._used_s = time.monotonic()
        self._stop = threading.Event()
        if options.engine_factory is None:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            # The import takes about ten seconds: let them pass while nobody waits.
            threading.Thread(target=importlib.import_module, args=("vllm",), daemon=True).start()
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    async def generate(self, call: LMCall) -> LMAnswer | Refused:
        """Answer one call."""
        return await self._guarded(self._service.generate(call))

    async def load(self, weights: Weights) -> Refused | None:
        """Hold these weights."""
        return await self._guarded(self._service.load(weights))

    async def pid(self) -> int:
        """Process id of this replica, for the log and for tests of its death."""
        return os.getpid()

    async def __del__(self) -> None:
        # Serve calls this when it stops a replica; the engine's process must not outlive it.
        self._stop.set()
        await self._service.close()

    async def _guarded(self, answer):  # type: ignore[no-untyped-def]
        self._used_s = time.monotonic()
        try:
            return await answer
        except BtRayError as error:
            return Refused(error)
        except EngineDied as error:
            exit_hard(f"the engine died ({error})")
        except Exception as error:
            # Classes of torch and vllm cannot be unpickled by a client that has neither.
            log.exception("a call failed inside the replica")
            return Refused(PoolError(f"the replica failed: {type(error).__name__}: {error}. Its log has the traceback."))
        finally:
            self._used_s = time.monotonic()

    def _watch_lease(self) -> None:
        """Delete the application once nobody renewed the lease, nor used this replica, for `lease_s`."""
        watch = lease.Watch()
        while not self._stop.wait(self._lease_s / LOOKS_PER_LEASE):
            now_s = time.monotonic()
            if self._service.busy or now_s - self._used_s < self._lease_s / LOOKS_PER_LEASE:
                lease.renew(self._app_name)  # other replicas of this application may have nothing to do
            if watch.unchanged_s(lease.read(self._app_name), now_s) >= self._lease_s:
                from ray import serve

                log.warning("nobody renewed the lease of %s for %g s: deleting it", self._app_name, self._lease_s)
                serve.delete(self._app_name, _blocking=False)


def _log_to_stderr() -> None:
    """Ray shows a worker's stderr; the sentence on the engine's settings belongs there."""
    ours = logging.getLogger("bt_ray")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        ours.addHandler(handler)
