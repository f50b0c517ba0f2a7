"""The config tree: one YAML file, read into frozen pydantic models.

Nothing here imports ray, torch, vllm or dspy. The steps are in `config_steps`; `config_file` reads a
YAML file into this tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bt_ray import strategy as strategies
from bt_ray.config_base import PositiveInt, Section, Share
from bt_ray.config_engine import EngineConfig
from bt_ray.config_steps import PromptStep, ProposerConfig, TeacherConfig, WeightStep

__all__ = ["EngineConfig", "PromptStep", "ProposerConfig", "RunConfig", "Section", "TeacherConfig", "WeightStep"]


class DataConfig(Section):
    """Where the examples are. Paths are relative to the config file."""

    train: str = Field(
        description="jsonl(.gz), csv or parquet file, or on the hub `id:split` or `id:config:split`; examples to learn from"
    )
    val: str = Field(description="as train; cut once into `search` and `select`")
    test: str | None = Field(None, description="as train; opened once, after the pick")
    inputs: tuple[str, ...] = Field(
        min_length=1, description="fields that the program receives; the others are labels for the metric"
    )
    search_share: Share = Field(0.5, description="share of val that prompt search sees; the rest picks between stages")
    limit: dict[Literal["train", "val", "test"], PositiveInt] = Field(
        default_factory=dict, description="rows to keep of a split, drawn with the run's seed"
    )


class RolloutConfig(Section):
    """How the program is run to collect traces."""

    samples: PositiveInt = Field(1, description="runs of the program per training example")
    temperature: float = Field(1.0, ge=0.0, le=5.0, description="sampling temperature of rollouts; evaluation is greedy")
    max_tokens: PositiveInt = Field(256, description="completion tokens of one call, at most")
    metric_threshold: float | None = Field(
        None, description="a rollout passes at this score or above; null: the metric's own truth"
    )
    constrain: bool = Field(False, description="hold outputs of Literal and pydantic type to their values while decoding")
    timeout_s: float = Field(120.0, gt=0, description="seconds that one program run may take before its row is an error")
    concurrency: PositiveInt = Field(64, description="program runs in flight per program worker")


Step = PromptStep | WeightStep


class ClusterConfig(Section):
    """Where the run runs. Without an address `run` starts a local cluster and stops it again."""

    address: str | None = Field(None, description="Ray address; null: RAY_ADDRESS, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="logical CPUs of a local cluster; null: twice the cores, 4 at least")
    max_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="resources that an autoscaling cluster has at its largest, such as {GPU: 8}; needed where Ray cannot tell (KubeRay)",
    )
    program_workers: PositiveInt | None = Field(
        None,
        description="processes that run the user's program, each up to rollout.concurrency times at once; null: one for each engine, "
        "on half of the CPUs beside the engines at most",
    )
    stage_timeout_s: float = Field(24 * 3600.0, gt=0, description="seconds that one stage job may take")


class BudgetConfig(Section):
    """Ceilings of a run; it stops cleanly at the first one."""

    max_lm_calls: PositiveInt | None = Field(None, description="LM calls of all stages together")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="seconds of all stages' steps together; one that runs then is stopped; its rows are kept, its seconds are not counted",
    )


class ControlsConfig(Section):
    """Baselines beside the stages, where labels allow."""

    gold: str | None = Field(None, description="name of a weight step: fine-tune its labelled predictor on gold labels, alone")
    tfidf: str | None = Field(None, description="name of a label field: TF-IDF with logistic regression on it")
    equal_cost: str | None = Field(
        None, description="name of a prompt step: prompt search alone, given as many seconds as the pick's whole path took"
    )


class ModelConfig(Section):
    """A model of a program with several, beside the run's own."""

    model: str = Field(description="as the run's `model`")
    engine: EngineConfig | None = Field(None, description="its engines; null: as the run's `engine` says")


def _model(value: Any) -> Any:
    """A plain name stands for the model alone."""
    return {"model": value} if isinstance(value, str) else value


def _step(value: Any) -> Any:
    """Choose the class by key, so that an error speaks of one class and not of two."""
    if not isinstance(value, dict):
        return value
    if "optimizer" in value and "method" in value:
        raise ValueError("has both `optimizer` (a prompt step) and `method` (a weight step); keep one")
    if "optimizer" in value:
        return PromptStep.model_validate(value)
    if "method" in value:
        return WeightStep.model_validate(value)
    raise ValueError("has neither `optimizer` (a prompt step) nor `method` (a weight step); add one")


