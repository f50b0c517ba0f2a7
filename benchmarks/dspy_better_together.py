"""dspy.BetterTogether ÷ our run, end to end: the same strategy, rows, candidates, demos, samples and epochs.

    python benchmarks/dspy_better_together.py --repeats 3 --threads 32

Ours: one `bt-ray run` without controls, from the command to its report: all stages, the pick, every stage on test. DSPy's: one
process, from its start to the test score of its best program. Its parts are `BootstrapFewShotWithRandomSearch` and
`BootstrapFinetune`, on a provider written here, since its local one does not run: launch is a start of vLLM's OpenAI server with
our engine's settings, finetune is plain TRL with our step's values (`plain_sft.py`) and a merge. What is done for DSPy, beside
that, is in DONE_FOR_DSPY. The sides take turns at going first; each repeat has its own seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Stolen, bt_ray, show, stage_table

from bt_ray import config_file
from bt_ray.config import PromptStep, RunConfig
from bt_ray.data import load_splits, step_examples

CONFIG = Path(__file__).parents[1] / "bt_ray" / "tasks" / "helpdesk" / "config.yaml"
DONE_FOR_DSPY = (
    "the server answers with the newest weights whatever name is asked for: by itself DSPy's prompt search after a fine-tune "
    "resets the program's LMs and asks for the untuned model",
    "BootstrapFinetune learns from `rollout.samples` sampled runs of each row, as ours; by itself it makes one greedy run",
    "its rows carry the prompts without demos (exclude_demos), as ours; failing rows do not end an optimiser (max_errors)",
    "our adapter, stops and constraints",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="one with the steps p (random_fewshot) and w (sft, LoRA)")
    parser.add_argument("--strategy", default="p -> w -> p")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=32, help="DSPy's threads; prompt_stage.py finds the best number")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the config, for both")
    parser.add_argument("--theirs", nargs=2, metavar=("SEED", "FOLDER"), help=argparse.SUPPRESS)  # DSPy's side, in its process
    args = parser.parse_args()
    if args.theirs:
        seed, folder = int(args.theirs[0]), Path(args.theirs[1])
        result = Compile(args, config_at(args, seed), folder).run()
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    config_at(args, args.first_seed)
    found = []
    with tempfile.TemporaryDirectory() as root:
        for repeat in range(args.repeats):
            found.append(one_repeat(args, args.first_seed + repeat, repeat, Path(root) / str(repeat)))
    show(
        "dspy.BetterTogether / ours, end to end",
        ratio=round(statistics.median(theirs["seconds"] / mine["seconds"] for mine, theirs in found), 3),
        ours_s=[mine["seconds"] for mine, _ in found],
        dspy_s=[theirs["seconds"] for _, theirs in found],
        ours_test=[mine["test_score"] for mine, _ in found],
        dspy_test=[theirs["test_score"] for _, theirs in found],
        strategy=args.strategy,
        dspy_failed=[theirs["stage_failed"] for _, theirs in found],
        done_for_dspy=DONE_FOR_DSPY,
    )


def config_at(args: argparse.Namespace, seed: int) -> RunConfig:
    config = config_file.load(args.config, tuple(overrides(args, seed)))
    for name in dict.fromkeys(name for steps in config.strategy_steps() for name in steps):
        step = config.steps[name]
        fits = step.optimizer == "random_fewshot" if isinstance(step, PromptStep) else step.method == "sft"
        if not fits or not config.data.test:
            raise SystemExit(f"{args.config}: it needs data.test, and {name!r} must be random_fewshot or sft")
    return config


def overrides(args: argparse.Namespace, seed: int) -> list[str]:
    return [*args.set, f"strategy={json.dumps([args.strategy])}", "controls={}", f"seed={seed}"]


def one_repeat(args: argparse.Namespace, seed: int, repeat: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, DSPy's), each with the machine to itself."""
    stolen, results = Stolen(), {}
    for side in (theirs, ours) if repeat % 2 else (ours, theirs):
        results[side] = side(args, seed, folder / side.__name__)
    shares = {"stolen_share": stolen.share()}
    show("dspy.BetterTogether and ours, one repeat", seed=seed, ours=results[ours], dspy=results[theirs], **shares)
    return results[ours], results[theirs]


