"""Plain TRL: one process, its own collator and loss, no Ray, no DeepSpeed. Ends with the adapter merged.

    python benchmarks/plain_sft.py JOB.json RESULT.json

Not run by hand: `sft.py` measures it, and `dspy_better_together.py` fine-tunes with it. JOB: `rows_path` (jsonl of chat
rows with `prompt` and `completion`), `model_dir`, `step` (fields of config.WeightStep), `seed`, `out_dir`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.lm.weights import merge_adapter
from bt_ray.training.sft import TrainShape, lora_kwargs, sft_kwargs


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    job, result = (Path(name) for name in sys.argv[1:])
    result.write_text(json.dumps(train(json.loads(job.read_text(encoding="utf-8")))))


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train and merge. Returns seconds of each part, tokens that were trained on, and the merged model's folder."""
    began = time.perf_counter()
    step, out = WeightStep.model_validate(job["step"]), Path(job["out_dir"])
    trainer = make_trainer(job, step, out)
    loaded = time.perf_counter()
    metrics = trainer.train().metrics
    trained = time.perf_counter()
    trainer.save_model(str(out / "adapter"))
    (out / "adapter" / "training_args.bin").unlink()  # a pickle, which no folder of weights may hold here
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    del trainer
    merge_adapter(job["model_dir"], out / "adapter", out / "merged")
    return {
        "train_runtime": metrics["train_runtime"],
        "load_s": round(loaded - began, 2),
        "train_s": round(trained - loaded, 2),
        "merge_s": round(time.perf_counter() - trained, 2),
        "tokens": sum(lengths) * step.epochs,
        "rows": len(lengths),
        "train_loss": metrics["train_loss"],
        "merged": str(out / "merged"),
    }


def make_trainer(job: dict[str, Any], step: WeightStep, out: Path) -> Any:
    """trl.SFTTrainer with the values that our fine-tune has."""
    if step.method != "sft" or step.tuning != "lora" or step.num_workers != 1 or step.validation_share:
        raise SystemExit("plain TRL is set beside an sft step with LoRA, one worker and no held-out rows")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    values = sft_kwargs(step, TrainShape(str(out / "trainer"), job["seed"], gpu=False))
    del values["deepspeed"]
    with open(job["rows_path"], encoding="utf-8") as file:
        rows = [{name: row[name] for name in ("prompt", "completion")} for row in map(json.loads, file)]
    set_seed(job["seed"])
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model_dir"], dtype=torch.float32, attn_implementation="sdpa"),
        args=SFTConfig(**values),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model_dir"]),
        peft_config=LoraConfig(**lora_kwargs(step)),
    )


if __name__ == "__main__":
    main()
