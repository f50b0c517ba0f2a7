"""What work costs: LM calls, tokens and seconds of counted runs, at a probe's rates or at rates measured once. Pure.

What has no honest rate is None. Tokens need the probe. Seconds need the probe, or the model that the rates were
measured with, on a CPU; those of a fine-tune need that model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bt_ray.config import RunConfig, WeightStep
from bt_ray.planning import num_replicas
from bt_ray.report.chance import Chance
from bt_ray.report.workload import Sizes, Work

RATED_MODEL = "smollm2-135m"  # that the default rates are of


@dataclass(frozen=True)
class Rates:
    """What the engines and one trainer get through, None: not known; and how long they take to start.

    The defaults fit one run of the helpdesk task: smollm2-135m in float32 on two cores of an Intel
    Xeon with AVX-512 and without AMX, one engine, LoRA of rank 16. Elsewhere they are rough.
    """

    calls_per_s: float | None = 8.0  # 2 496 calls in rollouts and searches in 314 s
    engine_start_s: float = 30.0
    stage_start_s: float = 8.0  # job, program workers, change of weights
    finetune_start_s: float = 28.0  # workers, model, export and canary
    train_rows_per_s: float | None = 1.7  # rows x epochs: 180 in 142 s, 192 in 134 s, 264 in 186 s, starts included


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
class Cost:
    """What a stage costs. None: not known."""

    lm_calls: float | None
    prompt_tokens: float | None
    completion_tokens: float | None
    seconds: float | None

    @property
    def tokens(self) -> float | None:
        return total((self.prompt_tokens, self.completion_tokens))

    @staticmethod
    def sum(costs: Iterable[Cost]) -> Cost:
        costs = list(costs)
        names = ("lm_calls", "prompt_tokens", "completion_tokens", "seconds")
        return Cost(*(total(getattr(cost, name) for cost in costs) for name in names))


@dataclass(frozen=True)
class Fixed:
    """What of a stage is no LM call. `step`: its fine-tune. `gold`: on gold labels, whose number is known."""

    starts_engine: bool = False
    step: WeightStep | None = None
    gold: bool = False
    tuned: bool = False  # its rollouts are of tuned weights


@dataclass(frozen=True)
class Prices:
    """Turns work into cost."""

    rates: Rates
    sizes: Sizes
    probe: Probe | None
    samples: int  # rollouts of an example

    def cost(self, work: Sequence[Work], fixed: Fixed, chance: Chance) -> Cost:
        """Of one stage in one imagined run."""
        return Cost(
            lm_calls=total(item.lm_calls(self.sizes.calls_per_run) for item in work),
            prompt_tokens=total(self.prompt_tokens(item) for item in work),
            completion_tokens=total(self.completion_tokens(item) for item in work),
            seconds=total([*(self._seconds(item) for item in work), *self._fixed_s(fixed, chance)]),
        )

    def prompt_tokens(self, work: Work) -> float | None:
        """Each call has the probe's prompt and its demos, each as long as the probe's. None without a probe, and where
        an LM writes the prompts or is asked for them."""
        runs = self._countable(work)
        if self.probe is None or runs is None or work.demos is None or (work.demos and self.probe.demo_tokens is None):
            return None
        return runs * self.sizes.calls_per_run * (self.probe.prompt_tokens + work.demos * (self.probe.demo_tokens or 0.0))

    def completion_tokens(self, work: Work) -> float | None:
        """At the probe's mean; None as for the prompts of `prompt_tokens`."""
        runs = self._countable(work)
        if self.probe is None or runs is None or work.demos is None:
            return None
        return runs * self.sizes.calls_per_run * self.probe.completion_tokens

    def _countable(self, work: Work) -> int | None:
        """Program runs whose calls are like the probe's."""
        return None if work.proposer_calls or work.other_model else work.runs

    def _seconds(self, work: Work) -> float | None:
        calls, rate = work.lm_calls(self.sizes.calls_per_run), self.rates.calls_per_s
        return None if calls is None or rate is None or work.other_model else calls / rate

    def _fixed_s(self, fixed: Fixed, chance: Chance) -> list[float | None]:
        starts: list[float | None] = [self.rates.stage_start_s]
        if fixed.starts_engine:
            starts.append(self.rates.engine_start_s)
        if fixed.step:
            starts += [self.rates.finetune_start_s, self._training_s(fixed, fixed.step, chance)]
        return starts

    def _training_s(self, fixed: Fixed, step: WeightStep, chance: Chance) -> float | None:
        if self.rates.train_rows_per_s is None:
            return None
        share = chance.tuned_share if fixed.tuned else chance.pass_share
        rows = training_rows(step, self.samples, self.sizes, share)
        if fixed.gold:  # one row per example
            rows = float(self.sizes.train * self.sizes.num_labelled)
        return rows * step.epochs / self.rates.train_rows_per_s


def rates_for(config: RunConfig, probe: Probe | None, gpus: int) -> Rates:
    """The rates that are honest for this config on a machine with so many GPUs. On a CPU the engines share the cores."""
    rates = Rates()
    if config.model != RATED_MODEL or config.assign or gpus:
        rates = replace(rates, calls_per_s=None, train_rows_per_s=None)
    if probe:
        engines = num_replicas(config.engine, {"GPU": gpus}) if gpus else 1
        rates = replace(rates, calls_per_s=probe.calls_per_s * engines, engine_start_s=probe.engine_start_s)
    return rates


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


def total(values: Iterable[float | None]) -> float | None:
    """None where one is unknown."""
    result = 0.0
    for value in values:
        if value is None:
            return None
        result += value
    return result