def ours(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """A whole run; its score is that of its pick."""
    began = time.monotonic()
    run_dir = str(folder / "run")
    bt_ray("run", args.config, "--run-dir", run_dir, "--plain", *(f"--set={item}" for item in overrides(args, seed)))
    seconds = round(time.monotonic() - began, 1)
    report = json.loads(bt_ray("report", run_dir, "--json").stdout)
    best, stages = report["best"], report["stages"]
    return {
        "seconds": seconds,
        "test_score": best["test"]["score"],
        "best": best["path"],
        "lm_calls": sum(stage["lm_calls"] for stage in stages),  # without those on test
        "rows": {stage["path"]: stage["rows"] for stage in stages if stage["rows"] is not None},
        "stages": stage_table(report),
    }


def theirs(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """DSPy's side in a process of its own, so that its imports count as ours do."""
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, "--config", args.config, "--strategy", args.strategy, "--threads", str(args.threads)]
    command += [f"--set={item}" for item in args.set] + ["--theirs", str(seed), str(folder)]
    began = time.monotonic()
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    seconds = round(time.monotonic() - began, 1)
    if done.returncode:
        raise SystemExit(f"DSPy's side of seed {seed} ended with {done.returncode}; its words are above")
    return {"seconds": seconds, **json.loads((folder / "result.json").read_text(encoding="utf-8"))}


class Compile:
    """DSPy's side: dspy.BetterTogether over a server that its provider starts, stops and starts again."""

    def __init__(self, args: argparse.Namespace, config: RunConfig, folder: Path) -> None:
        self._args, self._config, self._folder = args, config, folder

    def run(self) -> dict[str, Any]:
        import dspy
        from dspy_side import PlainProvider, ServerEngine, examples, make_lm, program_and_metric, resolve_model, score, settings
        from openai_server import OpenAIServer, end_on_sigterm

        end_on_sigterm()
        config, engine, threads = self._config, ServerEngine(), self._args.threads
        splits = load_splits(config.data, config.base_dir, config.seed)
        program, metric = program_and_metric(config)
        with OpenAIServer(config.engine, self._folder / "server.log") as server, contextlib.redirect_stdout(sys.stderr):
            provider = PlainProvider(server, engine, resolve_model(config), self._folder, config.seed)
            lm = make_lm(config, engine, "base", provider=provider)
            dspy.configure(**settings(config, lm, finetunes=True))
            program.set_lm(lm)
            optimiser = dspy.BetterTogether(metric=metric, **self._optimisers(metric))
            search = {
                name: {"valset": examples(step_examples(step, "search", splits["search"], config.seed))}
                for name in self._steps()
                if isinstance(step := config.steps[name], PromptStep)
            }
            best = optimiser.compile(
                program,
                trainset=examples(splits["train"]),
                valset=examples(splits["select"]),
                num_threads=threads,
                seed=config.seed,
                strategy=self._args.strategy,
                optimizer_compile_args=search,
            )
            calls = engine.counts()
            provider.launch(best.predictors()[0].lm)  # the weights that the best program was found with
            scores = score(best, metric, splits["test"], threads)
            return {
                "test_score": round(statistics.fmean(scores.values()), 4),
                "best": best.candidate_programs[0]["strategy"] or "vanilla",
                "stage_failed": best.flag_compilation_error_occurred,
                **calls,
                "select": {found["strategy"] or "vanilla": found["score"] for found in best.candidate_programs},
                "finetunes": provider.finetunes,
                "server_starts_s": server.starts,
            }

    def _steps(self) -> list[str]:
        return list(dict.fromkeys(name for steps in self._config.strategy_steps() for name in steps))

    def _optimisers(self, metric: Any) -> dict[str, Any]:
        from dspy_side import SampledFinetune, few_shot_search

        rollout, threads, found = self._config.rollout, self._args.threads, {}
        for name in self._steps():
            step = self._config.steps[name]
            if isinstance(step, PromptStep):
                found[name] = few_shot_search(self._config, step, metric, threads)
            else:
                found[name] = SampledFinetune(
                    rollout.samples,
                    rollout.temperature,
                    metric=metric,
                    num_threads=threads,
                    exclude_demos=True,
                    train_kwargs={"step": step.model_dump(mode="json")},
                )
        return found


if __name__ == "__main__":
    main()
