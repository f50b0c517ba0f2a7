"""What a run will cost: per stage LM calls, tokens, seconds and memory. Pure functions on counts and rates.

What has no honest number is None. Calls follow from the sizes, or from a probe that ran the program
on a few rows; tokens need the probe; seconds are `rough` where a rate is not of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bt_ray.config import RunConfig, WeightStep
from bt_ray.report.memory import Memory
from bt_ray.report.workload import Sizes, Work, workload
from bt_ray.strategy import StageNode


@dataclass(frozen=True)
class Rates:
    """What one engine and one trainer get through, and how long they take to start.

    The defaults fit one run of the helpdesk task: smollm2-135m in float32 on two cores of an Intel
    Xeon with AVX-512 and without AMX, one engine, LoRA of rank 16. Elsewhere they are rough.
    """

    calls_per_s: float = 8.0  # 2 496 calls in rollouts and searches in 314 s
    engine_start_s: float = 30.0
    stage_start_s: float = 8.0  # job, program workers, change of weights
    finetune_start_s: float = 28.0  # workers, model, export and canary
    train_rows_per_s: float = 1.7  # rows x epochs: 180 in 142 s, 192 in 134 s, 264 in 186 s, starts included
    pass_share: float = 0.18  # rollouts that pass: 34 and 60 of 256


@dataclass(frozen=True)
class Probe:
    """What a few runs of the program as written showed, on one engine of this machine."""

    num_runs: int
    calls_per_run: float
    prompt_tokens: float  # per call
    completion_tokens: float
    demo_tokens: float | None  # what one demo adds to a prompt; None: no answer parsed, so there was no demo
    calls_per_s: float
    pass_share: float
    engine_start_s: float


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage. `at_most`: calls and tokens are upper bounds, and so are the seconds that they take."""

    lm_calls: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float | None
    memory_gib: float | None
    at_most: bool
    rough: bool  # seconds: from a rate that was not measured here


def estimates(
    nodes: Iterable[StageNode],
    config: RunConfig,
    sizes: Sizes,
    probe: Probe | None = None,
    memory: Memory | None = None,
) -> dict[str, Estimate]:
    """Cost of every stage by id, its evaluation included, and of `final`: test, with its controls.

    Seconds are those of calls / calls_per_s + starts + training rows x epochs / train_rows_per_s, one
    stage after the other: branches that run side by side on several GPUs end sooner.
    """
    nodes, memory = list(nodes), memory or Memory()
    rates, sizes = _measured(probe, sizes)
    result = {}
    for stage_id, work in workload(nodes, config, sizes).items():
        node = next((node for node in nodes if node.id == stage_id), None)
        name = node.name if node else config.controls.gold if sizes.num_labelled else None
        step = config.steps.get(name or "")
        weight_step = step if isinstance(step, WeightStep) else None
        calls = _sum(item.lm_calls(sizes.calls_per_run) for item in work)
        fixed_s = rates.stage_start_s + (rates.engine_start_s if node and node.parent is None else 0.0)
        if weight_step:
            rows = training_rows(weight_step, config.rollout.samples, sizes, rates.pass_share)
            if node is None:  # the gold control: one row per example
                rows = float(sizes.train * sizes.num_labelled)
            fixed_s += rates.finetune_start_s + rows * weight_step.epochs / rates.train_rows_per_s
        result[stage_id] = Estimate(
            lm_calls=None if calls is None else math.ceil(calls),
            prompt_tokens=_whole(_sum(prompt_tokens(item, sizes, probe) for item in work)),
            completion_tokens=_whole(_sum(completion_tokens(item, sizes, probe) for item in work)),
            seconds=None if calls is None else round(fixed_s + calls / rates.calls_per_s, 1),
            memory_gib=memory.of_stage(name if weight_step else None),
            at_most=any(item.at_most for item in work),
            rough=probe is None or weight_step is not None or any(item.proposer_calls for item in work),
        )
    return result


