"""The demo's program on real input: Banking77 cut to 8 intents, all strategies of one tree.

python benchmarks/banking8.py --source FOLDER_WITH_BANKING77 --run-dir runs/banking8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import bt_ray, show, stage_table

STRATEGIES = '["p -> p", "w", "p -> w -> p"]'  # the tree holds p and p -> w too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="folder with banking77's train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--run-dir", default="runs/banking8")
    args = parser.parse_args()
    data = Path(args.run_dir).parent / "banking8-data"
    subprocess.run(
        [sys.executable, "-m", "bt_ray.tasks.banking8.data", args.source, str(data)], check=True, stdout=subprocess.DEVNULL
    )
    bt_ray("run", str(data / "config.yaml"), "--run-dir", args.run_dir, "--set", f"strategy={STRATEGIES}")
    report = json.loads(bt_ray("report", args.run_dir, "--json").stdout)
    show(
        "Banking77, 8 intents",
        table=stage_table(report),
        best=report["best"],
        controls=report["controls"],
        contrasts=report["contrasts"],
    )


if __name__ == "__main__":
    main()
