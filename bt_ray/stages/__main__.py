"""The entry point of a stage job: `python -m bt_ray.stages --run-dir DIR --stage ID --app NAME`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from bt_ray.config import PromptStep
from bt_ray.environment import end_with_parent
from bt_ray.errors import BtRayError
from bt_ray.runs.files import storage
from bt_ray.runs.run_dir import RunDir


def main(argv: list[str] | None = None) -> int:
    """Run one stage to its record. Prints one sentence and returns 1 where it fails."""
    parser = argparse.ArgumentParser(prog="python -m bt_ray.stages", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--stage", required=True, help="id of the stage, or `final`")
    parser.add_argument("--address", help="GCS address of the cluster (default: RAY_ADDRESS)")
    parser.add_argument("--app", required=True, help="name of the run's Serve application")
    parser.add_argument("--test-stages", default="", help="with --stage final: ids of the stages to evaluate on test")
    args = parser.parse_args(argv)
    end_with_parent()
    if sys.platform == "linux" and os.getppid() == 1:  # the job server's process ended before the line above
        sys.exit("bt_ray: the cluster of this stage is gone")
    if args.address:
        os.environ["RAY_ADDRESS"] = args.address
    import ray

    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace="bt_ray", log_to_driver=False, logging_level="error")
    try:
        with storage(Path(args.run_dir)):
            run_stage(RunDir(args.run_dir), args.stage, args.app, [name for name in args.test_stages.split(",") if name])
    except BtRayError as error:
        print(f"bt_ray: stage {args.stage}: {type(error).__name__}: {error}", file=sys.stderr)
        traceback.print_exc()
        return 1
    finally:
        ray.shutdown()
    return 0


def run_stage(run: RunDir, stage_id: str, app_name: str, test_stages: list[str]) -> None:
    """Dispatch to the file of the stage's kind."""
    from bt_ray.stages import final, prompt, vanilla, weight
    from bt_ray.stages.context import StageContext

    with StageContext(run, stage_id, app_name) as ctx:
        if stage_id == "final":
            final.run(ctx, test_stages)
        elif stage_id == "vanilla":
            vanilla.run(ctx)
        else:
            step = ctx.config.steps[ctx.node.name]
            if isinstance(step, PromptStep):
                prompt.run(ctx, step)
            else:
                weight.run(ctx, step)


if __name__ == "__main__":
    sys.exit(main())
