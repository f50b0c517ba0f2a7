"""A whole run, as a Ray job: `ray job submit -- python jobs/better_together.py --config CONFIG --run-dir DIR`.

The driver runs inside the job and submits each stage as a job of its own on the same cluster.
"""

import argparse
import sys

from bt_ray.cli import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", required=True, help="the YAML file of the run")
parser.add_argument("--run-dir", help="the run directory, on storage that all nodes reach")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
args = parser.parse_args()
extra = [f"--set={item}" for item in args.set] + ([f"--run-dir={args.run_dir}"] if args.run_dir else [])
sys.exit(main(["run", args.config, *extra]))
