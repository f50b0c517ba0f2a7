"""Fine-tunes on a test's own cluster or in a warm process, and what they leave on disk."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bt_ray.errors import TrainingError
from bt_ray.lm.types import Weights
from bt_ray.training.job import TrainJob, TrainResult

ROOT = Path(__file__).parents[2]
ANSWERS = ("refund", "invoice", "delivery", "login")


def chat_rows() -> Iterator[dict[str, Any]]:
    """Eight questions, each with one of four answers."""
    for index in range(8):
        yield {
            "prompt": [
                {"role": "system", "content": "Answer with one of the labels."},
                {"role": "user", "content": f"question number {index}"},
            ],
            "completion": [{"role": "assistant", "content": ANSWERS[index % 4]}],
            "predictor": "answer",
            "example_id": str(index),
        }


def pair_rows() -> Iterator[dict[str, Any]]:
    """The same questions, each with a better and a worse answer."""
    for row in chat_rows():
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("refund", "invoice"))
        yield {**row, "chosen": chosen, "rejected": rejected}


def start_run(job: Any) -> Any:
    """Run `train(job)` in a process of its own; the answer is its TrainResult or its TrainingError."""
    import ray

    @ray.remote(num_cpus=0, max_retries=0)
    def call(job: Any) -> Any:
        os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2", RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0")
        from bt_ray.errors import TrainingError
        from bt_ray.training.run import train

        try:
            return train(job)
        except TrainingError as error:
            return error

    return call.remote(job)


def train_warm(jobs: Mapping[str, TrainJob], folder: Path) -> dict[str, TrainResult | TrainingError]:
    """Run the jobs without Ray, in forks of one process (`tests.support.warm_trainer`), which reads and writes in `folder`."""
    asked, answered = folder / "jobs.json", folder / "results.json"
    asked.write_text(json.dumps([job.to_json() for job in jobs.values()]))
    command = [sys.executable, "-m", "tests.support.warm_trainer", str(asked), str(answered)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {name: _read(answer) for name, answer in zip(jobs, json.loads(answered.read_text()), strict=True)}


def _read(answer: dict[str, Any]) -> TrainResult | TrainingError:
    if "error" in answer:
        return TrainingError(answer["error"])
    return TrainResult(**{**answer, "weights": Weights.from_json(answer["weights"])}, seconds=0.0)


def kill_once_a_checkpoint_is_committed(job: Any) -> None:
    """Kill the training worker as soon as Ray Train's own record lists a checkpoint."""
    log = Path(job.scratch_dir) / "logs" / f"{job.name}-worker-0.log"
    snapshot = Path(job.scratch_dir) / job.name / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        # the record is rewritten in place, so it is looked at as text: half of it may be there
        if snapshot.is_file() and '"checkpoint_dir_name"' in snapshot.read_text(errors="replace"):
            os.kill(int(re.findall(r"pid (\d+)", log.read_text(errors="replace"))[-1]), signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint within 180 s; the worker said:\n{log.read_text() if log.is_file() else 'nothing'}")


def tensors(folder: str) -> dict[str, Any]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {key: value for path in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(path).items()}


def answer_losses(model_dir: str, rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Loss of each chat row's completion under plain transformers, summed over its tokens (nats), and their number."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bt_ray.training.tokens import tokenize_rows

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    found = []
    for row in tokenize_rows(rows, tokenizer, 512):
        ids = torch.tensor([[*row.prompt, *row.completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(row.prompt) :], reduction="sum")
        found.append((loss.item(), len(row.completion)))
    return found


def losses(result: Any) -> list[float]:
    """The training loss of every step."""
    assert isinstance(result, TrainResult), result
    return [entry["loss"] for entry in result.history]


def preference(model_dir: str) -> float:
    """Log-probability of the chosen answers less that of the rejected ones, in nats, mean over the pairs."""
    chosen, rejected = (
        answer_losses(model_dir, [{**row, "completion": row[half]} for row in pair_rows()]) for half in ("chosen", "rejected")
    )
    return sum(worse - better for (better, _), (worse, _) in zip(chosen, rejected, strict=True)) / len(chosen)


class _Made:
    """In place of an object of DeepSpeed's: what it was made from."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _WithoutDeepSpeed(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Made if module.startswith("deepspeed") else super().find_class(module, name)


def zero_states(folder: Path) -> list[tuple[int, int]]:
    """(ZeRO stage, number of workers that share) as the engine of each worker wrote them, for the newest checkpoint in `folder`.

    Empty where the engine kept its optimizer whole, which is stage 0.
    """
    import torch

    newest = max(folder.glob("checkpoint[-_]*/global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))
    reader = SimpleNamespace(Unpickler=_WithoutDeepSpeed, load=pickle.load, __name__="pickle")
    found = []
    for path in sorted(newest.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt")):
        # our own run's file, and not without pickle: the stage is an object of DeepSpeed's, whose import takes seconds
        state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)["optimizer_state_dict"]
        counts = state["partition_count"]
        found.append((state["zero_stage"].arguments[0], counts if isinstance(counts, int) else max(counts)))
    return found
