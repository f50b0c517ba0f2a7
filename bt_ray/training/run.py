"""Run one fine-tune on the cluster with Ray Train.

This process stays light: torch and trl are imported by the workers alone.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.lm.types import Weights
from bt_ray.resources import reachable_gpus, usable_cores
from bt_ray.runs.files import full_disk
from bt_ray.training.job import TrainJob, TrainResult
from bt_ray.training.worker import log_path, train_worker, trainer_dir

__all__ = ["TrainJob", "TrainResult", "train"]

# Times that Ray Train may wait 60 s for its placement group (or start its workers) in vain; its own default is for ever.
MAX_START_ATTEMPTS = 5
CHECKPOINTS_KEPT = 2  # the newest may hold weights whose loss was never seen


def train(job: TrainJob) -> TrainResult:
    """Train as `job` says and return the exported weights. Needs an initialised ray.

    Lost workers are replaced up to `step.max_failures` times and go on from the last epoch's
    checkpoint, as does a later call with the same name and scratch_dir. Raises TrainingError:
    rows that cannot be used, a loss that is not finite, workers that cannot start or keep dying.
    """
    from ray.train import TrainingFailedError

    started = time.monotonic()
    step = WeightStep.model_validate(job.step)
    gpu = _use_gpu(job, step)
    Path(job.out_dir).mkdir(parents=True, exist_ok=True)
    Path(job.scratch_dir).mkdir(parents=True, exist_ok=True)
    log = log_path(job, 0)
    try:
        result = _trainer(job, step, gpu).fit()
    except TrainingFailedError as error:
        if full := full_disk(Path(job.scratch_dir), error):
            raise full from error
        raise TrainingError(
            f"fine-tune {job.name}: {_first_line(error)} after {step.max_failures} allowed failures. "
            f"The workers' output is in {log.parent}; the last checkpoint is kept in {Path(job.scratch_dir) / job.name}, "
            "and running again goes on from it."
        ) from error
    returned = result.return_value
    if not isinstance(returned, dict):
        raise TrainingError(f"fine-tune {job.name}: the first worker returned nothing. Read {log}.")
    if "error" in returned:
        raise TrainingError(f"{returned['error']} ({job.name}; output in {log})")
    shutil.rmtree(trainer_dir(job), ignore_errors=True)  # Ray Train holds its own copy of the checkpoints
    return TrainResult(
        weights=Weights.from_json(returned["weights"]),
        history=returned["history"],
        trained_tokens=returned["trained_tokens"],
        counts=returned["counts"],
        seconds=time.monotonic() - started,
    )


def worker_env(num_workers: int, gpu: bool, cores: int) -> dict[str, str]:
    """Environment of the training workers."""
    env = {
        "OMP_NUM_THREADS": str(max(1, cores // num_workers)),  # Ray would give as many as logical CPUs reserved
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # all weights are on disk by now; a look at the hub would only hang
        "TRANSFORMERS_VERBOSITY": "warning",
    }
    if not gpu:
        env["DS_ACCELERATOR"] = "cpu"
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def _trainer(job: TrainJob, step: WeightStep, gpu: bool) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    env = worker_env(step.num_workers, gpu, usable_cores())
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": json.loads(json.dumps(job.to_json())), "gpu": gpu},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=step.num_workers,
            use_gpu=gpu,
            resources_per_worker={("GPU" if gpu else "CPU"): 1, **step.resources},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=str(Path(job.scratch_dir).resolve()),
            failure_config=FailureConfig(max_failures=step.max_failures, controller_failure_limit=MAX_START_ATTEMPTS),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            worker_runtime_env={"env_vars": env},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _use_gpu(job: TrainJob, step: WeightStep) -> bool:
    if job.device != "auto":
        return job.device == "gpu"
    return reachable_gpus() >= step.num_workers


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
