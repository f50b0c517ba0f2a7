"""LM calls of the tree of strategy `paper` ÷ those of its eight strategies, each run apart.

    python benchmarks/tree.py                      # expected, from the plan of the shipped configs; no engine
    python benchmarks/tree.py --run runs/helpdesk  # made, from the records of a finished run

Expected: the plan's own count (`bt-ray plan`), in which a search is counted at its most. The tree is planned once, and each
strategy by itself. Made: each committed step counts once in the tree, and once in every strategy whose path used it. On
both sides every strategy's end is evaluated on select and on test; what would cost both the same (controls, the pick's
second run) is left out. `ratio` is strict: a strategy run apart evaluates no stage before its end, but where a weight
step's choice of prompts needs it. `ratio_as_runs`: eight runs of bt-ray, which evaluate every stage of their path on select.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import show

from bt_ray import config_file, strategy
from bt_ray.config import RunConfig, WeightStep
from bt_ray.errors import ConfigError
from bt_ray.report.estimate import sizes_from
from bt_ray.report.workload import Sizes, workload
from bt_ray.strategy import StageNode

TASKS = Path(__file__).parents[1] / "bt_ray" / "tasks"
PAPER = [strategy.VANILLA, *strategy.PAPER]  # the eight
FIGURE = "LM calls, tree / strategies apart"


@dataclass(frozen=True)
class Counts:
    """LM calls. `apart`, `strict`: by strategy. `test`: of all ends together, the same on both sides unless two are equal."""

    tree: float
    apart: dict[str, float]
    strict: dict[str, float]
    test_tree: float
    test_apart: float

    def shown(self) -> dict[str, Any]:
        return {
            "ratio": self._ratio(self.strict),
            "ratio_as_runs": self._ratio(self.apart),
            "tree_calls": round(self.tree),
            "strict_calls": {name: round(value) for name, value in self.strict.items()},
            "apart_calls": {name: round(value) for name, value in self.apart.items()},
            "test_calls": {"tree": round(self.test_tree), "apart": round(self.test_apart)},
        }

    def _ratio(self, apart: dict[str, float]) -> float:
        return round((self.tree + self.test_tree) / (sum(apart.values()) + self.test_apart), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", help="a run; its own strategies count, `paper` or others")
    parser.add_argument("--config", nargs="+", help="configs (default: those of bt_ray/tasks whose data is there)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the configs")
    args = parser.parse_args()
    if args.run:
        show(f"{FIGURE}, made", run=args.run, **made(args.run).shown())
        return
    for path in args.config or sorted(str(path) for path in TASKS.glob("*/config.yaml")):
        config = config_file.load(path, (*args.set, "strategy=paper"))
        try:
            sizes = sizes_of(config)
        except ConfigError as error:
            if args.config:
                raise SystemExit(str(error)) from None
            show(f"{FIGURE}, expected", config=path, skipped=str(error))
            continue
        show(f"{FIGURE}, expected", config=path, **expected(config, sizes).shown(), sizes=dataclasses.asdict(sizes))


def evaluates(node: StageNode, end: StageNode, config: RunConfig) -> bool:
    """Whether a strategy that ends with `end`, run by hand, would evaluate this stage of its path on select."""
    return node == end or isinstance(config.steps.get(node.name), WeightStep)


def on_path(node: StageNode) -> list[StageNode]:
    return [StageNode(node.steps[:depth]) for depth in range(len(node.steps) + 1)]


def sizes_of(config: RunConfig) -> Sizes:
    """What the plan counts from. ConfigError where the data is not there."""
    from bt_ray.data import load_splits
    from bt_ray.rollout.program import field_names, load_program, spec_of

    splits = load_splits(config.data, config.base_dir, config.seed)
    return sizes_from(splits, field_names(load_program(spec_of(config))))


def expected(config: RunConfig, sizes: Sizes) -> Counts:
    """Counted by `workload`, without its stage `final`; the ends' evaluations on test are added here."""
    ends = [StageNode(steps) for steps in strategy.expand(PAPER, config.steps)]
    test = len(ends) * (sizes.test + 1) * sizes.calls_per_run if sizes.test else 0.0  # and the followed row
    sizes = dataclasses.replace(sizes, test=0)

    def calls(nodes: list[StageNode], end: StageNode | None) -> float:
        total = 0.0
        for stage_id, works in workload(nodes, config, sizes).items():
            kept = end is None or evaluates(StageNode.of(stage_id), end, config)
            for work in works:
                count = work.lm_calls(sizes.calls_per_run)
                if count is None:
                    raise SystemExit(f"{stage_id}: nobody can count the calls of its search beforehand")
                total += count if kept or work.step != "evaluate" else 0.0
        return total

    apart = {end.path: calls(on_path(end), None) for end in ends}
    strict = {end.path: calls(on_path(end), end) for end in ends}
    return Counts(calls(strategy.tree(end.steps for end in ends), None), apart, strict, test, test)


def made(folder: str) -> Counts:
    """Counted from the records of a run. SystemExit where a stage has none."""
    from bt_ray.runs.commit import read_record
    from bt_ray.runs.run_dir import RunDir

    run = RunDir(folder)
    config = run.config()
    records = {node: run.stage_record(node.id) for node in strategy.tree(config.strategy_steps())}
    if missing := [node.path for node, record in records.items() if record is None]:
        raise SystemExit(f"{folder}: no record of {', '.join(missing)}; let the run end first")
    used = {node: record["steps"] for node, record in records.items() if record}

    def cost(names: Iterable[str]) -> int:
        found = [read_record(run.root / "steps" / name, verify_files=False) for name in dict.fromkeys(names)]
        return sum(record.cost.lm_calls for record in found if record)

    def apart(end: StageNode, strict: bool) -> int:
        names = []
        for node in on_path(end):
            kept = not strict or evaluates(node, end, config)
            names += [name for name in used[node] if kept or not name.startswith("evaluate-")]
        return cost(names)

    ends = list(dict.fromkeys([StageNode(()), *(StageNode(steps) for steps in config.strategy_steps())]))
    tested = (run.final_record() or {}).get("test") or {}
    tests = [tested[end.id]["evaluate"] for end in ends if end.id in tested]
    return Counts(
        tree=cost(name for names in used.values() for name in names),
        apart={end.path: apart(end, strict=False) for end in ends},
        strict={end.path: apart(end, strict=True) for end in ends},
        test_tree=cost(tests),
        test_apart=sum(cost([name]) for name in tests),
    )


if __name__ == "__main__":
    main()