class RunConfig(Section):
    """Everything that a run needs. The stage jobs read this, resolved, as JSON."""

    program: str = Field(description="module:attr or path/to/file.py:attr; a dspy.Module class, instance or factory")
    metric: str = Field(description="module:attr or path/to/file.py:attr; metric(example, prediction, trace=None)")
    data: DataConfig = Field(description="the examples")
    model: str = Field("smollm2-135m", description="name that `bt-ray model prepare` knows, hub id, or folder")
    models: dict[str, Annotated[ModelConfig, BeforeValidator(_model)]] = Field(
        default_factory=dict, description="further models of the program, by a name for `assign`; each has engines of its own"
    )
    assign: dict[str, str] = Field(
        default_factory=dict,
        description="predictor name or glob, as `answer*`, to a name of `models`; the first that matches counts, all others "
        "use `model`. Each model learns from the rows of its own predictors",
    )
    adapter: Literal["compact", "chat", "json", "xml"] = Field("chat", description="how signatures become prompts")
    strategy: str | tuple[str, ...] = Field(
        "p -> w -> p", description="step names joined by ->, `paper` for the paper's, or a list of such"
    )
    rollout: RolloutConfig = Field(
        default_factory=lambda: RolloutConfig.model_validate({}), description="how traces are collected"
    )
    steps: dict[str, Annotated[Step, BeforeValidator(_step)]] = Field(description="the steps that strategies name")
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig.model_validate({}), description="the vLLM engines")
    cluster: ClusterConfig = Field(default_factory=lambda: ClusterConfig.model_validate({}), description="the Ray cluster")
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig.model_validate({}), description="ceilings")
    controls: ControlsConfig = Field(default_factory=lambda: ControlsConfig.model_validate({}), description="baselines")
    seed: int = Field(0, ge=0, description="every draw of the run follows from it")
    base_dir: str = Field(".", description="folder that relative paths start from; the config's own folder by default")

    @model_validator(mode="after")
    def _strategies(self) -> RunConfig:
        for name in self.steps:
            if not strategies._NAME.fullmatch(name):
                raise ValueError(
                    f"steps.{name}: no strategy can name this step; its name must be a letter, then letters, digits and _"
                )
        for name in (strategies.VANILLA, "final"):
            if name in self.steps:
                raise ValueError(f"steps.{name}: the name is taken by a stage of every run; choose another")
        self._check_models()
        gold = self.controls.gold
        if gold is not None and not isinstance(self.steps.get(gold), WeightStep):
            weights = [name for name, step in self.steps.items() if isinstance(step, WeightStep)]
            raise ValueError(f"controls.gold: {gold!r} is no weight step; there is {', '.join(weights) or 'none'}")
        for name, step in self.steps.items():
            if isinstance(step, WeightStep) and step.method == "dpo" and self.rollout.samples < 2:
                raise ValueError(f"steps.{name}: dpo compares rollouts of one example; set rollout.samples to 2 or more")
        equal = self.controls.equal_cost
        if equal is not None and not isinstance(self.steps.get(equal), PromptStep):
            raise ValueError(f"controls.equal_cost: {equal!r} is no prompt step; name one of `steps` with an optimizer")
        strategies.expand(self.strategy, self.steps)  # raises ConfigError with its own words
        return self

    def _check_models(self) -> None:
        for glob, name in self.assign.items():
            if name not in self.models:
                raise ValueError(
                    f"assign.{glob}: there is no model {name!r} in `models`; there is {', '.join(self.models) or 'none'}"
                )
        for name in self.models:
            if not strategies._NAME.fullmatch(name):
                raise ValueError(f"models.{name}: a name must be a letter, then letters, digits and _")
            if name not in self.assign.values():
                raise ValueError(f"models.{name}: no predictor is assigned to it; name some under `assign`, or remove it")

    def engines(self) -> dict[str, EngineConfig]:
        """The engines of each model that the program runs with, by its name in `models`; the run's own has none."""
        return {"": self.engine, **{name: model.engine or self.engine for name, model in self.models.items()}}

    def engines_beside(self) -> list[tuple[str, EngineConfig]]:
        """Models, with their engines, that single steps start for themselves: proposers and teachers."""
        return [found for step in self.steps.values() if isinstance(step, PromptStep) for found in step.engines_beside()]

    def strategy_steps(self) -> list[tuple[str, ...]]:
        return strategies.expand(self.strategy, self.steps)
