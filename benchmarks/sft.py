"""Trained tokens per second of our fine-tune ÷ those of plain TRL, on the same rows with the same settings.

    python benchmarks/sft.py --repeats 3

Rows: the train split's gold labels, rendered as the control `gold` does it: the intent module's prompt as written, the
label as its answer. (A run takes the department from its rollouts; here it is the one that the label begins with, so no
engine is needed.) Ours: one Ray Train worker, DeepSpeed, batches packed as trees. Plain: trl.SFTTrainer in one process with
the same SFTConfig values and LoRA, without DeepSpeed, with TRL's own collator and head. Each repeat is a process of its own,
the sides by turns. Both save a checkpoint per epoch, as `save_strategy` says.

Two ratios, both of prompt and answer tokens of all epochs: over the training loop (the trainer's own `train_runtime`), and
over the whole call: ours is `bt_ray.training.run.train` on a cluster that is up (worker start, loop, merge, canary), plain is
its whole process (imports, load, loop, merge; no canary).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import MAX_SAID, Stolen, show

from bt_ray.config import RunConfig, WeightStep
from bt_ray.config_file import load
from bt_ray.resources import usable_cores

HERE = Path(__file__).parent
CONFIG = HERE.parent / "bt_ray" / "tasks" / "helpdesk" / "config.yaml"
RUNTIME = re.compile(r"'train_runtime': '?([0-9.e+]+)")  # of the line that transformers prints at the end
TREES = "batches as trees: True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the helpdesk config")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)  # our side, in its process
    args = parser.parse_args()
    if args.one:
        job, result = (Path(name) for name in args.one)
        result.write_text(json.dumps(ours(json.loads(job.read_text(encoding="utf-8")))))
        return
    config = load(CONFIG, tuple(args.set))
    step = config.steps["w"]
    assert isinstance(step, WeightStep)
    with tempfile.TemporaryDirectory() as folder:
        compare(args, config, step, Path(folder))


def compare(args: argparse.Namespace, config: RunConfig, step: WeightStep, folder: Path) -> None:
    from bt_ray.lm.models import resolve

    rows_path = folder / "rows.jsonl"
    rows = gold_rows(config)
    rows_path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    weights = resolve(config.model)
    job = {"rows_path": str(rows_path), "step": step.model_dump(mode="json"), "seed": config.seed}
    job |= {"model_dir": weights.model_dir, "start": weights.to_json(), "max_length": config.engine.max_model_len}
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    stolen = Stolen()
    for repeat in range(args.repeats):
        for side in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
            result = in_process(side, {**job, "out_dir": str(folder / f"{side}-{repeat}")})
            found[side].append(result)
            show("SFT, one run", side=side, repeat=repeat, **result)
    tokens = found["ours"][0]["tokens"]  # the same rows: plain's own count, with the template's last line break, is beside it
    rates = {side: [rate(tokens, result) for result in results] for side, results in found.items()}
    show(
        "SFT tokens/s, our fine-tune / plain TRL",
        ratio=middle([mine[0] / theirs[0] for mine, theirs in zip(rates["ours"], rates["plain"], strict=True)]),
        ratio_whole_call=middle([mine[1] / theirs[1] for mine, theirs in zip(rates["ours"], rates["plain"], strict=True)]),
        ours_tokens_per_s=[round(loop, 1) for loop, _ in rates["ours"]],
        plain_tokens_per_s=[round(loop, 1) for loop, _ in rates["plain"]],
        tokens=tokens,
        plain_counts=found["plain"][0]["tokens"],
        rows=len(rows),
        epochs=step.epochs,
        trees=[result["trees"] for result in found["ours"]],
        stolen_share=stolen.share(),
    )


def rate(tokens: int, result: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second of the loop, and of the whole call."""
    return tokens / result["train_runtime"], tokens / result["whole_s"]


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def gold_rows(config: RunConfig) -> list[dict[str, Any]]:
    """One chat row per train example: the intent module's prompt as written, the label as answer."""
    from bt_ray.data import load_splits
    from bt_ray.rollout.candidates import extract
    from bt_ray.rollout.program import load_program, spec_of
    from bt_ray.rollout.render import row_renderer

    spec = spec_of(config)
    render = row_renderer(spec, extract(load_program(spec)))
    rows = []
    for example in load_splits(config.data, config.base_dir, config.seed)["train"]:
        intent = example["labels"]["intent"]
        inputs = {**example["inputs"], "department": intent.partition(":")[0]}
        row = render("intent", inputs, {"intent": intent})
        rows.append({**row, "predictor": "intent", "example_id": example["id"], "sample": 0})
    return rows


def in_process(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own; `whole_s` is plain's whole process, and our whole call."""
    out = Path(job["out_dir"])
    out.mkdir(parents=True)
    job_path, result_path = out / "job.json", out / "result.json"
    job_path.write_text(json.dumps(job), encoding="utf-8")
    script = [str(HERE / "plain_sft.py")] if side == "plain" else [__file__, "--one"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side == "plain":  # our worker sets its own
        environment |= {"OMP_NUM_THREADS": str(usable_cores()), "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    command = [sys.executable, *script, str(job_path), str(result_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    process_s = round(time.monotonic() - began, 2)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-MAX_SAID:]}\n{done.stderr[-MAX_SAID:]}\nthe side {side!r} ended with {done.returncode}")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    return {"whole_s": process_s, **result, "process_s": process_s}


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Our fine-tune on a cluster of its own."""
    import ray

    from bt_ray.lm.types import Weights
    from bt_ray.training.run import TrainJob, train
    from bt_ray.training.worker import log_path

    scratch = f"{job['out_dir']}/scratch"
    fields = {name: job[name] for name in ("rows_path", "step", "out_dir", "seed", "max_length")}
    start = Weights.from_json(job["start"])
    train_job = TrainJob(**fields, start=start, scratch_dir=scratch, name="finetune-bench", device="cpu")
    ray.init(num_cpus=4, object_store_memory=1024**3, include_dashboard=False, log_to_driver=False)
    try:
        result = train(train_job)
    finally:
        ray.shutdown()
    log = log_path(train_job, 0).read_text(encoding="utf-8", errors="replace")
    runtime = RUNTIME.search(log)
    if runtime is None:
        raise SystemExit(f"{log[-MAX_SAID:]}\nthe worker's log names no train_runtime")
    losses = [entry["loss"] for entry in result.history]
    return {
        "train_runtime": float(runtime[1]),
        "whole_s": round(result.seconds, 2),
        "tokens": result.trained_tokens,
        "rows": result.counts["trained"],
        "train_loss": round(statistics.fmean(losses), 4),
        "trees": TREES in log,
    }


if __name__ == "__main__":
    main()
