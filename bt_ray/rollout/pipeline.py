"""Drives the program workers: directly for small steps, through Ray Data for large ones.

Both paths send the same batches to the same workers, so rows and their durability are the same.
Which rows exist is read from the workers' segments: a resumed step, and a batch whose worker
died, run only what is missing. Imports neither dspy nor torch.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_ray import errors
from bt_ray.environment import end_with_parent
from bt_ray.errors import BtRayError, PoolError
from bt_ray.planning import START_TIMEOUT_S
from bt_ray.rollout.dispatch import Dispatcher, own_error
from bt_ray.rollout.heartbeat import silence_limit_s
from bt_ray.rollout.rows import done_keys, read_rows
from bt_ray.rollout.tasks import Key, RolloutPlan, RolloutRow, RolloutTask

DATA_CPUS = 0.1  # Ray's default of 1 CPU per read or write task hangs a pipeline beside a replica
BLOCKS_AT_ONCE = 2  # of one proxy
BLOCK_BATCHES = 4  # groups of tasks in one block: as many as an actor's task keeps in flight
FAILURE = "failure.json"  # beside the segments: the error that stopped a Ray Data pipeline


def begin_data() -> None:
    """Import Ray Data meanwhile: it takes seconds, in which program workers start and engines take their weights."""
    threading.Thread(target=importlib.import_module, args=("ray.data",), daemon=True).start()


def run_rollouts(plan: RolloutPlan, workers: Sequence[Any], large: bool) -> None:
    """Run the tasks of a plan that have no row yet, on the given ProgramWorker actors.

    `large` goes through Ray Data; its start takes seconds, so small steps go directly. Raises PoolError,
    CanaryError, ConfigError as themselves; PoolError where workers keep dying.
    """
    if large:
        _run_data(plan, workers)
    else:
        run_direct(plan.read_tasks(), workers, plan.segment_dir, plan.timeout_s, plan.chunk_size)


def run_direct(
    tasks: Sequence[RolloutTask], workers: Sequence[Any], segment_dir: str, timeout_s: float, chunk_size: int = 16
) -> dict[Key, RolloutRow]:
    """Run the tasks that have no row in `segment_dir` yet; returns the rows of all the tasks. `timeout_s`: of the workers' ProgramSpec."""
    done = done_keys(segment_dir)
    missing = [task for task in tasks if task.key not in done]
    asyncio.run(Dispatcher(list(workers), segment_dir, silence_limit_s(timeout_s)).run(missing, chunk_size))
    rows = read_rows(segment_dir)
    return {task.key: rows[task.key] for task in tasks}


class RolloutProxy:
    """The UDF of the Ray Data pipeline: reads groups of tasks and has the workers run what lacks of them."""

    def __init__(self, plan: RolloutPlan, workers: list[Any]) -> None:
        end_with_parent()
        self._plan = plan
        self._done = done_keys(plan.segment_dir)  # read here: Ray Data builds a proxy that died anew
        self._dispatcher = Dispatcher(workers, plan.segment_dir, silence_limit_s(plan.timeout_s))

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Numbers of groups in; the same out, once their rows are on the disk."""
        tasks = [task for group in batch["group"] for task in self._plan.read_group(int(group))]
        try:
            await self._dispatcher.run([task for task in tasks if task.key not in self._done], self._plan.chunk_size)
        except BtRayError as error:
            _keep_failure(self._plan.segment_dir, error)
            raise
        return batch


def _keep_failure(segment_dir: str, error: BtRayError) -> None:
    """Ray Data hands a UDF's error on as text only; its class and message go this way."""
    path = Path(segment_dir, FAILURE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))


def _kept_failure(segment_dir: str) -> BtRayError | None:
    path = Path(segment_dir, FAILURE)
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    kind = getattr(errors, str(data["type"]), None)
    return kind(data["message"]) if isinstance(kind, type) and issubclass(kind, BtRayError) else None


def num_proxies(num_workers: int, free_cpus: float) -> int:
    """Processes of Ray Data: each holds up to eight batches in flight, for four workers. As many as have room, one at least. Pure."""
    return max(1, min(math.ceil(num_workers / 2), int(free_cpus / DATA_CPUS)))


def _run_data(plan: RolloutPlan, workers: Sequence[Any]) -> None:
    import ray.data

    Path(plan.segment_dir, FAILURE).unlink(missing_ok=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = START_TIMEOUT_S  # else it waits for ever where they find no room
    proxies = num_proxies(len(workers), ray.available_resources().get("CPU", 0.0))
    # What travels is the numbers of groups: the proxies read the tasks, the workers write the rows, and neither the object
    # store nor this process holds more of a large step than of a small one. Numbers, because Ray Data's own readers, and
    # tables in the object store, would be tasks of a whole CPU each: they wait for ever where there is none.
    groups = [{"group": number} for number in range(plan.num_groups())]
    try:
        dataset = ray.data.from_items(groups, override_num_blocks=math.ceil(len(groups) / BLOCK_BATCHES)).map_batches(
            RolloutProxy,
            fn_constructor_args=(plan, list(workers)),
            # Beside a block whose last rows are being waited for the next one begins.
            compute=ray.data.ActorPoolStrategy(size=proxies, max_concurrent_calls_per_actor=BLOCKS_AT_ONCE),
            batch_size=1,
            num_cpus=DATA_CPUS,
        )
        for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            pass  # the rows are in the segments
    except ray.exceptions.GetTimeoutError as error:
        raise PoolError(
            f"{proxies} processes of Ray Data did not start within {START_TIMEOUT_S:g} s; each needs {DATA_CPUS} logical CPUs. "
            "Look at `ray status`; give the cluster more CPUs or set cluster.program_workers lower."
        ) from error
    except Exception as error:
        raise _kept_failure(plan.segment_dir) or own_error(error) from error
