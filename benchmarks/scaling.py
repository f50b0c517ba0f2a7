"""How rollouts and searches scale with the engines, on simulated engines: real Ray, Serve, Data, Tune and program workers.

    python benchmarks/scaling.py --which weak --replicas 1 2 4 8 16 32 64     # rows grow with the engines
    python benchmarks/scaling.py --which strong --replicas 1 2 4 8 16 32 64   # the same rows for all
    python benchmarks/scaling.py --which search --replicas 1 2 4 8 16 32 64   # candidates grow with the engines
    python benchmarks/scaling.py --which memory --rows 10000 100000 1000000   # of the process that drives a rollout step

An engine answers after the time that its rates say (`--prefill-tokens-per-s`, `--decode-steps-per-s`) and takes almost no
processor, so that many fit on few cores. In `memory` the workers write rows and run no program. Each point prints one JSON line:

rows_per_s    in the steady state: between the first and the last tenth of the rows
efficiency    rows_per_s ÷ engines, against the fewest engines
of_engines    rows_per_s ÷ what the engines could do with every slot taken
cores_busy    processor time ÷ wall time meanwhile; where it comes close to `cores`, the cores are the limit
core_ms_per_row  processor time of each kind of process; "pipeline and trials": processes of Ray Data and Tune
p50_s, p99_s  of a row, from its start to its score; `p99_alone_s`: of an engine that does nothing else
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
from common import show
from simulated_engine import CHARACTERS_PER_TOKEN, DECODE, LONGEST_TOKENS, PREFILL, SHORTEST_TOKENS
from watch import Watch

from bt_ray.config import EngineConfig
from bt_ray.lm.pool import ServePool, deploy
from bt_ray.lm.types import Weights
from bt_ray.rollout.pipeline import run_rollouts
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.rows import StoredRows, read_rows
from bt_ray.rollout.tasks import RolloutBatch, RolloutPlan, write_tasks
from bt_ray.rollout.worker import start_workers, stop_workers
from bt_ray.search.racing import StopRule

HERE = Path(__file__).resolve().parent
WEIGHTS = Weights("simulated", "base", "", "")
QUESTION = "Question number {0} of a customer who writes at some length, as customers do, and waits for an answer. " * 3


class Answer(dspy.Module):
    """One call a row."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> dspy.Prediction:
        return await self.answer.acall(question=question)


