"""Sizes of the shipped tasks, and small configs, for the tests of what a run will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bt_ray
from bt_ray import config_file, strategy
from bt_ray.config import RunConfig
from bt_ray.report.estimate import Estimate, Probe, estimates
from bt_ray.report.workload import Sizes
from bt_ray.strategy import StageNode

TASKS = Path(bt_ray.__file__).parent / "tasks"
# Rows of each split and predictors of each shipped task. Both programs of two modules label the last one alone.
SHAPES = {
    "helpdesk": Sizes(64, 32, 32, 96, num_predictors=2, calls_per_run=2.0, num_labelled=1),
    "banking8": Sizes(80, 16, 16, 80, num_predictors=2, calls_per_run=2.0, num_labelled=1),
    "iris": Sizes(50, 35, 15, 50, num_predictors=1, calls_per_run=1.0),
    "gsm8k": Sizes(1000, 250, 250, 1319, num_predictors=1, calls_per_run=1.0),
    "hotpotqa": Sizes(1000, 250, 250, 1500, num_predictors=3, calls_per_run=3.0),
}
SIZES = SHAPES["helpdesk"]
PROBE = Probe(16, 2.0, 70.0, 5.0, demo_tokens=35.0, calls_per_s=10.0, pass_share=0.125, engine_start_s=20.0)


# Sizes of the helpdesk run that the default rates were read off; the shipped ones are smaller.
MEASURED = (
    *("rollout.samples=4", "steps.p.max_bootstrapped_demos=8", "steps.p.max_labeled_demos=8"),
    *("steps.p.num_candidates=6", "steps.p.max_parallel=4"),
)


def shipped(task: str) -> RunConfig:
    return config_file.load(TASKS / task / "config.yaml", MEASURED if task == "helpdesk" else ())


def planned(task: str, **kwargs: Any) -> dict[str, Estimate]:
    config = shipped(task)
    return estimates(strategy.tree(config.strategy_steps()), config, SHAPES[task], **kwargs)


def config(**changes: Any) -> RunConfig:
    data = {
        "program": "a:b", "metric": "a:c", "data": {"train": "t", "val": "v", "inputs": ["x"]},
        "steps": {"p": {"optimizer": "random_fewshot"}, "w": {"method": "sft"}}, "strategy": ["p", "w", "p -> w -> p"],
    }  # fmt: skip
    return RunConfig.model_validate({**data, **changes})


def nodes(of: RunConfig | None = None) -> list[StageNode]:
    return strategy.tree((of or config()).strategy_steps())


def pending(plan: RunConfig) -> list[dict[str, Any]]:
    """The stages of a plan, as the report's facts have them."""
    return [
        {"id": node.id, "path": node.path, "parent": node.parent.id if node.parent else None, "status": "pending"}
        for node in nodes(plan)
    ]
