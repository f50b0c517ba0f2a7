"""What a run will cost: per stage LM calls, tokens, seconds and memory. Pure functions on counts and rates.

The most that a stage can ask for is counted. What is expected is the middle of many imagined runs (`chance`), in
which racing stops candidates and a search may keep the prompts that it was given. How far these runs lie apart is
kept beside it: what is likely to be further off than `planned.TOLERANCE` is said to be unknown.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import Any

from bt_ray.config import RunConfig, WeightStep
from bt_ray.data import label_fields
from bt_ray.report.chance import Chance, PassRate
from bt_ray.report.memory import Memory
from bt_ray.report.planned import TOTAL
from bt_ray.report.price import Cost, Fixed, Prices, Probe, Rates, rates_for, total, training_rows
from bt_ray.report.workload import Sizes, workload
from bt_ray.strategy import StageNode

__all__ = ["Estimate", "Probe", "Rates", "estimates", "probe_of", "sizes_from", "training_rows"]

NUM_RUNS = 201  # imagined runs; odd, so that the middle is one of them
LIKELY = 0.8  # share of them that lies within the spread
SPEED_SPREAD = 0.25  # in log: the machine that was probed, at another hour
UNMEASURED_SPEED_SPREAD = 0.5  # in log: a machine that nobody measured; plans at the default rates were 60 to 110 % too high
ANSWER_SPREAD = 0.2  # in log: answers grow or shrink with demos and with training


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage: what is to be expected, None where nobody knows, and how far off that may be.

    `spread`: of lm_calls, tokens (both kinds together) and seconds; four of five imagined runs lie within it on either
    side. `rough`: seconds are from a rate that was not measured here.
    """

    lm_calls: int | None
    lm_calls_at_most: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float | None
    memory_gib: float | None
    rough: bool
    spread: dict[str, float | None]


def estimates(
    nodes: Iterable[StageNode],
    config: RunConfig,
    sizes: Sizes,
    probe: Probe | None = None,
    memory: Memory | None = None,
) -> dict[str, Estimate]:
    """Cost of every stage by id, its evaluation included; of `final`: test, with its controls; and of all (TOTAL).

    Seconds are those of calls / calls_per_s + starts + training rows x epochs / train_rows_per_s, one
    stage after the other: branches that run side by side on several GPUs end sooner.
    """
    nodes, memory = list(nodes), memory or Memory()
    sizes = replace(sizes, calls_per_run=probe.calls_per_run) if probe else sizes
    prices = Prices(rates_for(config, probe, memory.gpus), sizes, probe, config.rollout.samples)
    bounds = workload(nodes, config, sizes)
    fixed = {name: _fixed(name, nodes, config, sizes) for name in bounds}
    runs = _imagined_runs(nodes, config, prices, fixed)
    result = {}
    for name, most in bounds.items():
        weight_step = _weight_step(name, nodes, config, sizes)
        calls = [item.lm_calls(sizes.calls_per_run) for item in most]
        rough = probe is None or weight_step is not None or any(item.proposer_calls for item in most)
        found = _middle([run[name] for run in runs], _whole(total(calls)))
        result[name] = replace(found, memory_gib=memory.of_stage(_steps_of(name, nodes, config, sizes)), rough=rough)
    together = [Cost.sum(run.values()) for run in runs]
    peaks = [item.memory_gib for item in result.values() if item.memory_gib is not None]
    at_most = _whole(total(item.lm_calls_at_most for item in result.values()))
    found = replace(_middle(together, at_most), memory_gib=max(peaks, default=None))
    return {**result, TOTAL: replace(found, rough=any(item.rough for item in result.values()))}


def _imagined_runs(
    nodes: Sequence[StageNode], config: RunConfig, prices: Prices, fixed: Mapping[str, Fixed]
) -> list[dict[str, Cost]]:
    """What every stage costs in each of NUM_RUNS runs."""
    probe = prices.probe
    rate = PassRate(round(probe.pass_share * probe.num_runs), probe.num_runs) if probe else PassRate()
    speeds = _factors(SPEED_SPREAD if probe else UNMEASURED_SPEED_SPREAD, "speed")
    answers = _factors(ANSWER_SPREAD, "answers")
    runs = []
    for number in range(NUM_RUNS):
        chance = Chance(rate, number)
        walked = workload(nodes, config, prices.sizes, chance)
        costs = {name: prices.cost(work, fixed[name], chance) for name, work in walked.items()}
        runs.append({name: _disturbed(cost, speeds[number], answers[number]) for name, cost in costs.items()})
    return runs


