"""Fine-tunes in forks of one process that has imported torch, transformers, TRL and DeepSpeed once.

    python -m tests.support.warm_trainer JOBS.json RESULTS.json

What a fine-tune does with its settings does not depend on Ray Train, and to import the four takes longer than to train the
tiny model. What Ray Train adds (worker processes, restarts, its record of checkpoints) is tested on a cluster.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}


def main(jobs: Path, results: Path) -> None:
    """Run every job of `jobs`, [TrainJob JSON]; `results` gets what `train_worker` returns of each, in that order."""
    from bt_ray.resources import usable_cores
    from bt_ray.training.run import worker_env

    os.environ.update({**worker_env(1, False, usable_cores()), **ALONE, "MASTER_ADDR": "127.0.0.1"})
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    results.write_text(json.dumps([in_a_fork(job) for job in json.loads(jobs.read_text())]))


def in_a_fork(job: dict[str, Any]) -> Any:
    """The answer of `train_worker`, from a child: DeepSpeed and accelerate hold state of their process."""
    answer, child = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(answer)
            with os.fdopen(child, "w") as pipe:
                json.dump(train(job), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()  # into the job's log, once that is open
            os._exit(1)
    os.close(child)
    with os.fdopen(answer) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if status == 0 else {"error": f"the fork of {job['name']} ended with {status}"}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """`train_worker` as the only worker of a group, with stand-ins for what Ray Train would tell it."""
    import ray.train
    import torch.distributed as dist

    from bt_ray.training.worker import train_worker

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    dist.init_process_group("gloo")
    context = SimpleNamespace(get_world_rank=lambda: 0, get_local_rank=lambda: 0)
    told: dict[str, Any] = {"get_context": lambda: context, "get_checkpoint": lambda: None, "report": lambda *_, **__: None}
    for name, stand_in in told.items():
        setattr(ray.train, name, stand_in)
    return train_worker({"job": job, "gpu": False})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
