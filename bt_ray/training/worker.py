"""What one training worker does: load the start weights, train, checkpoint each epoch, export.

Runs inside Ray Train. A fault of the data or the numbers (TrainingError) is returned, not raised:
Ray Train would try it again as often as a lost worker, and it would fail each time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.environment import end_with_parent
from bt_ray.errors import BtRayError, TrainingError
from bt_ray.lm import node_cache
from bt_ray.lm.weights import ONLY_DATA
from bt_ray.runs.files import full_disk
from bt_ray.training.checkpoint_trust import check_checkpoint, pickle_by_value
from bt_ray.training.choices import choose_rows
from bt_ray.training.dpo import dpo_arguments, dpo_trainer
from bt_ray.training.history import held_out_losses, history, stops_early
from bt_ray.training.job import TrainJob
from bt_ray.training.sft import TrainShape, adapter_mismatch, check_layers, lora_kwargs
from bt_ray.training.tokens import tokenize_pairs, tokenize_rows
from bt_ray.training.trainer import TrainerParts, finite_callback, patience_callback, sft_arguments, sft_trainer


@dataclass(frozen=True)
class Method:
    """What the weight methods differ in: their rows, their TRL config, their trainer."""

    tokenize: Callable[[list[dict[str, Any]], Any, int], list[Any]]
    arguments: Callable[[WeightStep, TrainShape], Any]
    trainer: Callable[[TrainerParts], Any]


METHODS = MappingProxyType(
    {
        "sft": Method(tokenize_rows, sft_arguments, sft_trainer),
        "dpo": Method(tokenize_pairs, dpo_arguments, dpo_trainer),
    }
)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker. `config`: {"job": TrainJob JSON, "gpu": bool}.

    Rank 0 returns {"weights", "history", "trained_tokens", "counts"} or {"error": sentence}.
    """
    from ray import train

    end_with_parent()
    job = TrainJob.from_json(config["job"])
    rank = train.get_context().get_world_rank()
    _log_to_file(log_path(job, rank), rank)
    try:
        return _train(job, bool(config["gpu"]), rank)
    except TrainingError as error:  # all workers come to it
        print(f"TrainingError: {error}", flush=True)
        return {"error": str(error)}
    except Exception as error:  # a full disk, say: torch, safetensors and pyarrow each have another word for it
        known = error if isinstance(error, BtRayError) else full_disk(Path(job.scratch_dir), error)
        # Others would wait in vain for one that returns: they are to end with this one, and `train` finds the reason.
        if known is None or train.get_context().get_world_size() > 1:
            raise
        return {"error": str(known)}


def log_path(job: TrainJob, rank: int) -> Path:
    """Where worker `rank` writes what it and its libraries print."""
    return Path(job.scratch_dir) / "logs" / f"{job.name}-worker-{rank}.log"


def trainer_dir(job: TrainJob) -> Path:
    """Where the trainer writes a checkpoint before Ray Train takes it over."""
    return Path(job.scratch_dir) / "trainer" / job.name


