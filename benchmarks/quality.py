"""Quality: the eight rows of strategy `paper`, and the controls, on several tasks and seeds, with a small model.

    python benchmarks/quality.py --root runs/quality --banking8-source FOLDER_WITH_BANKING77

One `bt-ray run` for each task and seed, in ROOT/TASK-SEED; the seed draws everything, the cut of val included. A finished run
is read and not run again, one that was cut off goes on; so the command is repeated until the table is whole. Ends with one
JSON line per task: mean, spread and the scores of every stage and control on test. The controls are those of the task's
config: iris has none (no text for TF-IDF, no label for its reasoning); `--set controls.equal_cost=p` adds one to each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import MAX_SAID, Stolen, bt_ray, show, stage_table

from bt_ray.runs.opening import is_complete
from bt_ray.runs.run_dir import RunDir

TASKS = Path(__file__).parents[1] / "bt_ray" / "tasks"
NAMES = ("helpdesk", "banking8", "iris")
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/quality", help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides, like data.limit.test=40")
    parser.add_argument("--banking8-source", help="folder with banking77's train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--only-table", action="store_true", help="run nothing; the table of what is there")
    args = parser.parse_args()
    root = Path(args.root)
    failed = []
    for task in args.tasks:
        reports = {}
        for seed in args.seeds:
            report = one_run(args, task, seed, root / f"{task}-{seed}")
            if report is None:
                failed.append(f"{task}-{seed}")
            else:
                reports[seed] = report
        if reports:
            table(task, args, reports)
    if failed:
        raise SystemExit(f"without a finished run: {', '.join(failed)}; run the same again to go on")


def one_run(args: argparse.Namespace, task: str, seed: int, run_dir: Path) -> Report | None:
    """The report of a finished run, made first if it is missing; None, with a word on stderr, if it does not finish."""
    report = finished(run_dir)
    if report is not None or args.only_table:
        return report
    config = config_of(task, args.banking8_source, run_dir.parent)
    wanted = ["strategy=paper", f"seed={seed}", f"model={args.model}", *args.set]
    print(f"quality: {task}, seed {seed}, in {run_dir}", file=sys.stderr, flush=True)
    began, stolen = time.monotonic(), Stolen()
    done = bt_ray("run", config, "--run-dir", str(run_dir), "--plain", *(f"--set={item}" for item in wanted), check=False)
    report = finished(run_dir)
    if report is None:
        said = f"{done.stdout[-MAX_SAID:]}\n{done.stderr[-MAX_SAID:]}".strip()
        print(f"{said}\nquality: {task}, seed {seed} ended with {done.returncode}", file=sys.stderr, flush=True)
        return None
    # A run that was cut off before took longer than this.
    seconds = round(time.monotonic() - began, 1)
    show("quality, one run", task=task, seed=seed, seconds=seconds, stolen_share=stolen.share(), table=stage_table(report))
    return report


def finished(run_dir: Path) -> Report | None:
    """The report of the run in this folder, if there is one and nothing of it is missing."""
    run = RunDir(run_dir)
    if not run.exists() or not is_complete(run):
        return None
    report: Report = json.loads(bt_ray("report", str(run_dir), "--json").stdout)
    return report


def config_of(task: str, source: str | None, root: Path) -> str:
    """Path of the task's config; that of banking8 is made beside its data, once."""
    if task != "banking8":
        return str(TASKS / task / "config.yaml")
    data = root / "banking8-data"
    if not (data / "config.yaml").is_file():
        if source is None:
            raise SystemExit("banking8 needs its data: name it with --banking8-source, or leave it out of --tasks")
        command = [sys.executable, "-m", "bt_ray.tasks.banking8.data", source, str(data)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(data / "config.yaml")


def table(task: str, args: argparse.Namespace, reports: dict[int, Report]) -> None:
    """One line: every stage and control over the seeds."""
    paths = list(dict.fromkeys(stage["path"] for report in reports.values() for stage in report["stages"]))
    by_path = {path: [row for report in reports.values() for row in report["stages"] if row["path"] == path] for path in paths}
    stages = [
        {
            "path": path,
            **spread(row["test"] for row in rows),
            "lm_calls": round(statistics.fmean(row["lm_calls"] for row in rows)),
            "seconds": round(statistics.fmean(row["seconds"] for row in rows), 1),
            "paid": [row["paid"] for row in rows],
        }
        for path, rows in by_path.items()
    ]
    names = list(dict.fromkeys(control["name"] for report in reports.values() for control in report["controls"]))
    controls = [
        {"name": name, **spread(row["test"] for report in reports.values() for row in report["controls"] if row["name"] == name)}
        for name in names
    ]
    best = [report["best"] for report in reports.values() if report["best"]]
    show(
        "quality",
        task=task,
        model=args.model,
        seeds=list(reports),
        stages=stages,
        controls=controls,
        picks=[item["path"] for item in best],
        pick=spread(item["test"] for item in best),
        overrides=args.set,
    )


def spread(scores: Iterable[Report | None]) -> Report:
    """Mean and standard deviation over the seeds, and the scores themselves; a missing one is left out of both."""
    found: Sequence[float | None] = [score["score"] if score else None for score in scores]
    known = [score for score in found if score is not None]
    return {
        "mean": round(statistics.fmean(known), 4) if known else None,
        "stdev": round(statistics.stdev(known), 4) if len(known) > 1 else None,
        "scores": [None if score is None else round(score, 4) for score in found],
    }


if __name__ == "__main__":
    main()
