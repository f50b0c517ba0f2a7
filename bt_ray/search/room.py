"""Room for the processes of trials: when they started, and a limit to the wait for the first of them."""

from __future__ import annotations

import time
from typing import Any

from ray import tune

from bt_ray.errors import PoolError
from bt_ray.planning import START_TIMEOUT_S
from bt_ray.search.conduct import Conduct

TRIAL_CPUS = 0.25  # a trial only waits for the program workers


class Starts(tune.Callback):
    """Notes when the processes of trials are up, and fails the search where none finds room: Tune would wait for ever."""

    def __init__(self, conduct: Conduct) -> None:
        self.at_s: dict[str, float] = {}
        self._conduct = conduct
        self._waiting_since_s: float | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.at_s.setdefault(trial.trial_id, time.monotonic())

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        states = {trial.status for trial in trials} - {"TERMINATED", "ERROR"}
        if states != {"PENDING"}:
            self._waiting_since_s = None
            return
        now_s = time.monotonic()
        self._waiting_since_s = self._waiting_since_s or now_s
        if now_s - self._waiting_since_s > START_TIMEOUT_S:
            error = PoolError(
                f"search: no process for a candidate could start within {START_TIMEOUT_S:g} s; each needs {TRIAL_CPUS} logical "
                "CPUs. Look at `ray status`; give the cluster more CPUs or set cluster.program_workers lower."
            )
            self._conduct.failure = self._conduct.failure or error
            raise error

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts into the scratch folder; ours are not read back
