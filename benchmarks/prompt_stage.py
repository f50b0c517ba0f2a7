"""Wall time of a prompt stage ÷ dspy.BootstrapFewShotWithRandomSearch at the same task, and whether their scores are equal.

    python benchmarks/prompt_stage.py --repeats 3

Ours: stage `p` of a `bt-ray run`, from the beginning of its rollouts to the commit of its search; the engine is up (stage
`vanilla` has used it), the start of program workers and of Ray Data counts. DSPy's: `compile`, against vLLM's OpenAI server
with the same engine settings, up and warm; imports and the server's start do not count. Same train rows, `search` rows,
number of drawn candidates, demos, prompts, stops and constraints; no cache of answers. DSPy's threads are the best of
`--threads` in a probe before. Each repeat has its own seed, which draws the rows' cut, the order of train and our samples;
the sides take turns at going first. Both winners are scored greedily on test.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Stolen, bt_ray, show
from equivalence import tost
from openai_server import OpenAIServer, end_on_sigterm

from bt_ray import config_file
from bt_ray.config import PromptStep, RunConfig
from bt_ray.data import load_splits, step_examples

CONFIG = Path(__file__).parents[1] / "bt_ray" / "tasks" / "helpdesk" / "config.yaml"
MARGIN = 0.02
DIFFERS = (
    "ours bootstraps from `rollout.samples` sampled runs of every train row, made at once and shared by all candidates; "
    "DSPy makes new runs for each candidate, one after the other, the first of a row greedily, until it has its demos",
    "ours stops hopeless candidates early (racing); DSPy scores each on all rows",
    "ours runs Ray's processes and records every row on disk; DSPy keeps its results in memory",
)


@dataclass(frozen=True)
class Side:
    """What one side of a repeat gave."""

    seconds: float
    lm_calls: int
    search_score: float
    test: dict[str, float]
    details: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument(
        "--step", default="p", help="name of the config's prompt step; random_fewshot is what DSPy's BFRS is like"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, nargs="+", default=[8, 16, 32, 64], help="DSPy's threads; the best counts")
    parser.add_argument("--max-rounds", type=int, default=1, help="DSPy's tries per train row; after the first at temperature 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the config, for both")
    args = parser.parse_args()
    end_on_sigterm()
    config = config_at(args, args.first_seed)
    with tempfile.TemporaryDirectory() as folder:
        threads = tuned_threads(config, args.threads, Path(folder))
        sides = [repeated(args, args.first_seed + number, number, threads, Path(folder)) for number in range(args.repeats)]
    summary(args, config, threads, sides)


def config_at(args: argparse.Namespace, seed: int) -> RunConfig:
    config = config_file.load(args.config, tuple(overrides(args, seed)))
    step = config.steps.get(args.step)
    if not isinstance(step, PromptStep) or step.optimizer != "random_fewshot":
        raise SystemExit(f"steps.{args.step} of {args.config} is no prompt step with `optimizer: random_fewshot`")
    if not config.data.test:
        raise SystemExit(f"{args.config} has no data.test to score the winners on")
    return config


def overrides(args: argparse.Namespace, seed: int) -> list[str]:
    return [*args.set, f'strategy=["{args.step}"]', "controls={}", f"seed={seed}"]


def tuned_threads(config: RunConfig, choices: Sequence[int], folder: Path) -> int:
    """The number of threads with which DSPy evaluates the train rows fastest."""
    import dspy
    from dspy_side import ServerEngine, best_threads, make_lm, resolve_model, settings

    engine = ServerEngine()
    train = load_splits(config.data, config.base_dir, config.seed)["train"]
    with OpenAIServer(config.engine, folder / "server.log") as server:
        server.start(resolve_model(config))
        engine.connect(server)
        with dspy.context(**settings(config, make_lm(config, engine))), contextlib.redirect_stdout(sys.stderr):
            found = best_threads(config, train, choices)
    best = next(iter(found))
    show("prompt stage, DSPy's threads", best=best, seconds=found, rows=len(train), engine=server.describe())
    return best


def repeated(args: argparse.Namespace, seed: int, number: int, threads: int, folder: Path) -> tuple[Side, Side]:
    """One repeat: (ours, DSPy's), each with the machine to itself."""
    config, stolen = config_at(args, seed), Stolen()
    scratch = folder / f"seed-{seed}"
    if number % 2:
        dspys = theirs(args, config, threads, scratch)
        mine = ours(args, seed, scratch)
    else:
        mine = ours(args, seed, scratch)
        dspys = theirs(args, config, threads, scratch)
    show(
        "prompt stage, one repeat",
        seed=seed,
        ratio=round(mine.seconds / dspys.seconds, 3),
        ratio_with_our_job_start=round(mine.details["with_job_start_s"] / dspys.seconds, 3),
        stolen_share=stolen.share(),
        ours=told(mine),
        dspy=told(dspys),
    )
    return mine, dspys


def told(side: Side) -> dict[str, Any]:
    mean = round(statistics.fmean(side.test.values()), 4)
    counts = {"seconds": round(side.seconds, 1), "lm_calls": side.lm_calls, "search_score": round(side.search_score, 4)}
    return {**counts, "test_score": mean, **side.details}


def ours(args: argparse.Namespace, seed: int, scratch: Path) -> Side:
    """A run of the one stage."""
    run_dir = str(scratch / "run")
    bt_ray("run", args.config, "--run-dir", run_dir, "--plain", *(f"--set={item}" for item in overrides(args, seed)))
    return recorded(run_dir, args.step)


def recorded(run_dir: str, step: str) -> Side:
    """What the records of a run say of the stage of one prompt step."""
    from bt_ray.runs.commit import read_record
    from bt_ray.runs.files import read_json
    from bt_ray.runs.run_dir import RunDir

    run = RunDir(run_dir)
    stage, final = run.stage_record(step), run.final_record()
    if stage is None or final is None:
        raise SystemExit(f"{run_dir} has no outcome of stage {step!r} on test")
    folders = {name.partition("-")[0]: run.root / "steps" / name for name in stage["steps"]}
    records = {kind: read_record(folder, verify_files=False) for kind, folder in folders.items()}
    rollout, search = records["rollout"], records["search"]
    assert rollout is not None and search is not None
    began = read_json(folders["rollout"] / "attempt-0001.json")["time"]
    ended = read_json(folders["search"] / "record.json")["time"]
    submitted = run.submitted_at(step)
    assert submitted is not None
    details = {
        "rollout_s": rollout.cost.seconds,
        "search_s": search.cost.seconds,
        "with_job_start_s": round(ended - submitted, 1),
        "candidates": len(search.result["trials"]),
        "winner": search.result["label"],
        "rollouts_passed": rollout.result["passed"],
    }
    test = {name: value or 0.0 for name, value in final["test"][step]["scores"].items()}
    return Side(ended - began, rollout.cost.lm_calls + search.cost.lm_calls, search.result["score"], test, details)


def theirs(args: argparse.Namespace, config: RunConfig, threads: int, scratch: Path) -> Side:
    """BFRS.compile against a server that nobody has asked these prompts before."""
    import dspy
    from dspy_side import WARM_UP_ROWS, ServerEngine, examples, few_shot_search, make_lm, program_and_metric, resolve_model, score
    from dspy_side import settings as dspy_settings

    step = config.steps[args.step]
    assert isinstance(step, PromptStep)
    splits = load_splits(config.data, config.base_dir, config.seed)
    program, metric = program_and_metric(config)
    engine = ServerEngine()
    with OpenAIServer(config.engine, scratch / "server.log") as server, contextlib.redirect_stdout(sys.stderr):
        server.start(resolve_model(config))
        engine.connect(server)
        with dspy.context(**dspy_settings(config, make_lm(config, engine))):
            score(program, metric, splits["select"][:WARM_UP_ROWS], threads)  # as ours has before its stage
            before = engine.calls
            began = time.perf_counter()
            optimiser = few_shot_search(config, step, metric, threads, max_rounds=args.max_rounds)
            train = shuffled(examples(step_examples(step, "train", splits["train"], config.seed)), config.seed)
            search = examples(step_examples(step, "search", splits["search"], config.seed))
            best = optimiser.compile(program, trainset=train, valset=search)
            seconds, calls = time.perf_counter() - began, engine.calls - before
            test = score(best, metric, splits["test"], threads)
    found = best.candidate_programs
    winner = next(candidate for candidate in found if candidate["program"] is best)
    demos = {name: len(predictor.demos) for name, predictor in best.named_predictors()}
    details = {"threads": threads, "candidates": len(found), "winner": winner["seed"], "demos": demos}
    return Side(seconds, calls, winner["score"] / 100, test, {**details, "server_start_s": server.starts[0]})


def shuffled(train: list[Any], seed: int) -> list[Any]:
    """BFRS draws from seeds of its own, so what differs between repeats is the order of its rows."""
    return random.Random(seed).sample(train, len(train))


def summary(args: argparse.Namespace, config: RunConfig, threads: int, sides: list[tuple[Side, Side]]) -> None:
    ratios = [mine.seconds / dspys.seconds for mine, dspys in sides]
    shared = sorted(set.intersection(*(set(side.test) for pair in sides for side in pair)))
    differences = [[mine.test[name] - dspys.test[name] for name in shared] for mine, dspys in sides]
    show(
        "wall time of the prompt stage / dspy.BootstrapFewShotWithRandomSearch",
        ratio=round(statistics.median(ratios), 3),
        ratios=[round(ratio, 3) for ratio in ratios],
        ours_s=[round(mine.seconds, 1) for mine, _ in sides],
        dspy_s=[round(dspys.seconds, 1) for _, dspys in sides],
        scores_equal=tost(differences, MARGIN),
        threads=threads,
        max_rounds=args.max_rounds,
        adapter=config.adapter,
        constrain=config.rollout.constrain,
        differs=DIFFERS,
    )


if __name__ == "__main__":
    main()