def training_rows(step: WeightStep, samples: int, sizes: Sizes, pass_share: float) -> float:
    """Rows of one epoch that are to be expected where each rollout passes with probability s = `pass_share`.

    sft: every call of a passing rollout, or of one rollout of each example that has one, which is
    the case with probability 1 - (1 - s)^samples. dpo: two answers for each pair, for examples with
    a passing and a failing rollout: 1 - s^samples - (1 - s)^samples.
    """
    none_passes = (1 - pass_share) ** samples
    if step.method == "dpo":
        mixed = max(0.0, 1 - none_passes - pass_share**samples)
        rollouts = 2 * mixed * sizes.train * step.max_pairs_per_call
    elif step.samples_per_example == "all":
        rollouts = sizes.train * samples * pass_share
    else:
        rollouts = sizes.train * (1 - none_passes)
    return rollouts * sizes.calls_per_run * (1 - step.validation_share)


def prompt_tokens(work: Work, sizes: Sizes, probe: Probe | None) -> float | None:
    """Prompt tokens of a step: each call has the probe's prompt and as many demos of the probe's as it may
    have. None without a probe, and where an LM writes the prompts or is asked for them."""
    if probe is None or work.runs is None or work.max_demos is None or work.proposer_calls:
        return None
    if work.max_demos and probe.demo_tokens is None:
        return None
    demos = work.max_demos * (probe.demo_tokens or 0.0)
    return work.runs * sizes.calls_per_run * (probe.prompt_tokens + demos)


def completion_tokens(work: Work, sizes: Sizes, probe: Probe | None) -> float | None:
    """Completion tokens of a step, at the probe's mean; None as for the prompts of `prompt_tokens`."""
    if probe is None or work.runs is None or work.max_demos is None or work.proposer_calls:
        return None
    return work.runs * sizes.calls_per_run * probe.completion_tokens


def probe_of(rows: Sequence[Mapping[str, Any]], demo_tokens: float | None, seconds: float, engine_start_s: float) -> Probe | None:
    """What rollout rows that were made together in `seconds` show; None where no LM call was made."""
    calls = [call for row in rows for call in row["calls"]]
    if not calls or seconds <= 0:
        return None
    return Probe(
        num_runs=len(rows),
        calls_per_run=len(calls) / len(rows),
        prompt_tokens=sum(len(call["prompt_token_ids"]) for call in calls) / len(calls),
        completion_tokens=sum(len(call["token_ids"]) for call in calls) / len(calls),
        demo_tokens=demo_tokens,
        calls_per_s=len(calls) / seconds,
        pass_share=sum(bool(row["accept"]) for row in rows) / len(rows),
        engine_start_s=engine_start_s,
    )


def sizes_from(splits: Mapping[str, Sequence[Mapping[str, Any]]], signatures: Mapping[str, Mapping[str, list[str]]]) -> Sizes:
    """Sizes of a run's splits (rows with `labels`) and program; each predictor is taken to be called once."""
    labels = set(splits["train"][0]["labels"]) if splits["train"] else set()
    labelled = [name for name, fields in signatures.items() if set(fields["outputs"]) <= labels]
    count = {split: len(splits.get(split, ())) for split in ("train", "search", "select", "test")}
    return Sizes(
        **count, num_predictors=len(signatures), calls_per_run=float(max(1, len(signatures))), num_labelled=len(labelled)
    )


def _measured(probe: Probe | None, sizes: Sizes) -> tuple[Rates, Sizes]:
    rates = Rates()
    if probe is None:
        return rates, sizes
    measured = replace(rates, calls_per_s=probe.calls_per_s, engine_start_s=probe.engine_start_s, pass_share=probe.pass_share)
    return measured, replace(sizes, calls_per_run=probe.calls_per_run)


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _whole(value: float | None) -> int | None:
    return None if value is None else math.ceil(value)
