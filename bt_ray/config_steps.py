"""The two kinds of step that a config defines: prompt optimisers and weight methods."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bt_ray.config_base import SECRET_NAME, NamedResources, PositiveInt, Section, Share
from bt_ray.config_engine import EngineConfig

# Sizes of a prompt search: (num_candidates, num_instructions). Candidates as in MIPROv2's settings of these names.
AUTO_SIZES = {"light": (6, 4), "medium": (12, 6), "heavy": (18, 8)}
# The paper's prompt step (section 4): 6 candidates, up to 3 demos a module, on 100 training and 250 validation rows.
PAPER_PROMPT = {
    "num_candidates": 6,
    "max_bootstrapped_demos": 3,
    "max_labeled_demos": 3,
    "max_train_examples": 100,
    "max_search_examples": 250,
}

# Its weight step (section 4): LoRA on the query and key projections.
PAPER_WEIGHT = {
    "tuning": "lora",
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "lora_dropout": 0.0,
    "target_modules": ("q_proj", "k_proj"),
    "epochs": 5,
    "learning_rate": 1.0e-5,
    "global_batch_size": 8,
}


class ProposerConfig(Section):
    """The LM that writes instructions. Without this section it is the program's own, with its current weights."""

    model: str = Field(
        description="with `engine`: a name, hub id or folder as the run's own `model`; else a name at the endpoint, as "
        "`openai/gpt-5-mini`, whose prefix is LiteLLM's"
    )
    engine: EngineConfig | None = Field(
        None, description="engines of its own while the search lasts ({} will do); null: the model is asked at an endpoint"
    )
    base_url: str | None = Field(None, description="address of an OpenAI-compatible endpoint; null: the provider's own")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    api_key_file: str | None = Field(
        None, description="path of a file that holds the key and nothing else, as Kubernetes and Docker mount secrets"
    )

    @model_validator(mode="after")
    def _one_place(self) -> ProposerConfig:
        if self.engine is not None and (self.base_url or self.api_key_env or self.api_key_file):
            raise ValueError(
                "has both `engine` (engines of its own) and an endpoint (base_url, api_key_env, api_key_file); keep one"
            )
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("has both api_key_env and api_key_file; keep the one that holds the key")
        # Both are written down with the run, and messages show them.
        if self.base_url and "@" in self.base_url.split("//")[-1].split("/")[0]:
            raise ValueError("base_url holds a password, which the run would write down; name a variable in api_key_env instead")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is no name of an environment variable; write the name there, and never the key itself")
        return self


class TeacherConfig(Section):
    """A teacher with other weights than the program has: another model runs the program for the demos."""

    model: str = Field(description="a name, hub id or folder as the run's own `model`")
    engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig.model_validate({}), description="its engines, up while it runs the program"
    )
    prompts: Literal["original", "incoming"] = Field("incoming", description="prompts that it runs the program with")