def _log_to_file(path: Path, rank: int) -> None:
    """Send this process's stdout and stderr, those of its libraries included, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.write(1, f"worker rank {rank} pid {os.getpid()} host {os.uname().nodename}\n".encode())


def _train(job: TrainJob, gpu: bool, rank: int) -> dict[str, Any]:
    import deepspeed
    from transformers import AutoTokenizer, set_seed

    # DeepSpeed would compile this op with g++ for about a minute; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    step = WeightStep.model_validate(job.step)
    tokenizer = AutoTokenizer.from_pretrained(start_dir(step, job), trust_remote_code=False)
    rows = _read_rows(job.rows_path)
    tokens = METHODS[step.method].tokenize(rows, tokenizer, job.max_length)
    choice = choose_rows(rows, [len(row) for row in tokens], step, job.seed)
    train, held_out = ([tokens[index] for index in indices] for indices in (choice.train, choice.held_out))
    set_seed(job.seed)  # before the adapter is drawn
    trainer = _make_trainer(job, step, gpu, (train, held_out, tokenizer))
    _run(trainer, job, step)
    draft = Path(job.out_dir) / "draft"
    trainer.save_model(str(draft))  # all workers: ZeRO-3 gathers the shares
    steps = history(trainer.state.log_history)
    trained_tokens = sum(len(row) for row in train) * round(trainer.state.epoch)
    if rank != 0:
        return {}
    trainer.accelerator.free_memory()
    del trainer  # the export loads the merged model: not beside the trainer's copy
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from bt_ray.training.export import export

    unset_hf_deepspeed_config()  # else under ZeRO-3 each model loaded from now on is cut into shares as well

    weights = export(job, step, draft)
    return {"weights": weights.to_json(), "history": steps, "trained_tokens": trained_tokens, "counts": choice.counts()}


def start_dir(step: WeightStep, job: TrainJob) -> str:
    """Folder on this node of the full weights that training starts from (an adapter comes on top of it)."""
    start = job.start
    if step.init == "base" or (start.kind == "lora" and step.tuning == "lora"):
        return node_cache.base_folder(start)
    return node_cache.model_folder(start)  # the base itself, a fully tuned model, or an adapter merged for a full fine-tune


def continues_adapter(step: WeightStep, job: TrainJob) -> bool:
    """Whether this fine-tune goes on from the adapter of the start weights."""
    return step.tuning == "lora" and step.init == "current" and job.start.kind == "lora"


def _make_trainer(job: TrainJob, step: WeightStep, gpu: bool, data: tuple[list[Any], list[Any], Any]) -> Any:
    train, held_out, tokenizer = data
    shape = TrainShape(str(trainer_dir(job)), job.seed, gpu)
    print(f"method {step.method}, settings {asdict(shape)}", flush=True)
    method = METHODS[step.method]
    arguments = method.arguments(step, shape)  # before the model: under ZeRO-3 it is cut into shares while it loads
    model, adapter = _load_model(job, step, gpu)
    callbacks = [finite_callback(_report), patience_callback(step.early_stopping_patience)]
    return method.trainer(TrainerParts(step, arguments, model, adapter, tokenizer, train, held_out, callbacks))


def _load_model(job: TrainJob, step: WeightStep, gpu: bool) -> tuple[Any, Any]:
    """The model to train, and the LoraConfig of a new adapter or None."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(start_dir(step, job), dtype=dtype, attn_implementation="sdpa", **ONLY_DATA)
    if step.tuning == "full":
        return model, None
    from peft import LoraConfig, PeftModel

    if not continues_adapter(step, job):
        check_layers(step, model.config.get_text_config().num_hidden_layers)
        return model, LoraConfig(**lora_kwargs(step, _linear_modules(model)))
    adapter_dir = Path(node_cache.adapter_folder(job.start))
    problem = adapter_mismatch(step, json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8")))
    if problem:
        raise TrainingError(f"fine-tune: {problem}")
    # float32 adapters beside bfloat16 weights break ZeRO-3's gathering
    mixed_is_fine = not (gpu and step.zero_stage == 3)
    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True, autocast_adapter_dtype=mixed_is_fine), None


def _linear_modules(model: Any) -> list[str]:
    """Last names of the linear modules inside the model's numbered layers (so not the head)."""
    import torch

    linear = [name.split(".") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return sorted({parts[-1] for parts in linear if any(part.isdigit() for part in parts)})


def _run(trainer: Any, job: TrainJob, step: WeightStep) -> None:
    """Train, from the latest checkpoint where there is one (a worker was lost, or the job ran before). Raises
    TrainingError for a checkpoint that holds what no trainer writes."""
    from ray import train

    pickle_by_value()
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        check_checkpoint(Path(folder), Path(job.scratch_dir) / job.name)
        state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
        best = state.get("best_model_checkpoint")
        # In a copy of a run it is the path of the original's, which may be another's by now.
        if best and not (Path(best).is_dir() and Path(best).parent.resolve() == trainer_dir(job).resolve()):
            print(f"the best checkpoint {best} is gone: training anew", flush=True)
            trainer.train()
            return
        if best:
            check_checkpoint(Path(best), trainer_dir(job))
        print(f"resuming from {folder}", flush=True)
        if stops_early(held_out_losses(state["log_history"]), step.early_stopping_patience):
            trainer.args.num_train_epochs = round(state["epoch"])  # it had stopped here: no step is left
        trainer.train(resume_from_checkpoint=str(folder))


def _report(arguments: Any, state: Any) -> None:
    """Hand the checkpoint just written to Ray Train. A barrier over all workers."""
    import torch.distributed as dist
    from ray import train

    if dist.is_initialized():
        dist.barrier()  # each worker writes its own shares; upload only whole checkpoints
    metrics = {"step": state.global_step, "epoch": state.epoch, **history(state.log_history)[-1]}
    folder = Path(arguments.output_dir) / f"checkpoint-{state.global_step}"
    first_of_node = train.get_context().get_local_rank() == 0
    train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if first_of_node else None)


def _read_rows(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