def answered(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(prediction.answer)


SPEC = ProgramSpec(f"{HERE / 'scaling.py'}:Answer", f"{HERE / 'scaling.py'}:answered", adapter="compact", timeout_s=600.0)
CANDIDATE: dict[str, Any] = {"predictors": {"answer": {"instructions": "Answer the question.", "demos": []}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=["weak", "strong", "search", "memory"], required=True)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[256], help="of each engine; `strong`: of all; `memory`: one run each"
    )
    parser.add_argument("--slots", type=int, default=16, help="requests that an engine decodes together (max_num_seqs)")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=4000.0)
    parser.add_argument("--decode-steps-per-s", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2, help="program workers")
    args = parser.parse_args()
    os.environ[PREFILL], os.environ[DECODE] = str(args.prefill_tokens_per_s), str(args.decode_steps_per_s)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    if args.which == "memory" and len(args.rows) > 1:
        for rows in args.rows:  # a process each: the peak is the process's
            again = [*sys.argv[:1], *without_rows(sys.argv[1:]), "--rows", str(rows)]
            subprocess.run([sys.executable, *again], check=True)
        return
    import ray

    most = 0 if args.which == "memory" else max(args.replicas)
    ray.init(
        address="local",
        num_cpus=4 + args.workers + most,
        object_store_memory=1024**3,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        memory(args) if args.which == "memory" else scale(args)
    finally:
        ray.shutdown()


def without_rows(words: list[str]) -> list[str]:
    """The command line without `--rows` and its numbers."""
    start = words.index("--rows")
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[:start] + words[end:]


def scale(args: argparse.Namespace) -> None:
    """One point for each number of engines."""
    pool, first = pool_of(args), None
    for count in sorted(args.replicas):
        set_engines(pool, count)
        with tempfile.TemporaryDirectory() as folder:
            if args.which == "search":
                found = search_point(args, pool, count, Path(folder))
            else:
                found = rollout_point(args, pool, count, Path(folder))
        first = first or (count, found["rows_per_s"])
        ideal = count * args.slots / mean_seconds(args)
        show(
            f"scaling, {args.which}",
            engines=count,
            **found,
            efficiency=round(found["rows_per_s"] / count / (first[1] / first[0]), 3),
            of_engines=round(found["rows_per_s"] / ideal, 3),
            p99_alone_s=round(seconds_of(args, LONGEST_TOKENS - (LONGEST_TOKENS - SHORTEST_TOKENS) / 100), 2),
            cores=os.cpu_count(),
        )


def pool_of(args: argparse.Namespace) -> ServePool:
    """A pool of one simulated engine."""
    config = EngineConfig.model_validate(
        {"max_num_seqs": args.slots, "num_cpus": 1.0, "replicas": {"min": 1, "max": max(args.replicas)}}
    )
    return deploy("scaling", config, engine_factory="simulated_engine:SimulatedEngine")


def set_engines(pool: ServePool, count: int) -> None:
    import asyncio

    asyncio.run(pool.scale(count))
    time.sleep(5.0)  # the starts of so many processes are not what is measured


def seconds_of(args: argparse.Namespace, tokens: float) -> float:
    """Seconds of a call on an engine that does nothing else."""
    prompt = (len(QUESTION) + 30) / CHARACTERS_PER_TOKEN
    return prompt / args.prefill_tokens_per_s + tokens / args.decode_steps_per_s


def mean_seconds(args: argparse.Namespace) -> float:
    return seconds_of(args, (SHORTEST_TOKENS + LONGEST_TOKENS) / 2)


def examples(count: int) -> Iterator[dict[str, Any]]:
    return ({"id": f"e{number}", "inputs": {"question": QUESTION.format(number)}, "labels": {}} for number in range(count))


def rollout_point(args: argparse.Namespace, pool: ServePool, count: int, folder: Path) -> dict[str, Any]:
    """Rollouts through Ray Data, with twice as many rows in flight as the engines have slots."""
    num_rows = args.rows[0] * (count if args.which == "weak" else 1)
    in_flight = math.ceil(2 * args.slots * count / args.workers)
    paths, chunk_size = (str(folder / "tasks.parquet"), str(folder / "rows")), max(16, in_flight // 2)
    plan = RolloutPlan(*paths, CANDIDATE, WEIGHTS, 1.0, LONGEST_TOKENS, 0, chunk_size, timeout_s=SPEC.timeout_s)
    write_tasks(plan.tasks_path, examples(num_rows), 1, plan.group_size)
    workers = start_workers(SPEC, pool, args.workers, in_flight)
    try:
        with Watch(folder / "rows", num_rows) as watch:
            run_rollouts(plan, workers, large=True)
    finally:
        stop_workers(workers)
    rows = [row["seconds"] for row in read_rows(folder / "rows").values()]
    return {"rows": num_rows, **watch.found(), **quantiles(rows)}


def search_point(args: argparse.Namespace, pool: ServePool, count: int, folder: Path) -> dict[str, Any]:
    """Candidates evaluated by trials of Ray Tune, one engine's slots each."""
    from bt_ray.config import PromptStep
    from bt_ray.rollout.evaluator import RowEvaluator
    from bt_ray.search.base import SearchContext
    from bt_ray.search.experiment import SearchPlan, run_search

    rows = {example["id"]: example for example in examples(args.rows[0])}
    workers = start_workers(SPEC, pool, args.workers, math.ceil(2 * args.slots * count / args.workers))
    searcher = folder / "many.py"
    searcher.write_text(SEARCHER.format(count=2 * count))
    context = SearchContext(
        step=PromptStep.model_validate({"optimizer": f"{searcher}:build"}),
        student=CANDIDATE,
        rollouts=[],
        examples=list(rows.values()),
        labelled={},
        signatures={},
        seed=0,
    )
    plan = SearchPlan(list(rows), (), StopRule(0.05), count, str(folder / "scratch"))
    evaluator = RowEvaluator(tuple(workers), rows, WEIGHTS, LONGEST_TOKENS, str(folder / "rows"), timeout_s=SPEC.timeout_s)
    try:
        with Watch(folder / "rows", 2 * count * len(rows)) as watch:
            run_search(f"{searcher}:build", context, evaluator, plan)
    finally:
        stop_workers(workers)
    return {
        "candidates": 2 * count,
        "rows": 2 * count * len(rows),
        **watch.found(),
        **quantiles([row["seconds"] for row in evaluator.all_rows()]),
    }


SEARCHER = '''
from bt_ray.search.base import ListSearcher


def build(context):
    """Candidates that differ in a word."""
    return ListSearcher([
        {{"label": f"c{{n}}", "candidate": {{"predictors": {{"answer": {{"instructions": f"Answer, way {{n}}.", "demos": []}}}}}}}}
        for n in range({count})
    ], [])
'''


class QuickWorker:
    """A program worker that writes a row for each task and runs no program: it is not whose memory is looked at."""

    async def ready(self) -> bool:
        return True

    async def run(self, batch: RolloutBatch) -> None:
        ended = {"score": 1.0, "accept": True, "error": None, "calls": []}
        rows = [{"example_id": task.key[0], "sample": task.sample, **ended} for task in batch.tasks]
        with open(batch.segment, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def memory(args: argparse.Namespace) -> None:
    """Peak of the memory of this process, which drives a rollout step of so many rows."""
    import ray

    before = peak_mib()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = str(folder / "tasks.parquet"), str(folder / "rows")
        plan = RolloutPlan(*paths, CANDIDATE, WEIGHTS, 1.0, LONGEST_TOKENS, 0, 256, timeout_s=SPEC.timeout_s)
        write_tasks(plan.tasks_path, examples(args.rows[0]), 1, plan.group_size)
        written = peak_mib()
        Path(plan.segment_dir).mkdir()
        workers = [ray.remote(QuickWorker).options(num_cpus=0.5).remote() for _ in range(args.workers)]
        began = time.monotonic()
        try:
            run_rollouts(plan, workers, large=True)
            seconds = time.monotonic() - began
        finally:
            stop_workers(workers)
        rollouts, found = peak_mib(), len(StoredRows(plan.segment_dir, ((f"e{number}", 0) for number in range(args.rows[0]))))
    show(
        "memory of the driver",
        rows=found,
        before_mib=before,
        tasks_written_mib=written,
        rollouts_mib=rollouts,
        rows_looked_up_mib=peak_mib(),
        seconds=round(seconds, 1),
    )


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_s": round(cuts[49], 2), "p99_s": round(cuts[98], 2)}


if __name__ == "__main__":
    main()