class PromptStep(Section):
    """A prompt optimiser: a step whose name stands in a strategy, with `optimizer`."""

    optimizer: str = Field(
        description="labeled, random_fewshot, mipro, opro, gpo, gepa, a dspy.Teleprompter (dspy.SIMBA) or your own searcher"
    )
    auto: Literal["light", "medium", "heavy"] | None = Field(None, description="sizes of the search; a size that is given wins")
    preset: Literal["paper"] | None = Field(
        None, description="paper: its sizes, demos and numbers of examples; a value that is given wins"
    )
    num_candidates: PositiveInt = Field(
        6, description="random_fewshot, labeled: draws; mipro: trials; opro, gpo, gepa: instructions proposed"
    )
    num_instructions: PositiveInt = Field(6, description="mipro: instructions per predictor, the original included")
    proposals_per_round: PositiveInt = Field(4, description="opro, gpo: instructions that are written from the same history")
    history_length: PositiveInt = Field(8, description="opro, gpo: earlier instructions that the LM sees")
    proposer: ProposerConfig | None = Field(None, description="the LM that writes instructions; null: the program's own")
    proposer_temperature: float = Field(1.0, ge=0.0, le=2.0, description="sampling temperature of proposed instructions")
    proposer_max_tokens: PositiveInt = Field(256, description="tokens of a proposed instruction, at most")
    options: dict[str, Any] = Field(
        default_factory=dict, description="gepa and dspy's teleprompters: arguments of the optimiser itself"
    )
    max_train_examples: PositiveInt | None = Field(
        None, description="training examples, drawn at random, that the step runs, takes demos from and shows; null: all"
    )
    max_search_examples: PositiveInt | None = Field(
        None, description="examples of `search`, drawn at random, that candidates are scored on; null: all"
    )
    max_bootstrapped_demos: int = Field(4, ge=0, description="demos per predictor from passing rollouts, at most")
    max_labeled_demos: int = Field(4, ge=0, description="demos per predictor from labelled examples, at most")
    student: Literal["original", "incoming"] = Field("original", description="prompts that the search starts from")
    teacher: Literal["original", "incoming"] | TeacherConfig = Field(
        "incoming", description="prompts whose rollouts give the demos, with the incoming weights; or a model of its own"
    )
    rungs: tuple[Share, ...] = Field((0.25, 0.5, 0.75), description="shares of `search` after which a candidate may stop")
    racing_error: Share = Field(0.05, description="chance, per comparison, of stopping a candidate that is no worse")
    racing_regret: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="score that a candidate must still be expected to gain; 0: only what is worse stops",
    )
    max_parallel: PositiveInt = Field(4, description="candidates scored side by side")

    @property
    def teacher_prompts(self) -> str:
        """original or incoming."""
        return self.teacher.prompts if isinstance(self.teacher, TeacherConfig) else self.teacher

    def num_train(self, given: int) -> int:
        """Of so many training examples those that the step uses."""
        return min(given, self.max_train_examples or given)

    def num_search(self, given: int) -> int:
        """Of so many examples of `search` those that the step scores candidates on."""
        return min(given, self.max_search_examples or given)

    def engines_beside(self) -> list[tuple[str, EngineConfig]]:
        """Models, with their engines, that the step starts for itself: its proposer's and its teacher's, never both at once."""
        found = [(self.proposer.model, self.proposer.engine)] if self.proposer and self.proposer.engine else []
        return found + ([(self.teacher.model, self.teacher.engine)] if isinstance(self.teacher, TeacherConfig) else [])

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if SECRET_NAME.search(name):
                raise ValueError(
                    f"{name} would be written down with the run; set it as a variable of the environment that the optimiser reads"
                )
        return options

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        candidates, instructions = AUTO_SIZES.get(values.get("auto") or "", (None, None))
        sizes = {"num_candidates": candidates, "num_instructions": instructions} if candidates else {}
        return {**(PAPER_PROMPT if values.get("preset") == "paper" else {}), **sizes, **values}


# Options of LoRA that training knows and the pool's engine cannot answer with.
UNSERVED = {
    "use_dora": "vLLM does not serve DoRA adapters",
    "lora_bias": "vLLM does not serve adapters with a LoRA bias",
    "bias": "vLLM does not serve adapters that train biases",
    "modules_to_save": "vLLM does not serve adapters that replace whole modules",
}


