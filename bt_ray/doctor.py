"""`bt-ray doctor`: a minute that shows what a run would stumble on, on one engine in this process.

Runs the program on a few training examples and loads an adapter of each LoRA step's shape.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bt_ray.config import WeightStep
from bt_ray.errors import BtRayError
from bt_ray.preflight import Prepared
from bt_ray.probe import Engine, Row, engine_for, run_probe
from bt_ray.report.statistics import detectable_difference, wilson

ENOUGH = 10  # examples to learn from; below, a fine-tune mostly remembers them
TYPICAL_CHANGED = 0.3  # share of rows on which two stages differ, for lack of a measured one


@dataclass(frozen=True)
class Finding:
    """One line of the examination. `warn`: it works, but not as hoped; `bad`: the run would fail or learn nothing."""

    what: str
    verdict: Literal["ok", "warn", "bad"]
    text: str


def examine(prepared: Prepared) -> list[Finding]:
    """Load the model, run the program on some rows, load adapters, and judge what was seen."""
    return asyncio.run(_examine(prepared))


async def _examine(prepared: Prepared) -> list[Finding]:
    config = prepared.config
    async with engine_for(prepared) as engine:
        loaded = f"{config.model} answers its canary after {engine.start_s:.0f} s"
        started = time.monotonic()
        rows = await run_probe(prepared, engine)
        findings = [Finding("model", "ok", loaded), *judge_rows(rows, time.monotonic() - started)]
        findings += judge_coverage(rows, list(prepared.identity["signatures"]))
        findings += judge_sizes(prepared, pass_share(rows))
        for name, step in config.steps.items():
            if isinstance(step, WeightStep) and step.tuning == "lora":
                findings.append(await _adapter(name, step, engine))
    return findings


async def _adapter(name: str, step: WeightStep, engine: Engine) -> Finding:
    """Whether the engine takes an adapter of the step's shape."""
    from bt_ray.lm.blank_adapter import blank_adapter

    with tempfile.TemporaryDirectory() as folder:
        try:
            await engine.pool.load(blank_adapter(step, engine.base, Path(folder) / "adapter"))
        except BtRayError as error:
            return Finding(f"adapter of {name}", "bad", str(error))
    return Finding(f"adapter of {name}", "ok", f"rank {step.lora_rank} loads and answers its canary")


def pass_share(rows: list[Row]) -> float:
    return sum(row["accept"] for row in rows) / len(rows)


def judge_rows(rows: list[Row], seconds: float) -> list[Finding]:
    """What the probed rows say: passes, faults by kind, modules that do not parse, tokens, speed. Pure."""
    passed = sum(row["accept"] for row in rows)
    bounds = wilson(passed, len(rows))
    text = f"{passed} of {len(rows)} runs pass ({bounds.low:.0%} to {bounds.high:.0%} at 95 %)"
    findings = [Finding("passes", "ok" if passed else "warn", text)]
    faults = Counter(row["error"]["kind"] for row in rows if row["error"])
    for kind, count in sorted(faults.items()):
        example = next(row["error"]["message"] for row in rows if row["error"] and row["error"]["kind"] == kind)
        verdict: Literal["warn", "bad"] = "bad" if count == len(rows) else "warn"
        findings.append(Finding(f"errors: {kind}", verdict, f"{count} of {len(rows)} rows, as: {example[:200]}"))
    calls = [call for row in rows for call in row["calls"]]
    for predictor in sorted({call["predictor"] for call in calls}):
        own = [call for call in calls if call["predictor"] == predictor]
        parsed = sum(call["outputs"] is not None for call in own)
        longest = max(len(call["prompt_token_ids"]) for call in own)
        text = f"{parsed} of {len(own)} answers parse; prompts of up to {longest} tokens"
        findings.append(Finding(f"module {predictor}", "ok" if parsed == len(own) else "warn" if parsed else "bad", text))
    if calls and seconds > 0:
        findings.append(Finding("speed", "ok", f"{len(calls) / seconds:.1f} LM calls per second on this engine"))
    return findings


def judge_coverage(rows: list[Row], predictors: list[str]) -> list[Finding]:
    """Predictors that no probed run called: a prompt step has no demos for them, a weight step no rows. Pure."""
    called = {call["predictor"] for row in rows for call in row["calls"]}
    failed = sum(bool(row["error"]) for row in rows)
    text = f"never called in {len(rows)} runs, {failed} of which ended in an error: no demos and no training rows come from it"
    return [Finding(f"module {name}", "warn", text) for name in predictors if name not in called]


def _data_for(name: str, step: WeightStep, prepared: Prepared, share: float) -> Finding:
    """Training examples that are to be expected to teach: with a passing run, for pairs also with a failing one."""
    samples, train = prepared.config.rollout.samples, len(prepared.splits["train"])
    none, every = (1 - share) ** samples, share**samples
    expected = train * (1 - none - every if step.method == "dpo" else 1 - none)
    needed = "runs that pass and runs that do not, which makes pairs" if step.method == "dpo" else "a run that passes"
    text = f"about {expected:.0f} of {train} training examples would have {needed}, in {samples} of the program as written"
    return Finding(f"data for {name}", "ok" if expected >= ENOUGH else "warn" if expected else "bad", text)


def judge_sizes(prepared: Prepared, share: float) -> list[Finding]:
    """Whether a weight step would have rows, and what the splits can resolve. Pure."""
    steps = prepared.config.steps.items()
    findings = [_data_for(name, step, prepared, share) for name, step in steps if isinstance(step, WeightStep)]
    for split in ("select", "test"):
        count = len(prepared.splits.get(split, ()))
        if count:
            least = detectable_difference(count, TYPICAL_CHANGED)
            text = (
                f"{count} rows show a difference of {least:.2f} or more" if least else f"{count} rows show no difference at all"
            )
            findings.append(
                Finding(
                    f"resolution of {split}",
                    "ok" if least and least < 0.2 else "warn",
                    f"{text} (80 % power, 30 % of rows changed)",
                )
            )
    return findings
