"""On paper: what a large run takes, and what it asks of the machines beside the GPUs. Arithmetic on measured and on assumed rates; nothing is run.

    python benchmarks/capacity.py                                   # 10^6 examples, an 8B model, 64 GPUs
    python benchmarks/capacity.py --gpus 512      # what do eight times as many ask for?

Measured (benchmarks/scaling.py): processor time per row of each kind of process, on the machine that is named there.
Assumed: the accelerator (an H100's data sheet and the share of it that is reached), the program, the shares. Each is an option.

An engine prefills as fast as it computes, 2 operations per parameter and token, and decodes as fast as it reads its weights
and the keys and values of all requests once per step. LoRA training takes 4 operations per parameter and token: forward, and
backward without the gradients of the weights. Prints one JSON line per step, one for all, and one for each thing that could be short.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common import show

HOUR_S = 3600.0
GIB = 1024**3


@dataclass(frozen=True)
class Plan:
    """The run, the machines and the rates. Field names are the options."""

    examples: float = 1e6
    samples: float = 2.0
    calls_per_example: float = 3.0
    prompt_tokens: float = 1200.0  # of a call
    shared_share: float = 0.5  # of the prompt: instructions and demos, in the prefix cache
    completion_tokens: float = 150.0
    pass_share: float = 0.4  # of the rollouts
    rows_per_module: float = 20000.0  # that training takes of those that pass; 0: all
    epochs: float = 2.0
    candidates: float = 18.0
    racing_share: float = 0.5  # of full evaluation (benchmarks/racing.py)
    search_rows: float = 1000.0
    select_rows: float = 1000.0
    gpus: float = 64.0  # one engine each
    cores_per_gpu: float = 8.0
    params_billion: float = 8.0
    kv_bytes_per_token: float = 131072.0  # 32 layers, 8 heads of 128, keys and values, bfloat16
    slots: float = 64.0  # requests that an engine decodes together
    peak_tflops: float = 989.0
    bandwidth_tb_s: float = 3.35
    compute_share: float = 0.4  # of the peak that is reached
    bandwidth_share: float = 0.7
    worker_core_ms: float = 7.0  # of a program worker per call
    engine_core_ms: float = 7.0  # of a replica per call, without vLLM's own process
    disk_ms: float = 5.0  # that a program worker waits for the disk per row: a network mount
    parse_mb_s: float = 160.0  # of rows that one process reads
    readings: float = 2.0  # of its rows by the stage that made them: where each is, then what they say
    bytes_per_token: float = 12.0  # of a row on the disk: text and token ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Plan):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    parser.add_argument("--run-dir", help="a finished run, from which bytes_per_token is taken")
    args = vars(parser.parse_args())
    run_dir = args.pop("run_dir")
    plan = Plan(**args | ({"bytes_per_token": measured_bytes_per_token(Path(run_dir))} if run_dir else {}))
    steps = {
        "rollout": rollout_step(plan, plan.examples * plan.samples),
        "search": rollout_step(plan, plan.candidates * plan.racing_share * plan.search_rows),
        "finetune": finetune_step(plan),
        "evaluate": rollout_step(plan, plan.select_rows),
    }
    for name, step in steps.items():
        show("capacity", step=name, **{key: rounded(value) for key, value in step.items()})
    p_w_p = {"rollout": 2, "search": 2, "finetune": 1, "evaluate": 4}
    total = {
        key: sum(times * steps[name].get(key, 0.0) for name, times in p_w_p.items()) for key in ("hours", "gpu_hours", "gib")
    }
    show("capacity", step="p -> w -> p, with vanilla", **{key: rounded(value) for key, value in total.items()})
    for limit in limits(plan):
        show("capacity, what is needed beside", **limit)


def engine_calls_per_s(plan: Plan) -> float:
    """Calls that one engine answers in a second, all slots taken. Pure."""
    prefill_tokens_per_s = plan.compute_share * plan.peak_tflops * 1e12 / (2e9 * plan.params_billion)
    read_bytes = 2e9 * plan.params_billion + plan.slots * plan.kv_bytes_per_token * (
        plan.prompt_tokens + plan.completion_tokens / 2
    )
    decode_tokens_per_s = plan.slots * plan.bandwidth_share * plan.bandwidth_tb_s * 1e12 / read_bytes
    new_tokens = plan.prompt_tokens * (1 - plan.shared_share)
    return 1.0 / (new_tokens / prefill_tokens_per_s + plan.completion_tokens / decode_tokens_per_s)


def rollout_step(plan: Plan, rows: float) -> dict[str, float]:
    """A step that runs the program `rows` times. Pure."""
    calls = rows * plan.calls_per_example
    seconds = calls / (plan.gpus * engine_calls_per_s(plan))
    cores_busy = calls * (plan.worker_core_ms + plan.engine_core_ms) / 1000 / seconds
    return {
        "rows": rows,
        "lm_calls": calls,
        "calls_per_s": calls / seconds,
        "hours": seconds / HOUR_S,
        "gpu_hours": plan.gpus * seconds / HOUR_S,
        "cores_busy": cores_busy,
        "gib": calls * (plan.prompt_tokens + plan.completion_tokens) * plan.bytes_per_token / GIB,
    }


def finetune_step(plan: Plan) -> dict[str, float]:
    """LoRA on the rows that pass, on all GPUs. Pure."""
    passing = plan.examples * plan.samples * plan.pass_share
    rows = plan.calls_per_example * (min(passing, plan.rows_per_module) if plan.rows_per_module else passing)
    tokens = rows * plan.epochs * (plan.prompt_tokens + plan.completion_tokens)
    tokens_per_s = plan.compute_share * plan.peak_tflops * 1e12 / (4e9 * plan.params_billion)
    seconds = tokens / (plan.gpus * tokens_per_s)
    return {"rows": rows, "tokens": tokens, "hours": seconds / HOUR_S, "gpu_hours": plan.gpus * seconds / HOUR_S}


def limits(plan: Plan) -> list[dict[str, Any]]:
    """What a full set of engines asks of the rest. Pure."""
    calls = engine_calls_per_s(plan)  # of one GPU
    rows = calls / plan.calls_per_example
    cores = calls * (plan.worker_core_ms + plan.engine_core_ms) / 1000
    row_s = (plan.calls_per_example * plan.worker_core_ms + plan.disk_ms) / 1000  # in which a worker's loop does nothing else
    row_bytes = plan.calls_per_example * (plan.prompt_tokens + plan.completion_tokens) * plan.bytes_per_token
    all_bytes = plan.examples * plan.samples * row_bytes
    return [
        {"what": "cores beside each GPU", "needed": round(cores, 2), "there": plan.cores_per_gpu},
        {"what": "program workers (cluster.program_workers)", "needed": math.ceil(plan.gpus * rows * row_s)},
        {"what": "shared storage, MB/s", "needed": round(plan.gpus * rows * row_bytes / 1e6, 1)},
        {
            "what": "minutes in which one process reads the rollouts",
            "needed": round(plan.readings * all_bytes / plan.parse_mb_s / 60e6, 1),
        },
    ]


def measured_bytes_per_token(run_dir: Path) -> float:
    """Bytes of rows on the disk per token of their calls."""
    size = tokens = 0
    for path in sorted(run_dir.glob("steps/*/rows/*.jsonl")):
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            size += len(line)
            tokens += sum(len(call["prompt_token_ids"]) + len(call["token_ids"]) for call in row.get("calls", ()))
    return round(size / tokens, 2)


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
