"""The demo's figures: `--which cold` (wall time and its table), `again` (a finished run), `help` (the CLI's start).

python benchmarks/demo.py --which cold --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import Stolen, bt_ray, show, stage_table

CONFIG = Path(__file__).parents[1] / "bt_ray" / "tasks" / "helpdesk" / "config.yaml"


def cold(repeats: int, config: str, overrides: list[str]) -> None:
    """Whole runs, each into an empty directory; the table is that of the last one."""
    seconds = []
    report = {}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            started, stolen = time.monotonic(), Stolen()
            bt_ray("run", config, "--run-dir", f"{folder}/run", *(f"--set={item}" for item in overrides))
            seconds.append(round(time.monotonic() - started, 1))
            report = json.loads(bt_ray("report", f"{folder}/run", "--json").stdout)
            show(
                "demo",
                repeat=repeat,
                seconds=seconds[-1],
                stolen_share=stolen.share(),
                table=stage_table(report),
                best=report["best"],
                contrasts=report["contrasts"],
            )
    show("demo, median", seconds=statistics.median(seconds), of=seconds, controls=report["controls"])


def again(run_dir: str, config: str) -> None:
    """The same command on a finished run: seconds, and LM calls made."""
    before = count_rows(run_dir)
    started = time.monotonic()
    bt_ray("run", config, "--run-dir", run_dir)
    show("finished run, again", seconds=round(time.monotonic() - started, 2), new_rows=count_rows(run_dir) - before)


def count_rows(run_dir: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in Path(run_dir, "steps").rglob("rows/**/*.jsonl"))


def contrasts(run_dir: str) -> None:
    """Every mix of steps against each single step of a run, paired over its rows."""
    from bt_ray.report.build import compare
    from bt_ray.report.facts import collect
    from bt_ray.runs.run_dir import RunDir

    stages = [stage for stage in collect(RunDir(run_dir))["stages"] if stage["status"] == "done"]
    singles = [stage for stage in stages if stage["path"].count("->") == 0 and stage["parent"]]
    for mix in (stage for stage in stages if "->" in stage["path"]):
        for single in singles:
            show("contrast", a=mix["path"], b=single["path"], result=compare(mix, single))


def start_up(repeats: int) -> None:
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        bt_ray("--help")
        seconds.append(time.monotonic() - started)
    show("bt-ray --help", seconds=round(statistics.median(seconds), 3), repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--which", choices=["cold", "again", "contrasts", "help"], required=True)
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--run-dir", default="runs/helpdesk", help="with `again`: a finished run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.which == "cold":
        cold(args.repeats, args.config, args.set)
    elif args.which == "again":
        again(args.run_dir, args.config)
    elif args.which == "contrasts":
        contrasts(args.run_dir)
    else:
        start_up(args.repeats)


if __name__ == "__main__":
    main()