class WeightStep(Section):
    """A weight method: a step whose name stands in a strategy, with `method`."""

    method: Literal["sft", "dpo"] = Field(
        "sft", description="sft: on passing rollouts (rejection sampling); dpo: on pairs of a better and a worse rollout's call"
    )
    preset: Literal["paper"] | None = Field(
        None, description="paper: its LoRA (rank 32 on q_proj and k_proj), epochs and learning rate; a value that is given wins"
    )
    tuning: Literal["lora", "full"] = Field("lora", description="lora: an adapter; full: every weight")
    lora_rank: PositiveInt = Field(16, description="rank r of the adapter; one that vLLM serves")
    lora_alpha: float = Field(32.0, gt=0, description="scale of the adapter is lora_alpha / lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="module names that get an adapter, or all-linear")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="indices of the layers that get an adapter, from 0; null: all"
    )
    epochs: PositiveInt = Field(2, description="passes over the rows")
    learning_rate: float = Field(
        5.0e-4, gt=0, description="peak learning rate of AdamW; dpo wants a far smaller one (its authors: 1e-6)"
    )
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the optimiser steps with rising learning rate")
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="shape of the learning rate after warm-up")
    global_batch_size: PositiveInt = Field(4, description="rows per optimiser step, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        None, description="rows per forward pass and worker; null: as many as the batch allows"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping by global norm")
    row_prompts: Literal["vanilla", "optimised"] = Field("vanilla", description="prompts of the training rows")
    samples_per_example: Literal["all", "first", "best", "shortest"] = Field(
        "all", description="sft: which passing rollouts of an example give rows; best by score, shortest by completion tokens"
    )
    deduplicate: bool = Field(
        False, description="sft: rows of equal prompt and completion count once, also across examples; else once per example"
    )
    balance: Literal["none", "downsample", "upsample"] = Field(
        "none", description="rows per predictor: downsample draws as many as the rarest has, upsample repeats up to the most"
    )
    max_train_tokens: PositiveInt | None = Field(
        None,
        description="tokens of all training rows, at most: the rollouts after the last that fits are left out; null: no limit",
    )
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="share of the examples held out to measure the loss; the epoch where it is lowest is kept"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="epochs without a lower held-out loss after which training stops; null: all epochs"
    )
    dpo_beta: float = Field(0.1, gt=0, description="dpo: strength of the tie to the start weights (ipo: its tau)")
    dpo_loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="dpo: loss on the difference of the log-ratios")
    token_weight: float = Field(
        0.0,
        ge=0,
        description="dpo: a rollout's reward is its score - token_weight * tokens / most tokens of the example's rollouts",
    )
    max_pairs_per_call: PositiveInt = Field(1, description="dpo: pairs for each call of an example's program, at most")
    init: Literal["current", "base"] = Field("current", description="w -> w: go on from the current adapter, or anew")
    num_workers: PositiveInt = Field(1, description="training workers (data parallel)")
    resources: NamedResources = Field(
        default_factory=dict, description="further Ray resources that a training worker reserves, beside its GPU or CPU"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    max_length: PositiveInt | None = Field(
        None, description="tokens of a row, at most; longer rows are refused by name; null: engine.max_model_len"
    )
    max_failures: int = Field(2, ge=0, description="lost workers that a fine-tune survives")

    @model_validator(mode="before")
    @classmethod
    def _no_unserved_option(cls, data: Any) -> Any:
        for name in UNSERVED:
            if isinstance(data, dict) and name in data:
                raise ValueError(f"{name}: {UNSERVED[name]}, so its weights could not be evaluated; remove the key")
        return data

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return {**PAPER_WEIGHT, **values} if isinstance(values, dict) and values.get("preset") == "paper" else values

    @model_validator(mode="after")
    def _consistent(self) -> WeightStep:
        if self.early_stopping_patience is not None and not self.validation_share:
            raise ValueError("early_stopping_patience watches the held-out loss; set validation_share (0.1, say) as well")
        if self.layers is None:
            return self
        if self.tuning == "full":
            raise ValueError("layers: only adapters can be limited to layers; set tuning: lora or remove the key")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {list(self.layers)}: name at least one layer, and each once")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError("layers needs target_modules as a list of names, or all-linear")
        return self

    @model_validator(mode="after")
    def _served(self) -> WeightStep:
        # The pool's engine has kernels for these ranks only; finding out after training is too late.
        if self.tuning == "lora" and self.lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"lora_rank {self.lora_rank} cannot be served by vLLM; take 8, 16, 32, 64, 128, 256, 320 or 512")
        per_worker, rest = divmod(self.global_batch_size, self.num_workers)
        if rest:
            raise ValueError(f"global_batch_size {self.global_batch_size} is no multiple of num_workers {self.num_workers}")
        if self.micro_batch_size and per_worker % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} over {self.num_workers} workers is {per_worker} rows each, "
                f"no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
