"""Framework time per LM call: bt_ray's program runner divided by DSPy's threads, on engines that answer at once.

    python benchmarks/overhead.py --repeats 5

Both run the helpdesk program over the same rows with the compact adapter and score them with its metric. The engines
give the same canned answers without any model, so what is left is framework time. Interleaved, in one process.

What one side does and the other does not. Ours: the program's `aforward`, 64 rows at once, a row for each run with
the inputs, outputs, text, token ids and seed of its calls, the metric in a thread with a time-out and, for acceptance,
a second time with the trace. DSPy's: the program's `forward` in Evaluate's threads, DSPy's history of calls, a table of
results; of its numbers of threads the fastest counts, each time anew. Neither writes to the disk.

`floor`: DSPy's own `acall` and LM, 64 rows at once, nothing recorded, the metric on the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import dspy
from common import show
from dspy import lm15

from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.types import LMAnswer, LMCall, Weights
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.runner import ProgramRunner
from bt_ray.rollout.tasks import RolloutTask
from bt_ray.tasks.helpdesk import Helpdesk, exact_intent

TRAIN = Path(__file__).parents[1] / "bt_ray" / "tasks" / "helpdesk" / "train.jsonl"
BASE = Weights("base", "base", "", "")


class InstantPool:
    """Answers at once; the pool's side of the comparison."""

    async def generate(self, call: LMCall) -> LMAnswer:
        return LMAnswer(answer(call.messages[-1]["content"]), (1, 2), (1, 2, 3), "stop", call.weights.id)


class InstantEngine:
    """Answers at once; the engine of DSPy's own LM. `Awaited` is its counterpart."""

    def complete(self, request: lm15.Request) -> lm15.Response:
        message = lm15.Message.assistant([lm15.TextPart(answer(request.messages[-1].text))])
        usage = lm15.Usage(input_tokens=3, output_tokens=2, total_tokens=5)
        return lm15.Response(id=None, model=request.model, message=message, finish_reason="stop", usage=usage)


class Awaited:
    async def complete(self, request: lm15.Request) -> lm15.Response:
        return InstantEngine().complete(request)


def answer(prompt: str) -> str:
    return "card: lost" if "department:" in prompt.rpartition("message:")[2] else "card"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], help="DSPy's threads; the best counts")
    args = parser.parse_args()
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows = [rows[number % len(rows)] for number in range(args.rows)]
    ours(rows[:16])
    theirs(rows[:16], 2)
    floor(rows[:16])
    ratios, mine, best, least = [], [], [], []
    for repeat in range(args.repeats):
        order = [None, *args.threads] if repeat % 2 else [*args.threads, None]
        found = {threads: ours(rows) if threads is None else theirs(rows, threads) for threads in order}
        mine.append(1000 * found.pop(None))
        best.append(1000 * min(found.values()))
        least.append(1000 * floor(rows))
        ratios.append(mine[-1] / best[-1])
    show(
        "framework time per LM call: ours / DSPy's threads",
        ratio=round(statistics.median(ratios), 3),
        ratios=[round(ratio, 3) for ratio in ratios],
        ours_ms=[round(value, 2) for value in mine],
        dspy_ms=[round(value, 2) for value in best],
        floor_ms=[round(value, 2) for value in least],
        rows=args.rows,
    )


def ours(rows: list[dict[str, Any]]) -> float:
    """Seconds per LM call of the runner that every program worker has, 64 rows at once."""
    here = "bt_ray.tasks.helpdesk"
    runner = ProgramRunner(ProgramSpec(f"{here}:Helpdesk", f"{here}:exact_intent", adapter="compact"), InstantPool())  # type: ignore[arg-type]
    candidate = extract(Helpdesk())
    examples = [
        {"id": str(number), "inputs": {"message": row["message"]}, "labels": {"intent": row["intent"]}}
        for number, row in enumerate(rows)
    ]
    tasks = [RolloutTask(example, 0, candidate, BASE, 0.0, 16, 0) for example in examples]

    async def run() -> int:
        slots = asyncio.Semaphore(64)

        async def one(task: RolloutTask) -> int:
            async with slots:
                return len((await runner.run(task))["calls"])

        return sum(await asyncio.gather(*(one(task) for task in tasks)))

    async def timed() -> float:
        await runner.run(tasks[0])  # the candidate is applied once
        started = time.perf_counter()
        calls = await run()
        return (time.perf_counter() - started) / calls

    return asyncio.run(timed())


def theirs(rows: list[dict[str, Any]], threads: int) -> float:
    """Seconds per LM call of dspy.Evaluate."""
    examples = [dspy.Example(**row).with_inputs("message") for row in rows]
    lm = dspy.LM("local/instant", engine=InstantEngine(), cache=False, num_retries=0)
    evaluate = dspy.Evaluate(devset=examples, metric=exact_intent, num_threads=threads, display_progress=False, max_errors=10**9)
    with dspy.context(lm=lm, adapter=make_adapter("compact", False)):
        started = time.perf_counter()
        evaluate(Helpdesk())
        return (time.perf_counter() - started) / (2 * len(rows))


def floor(rows: list[dict[str, Any]]) -> float:
    """Seconds per LM call of DSPy's bare async path."""
    lm = dspy.LM("local/instant", engine=InstantEngine(), async_engine=Awaited(), cache=False, num_retries=0)
    program = Helpdesk()

    async def one(row: dict[str, Any], slots: asyncio.Semaphore) -> None:
        async with slots:
            exact_intent(dspy.Example(**row), await program.acall(message=row["message"]))

    async def timed() -> float:
        slots = asyncio.Semaphore(64)
        started = time.perf_counter()
        await asyncio.gather(*(one(row, slots) for row in rows))
        return (time.perf_counter() - started) / (2 * len(rows))

    with dspy.context(lm=lm, adapter=make_adapter("compact", False), disable_history=True, trace=[]):
        return asyncio.run(timed())


if __name__ == "__main__":
    main()