def _disturbed(cost: Cost, speed: float, answers: float) -> Cost:
    seconds, completions = cost.seconds, cost.completion_tokens
    return replace(
        cost,
        seconds=None if seconds is None else seconds * speed,
        completion_tokens=None if completions is None else completions * answers,
    )


def _factors(spread: float, seed: str) -> list[float]:
    """NUM_RUNS factors of a log-normal, evenly over its quantiles, in a random order; the middle one is 1."""
    normal = NormalDist(0.0, spread)
    found = [math.exp(normal.inv_cdf((number + 0.5) / NUM_RUNS)) for number in range(NUM_RUNS)]
    random.Random(seed).shuffle(found)
    return found


def _middle(costs: Sequence[Cost], at_most: int | None) -> Estimate:
    names = ("lm_calls", "prompt_tokens", "completion_tokens", "tokens", "seconds")
    drawn = {name: [getattr(cost, name) for cost in costs] for name in names}
    middle = {name: None if None in values else median(values) for name, values in drawn.items()}
    seconds = middle["seconds"]
    return Estimate(
        lm_calls=_whole(middle["lm_calls"]),
        lm_calls_at_most=at_most,
        prompt_tokens=_whole(middle["prompt_tokens"]),
        completion_tokens=_whole(middle["completion_tokens"]),
        seconds=None if seconds is None else round(seconds, 1),
        memory_gib=None,
        rough=True,
        spread={name: _spread(drawn[name], middle[name]) for name in ("lm_calls", "tokens", "seconds")},
    )


def _spread(values: Sequence[float], middle: float | None) -> float | None:
    """The distance from the middle within which LIKELY of the values lie."""
    if middle is None:
        return None
    distances = sorted(abs(value - middle) for value in values)
    return round(distances[math.ceil(LIKELY * len(distances)) - 1], 1)


def _weight_step(stage_id: str, nodes: Sequence[StageNode], config: RunConfig, sizes: Sizes) -> str | None:
    """Name of the weight step that a stage trains; for the opening of test that of the gold control."""
    node = next((node for node in nodes if node.id == stage_id), None)
    name = node.name if node else config.controls.gold if sizes.num_labelled else None
    return name if isinstance(config.steps.get(name or ""), WeightStep) else None


def _steps_of(stage_id: str, nodes: Sequence[StageNode], config: RunConfig, sizes: Sizes) -> list[str]:
    """Names of the steps that a stage takes; for the opening of test those of its controls."""
    node = next((node for node in nodes if node.id == stage_id), None)
    if node is not None:
        return [node.name]
    controls = (config.controls.gold if sizes.num_labelled else None, config.controls.equal_cost)
    return [name for name in controls if name]


def _fixed(stage_id: str, nodes: Sequence[StageNode], config: RunConfig, sizes: Sizes) -> Fixed:
    node = next((node for node in nodes if node.id == stage_id), None)
    step = config.steps.get(_weight_step(stage_id, nodes, config, sizes) or "")
    before = node.steps[:-1] if node else ()
    return Fixed(
        starts_engine=node is not None and node.parent is None,
        step=step if isinstance(step, WeightStep) else None,
        gold=node is None,
        tuned=any(isinstance(config.steps[name], WeightStep) for name in before),
    )


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
    labels = set(label_fields(splits["train"]))
    labelled = [name for name, fields in signatures.items() if set(fields["outputs"]) <= labels]
    count = {split: len(splits.get(split, ())) for split in ("train", "search", "select", "test")}
    return Sizes(
        **count, num_predictors=len(signatures), calls_per_run=float(max(1, len(signatures))), num_labelled=len(labelled)
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else math.ceil(value)
