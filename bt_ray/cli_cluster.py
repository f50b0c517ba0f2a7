"""The verbs for a run that goes on elsewhere: submit, stop. Heavy modules load only where a verb needs them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bt_ray.runs.reader import Part

SUBMIT = """Submit a whole run as a Ray job to a cluster that has bt_ray installed, and say how to follow, look and stop.

Sent along, as the job's working directory, is the deepest folder that holds the config and every file and folder that it names
by a relative path: program, metric, data, own searchers, model folders. Left out are what .gitignore and .rayignore name, .git,
.venv, venv, __pycache__, runs and .env files. Absolute paths are not sent: they are places on the cluster's storage.

The project's jobs/better_together.py is what runs, where the folder has one; else `python -m bt_ray.cli run`.

Nothing of this machine's environment is sent. A key stays where the cluster's nodes start, and the config names its variable
(proposer.api_key_env) or the file that it is mounted as (proposer.api_key_file). The token of the job server is read from
RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token."""

STOP = """Ask the driver of a run to stop, as Ctrl-C does: its stage jobs end, what was committed is kept, the same run command goes on.

Needs the run directory alone, and may so be called from any machine that mounts it, or reaches its bucket. The request is a file there, for the driver that
holds the run now. Ends with 0 where no driver runs any more, with 1 where it still runs after --wait-s."""


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the subparsers of `bt-ray`, but for `--set` of submit."""
    as_written = argparse.RawDescriptionHelpFormatter
    submit = verbs.add_parser(
        "submit", help="submit a run as a Ray job to a cluster", description=SUBMIT, formatter_class=as_written
    )
    submit.add_argument("config", help="YAML file of the run, on this machine")
    submit.add_argument("--address", required=True, metavar="URL", help="job server of the cluster, like http://127.0.0.1:8265")
    submit.add_argument(
        "--run-dir",
        help="s3://BUCKET/FOLDER, or absolute path on storage that all nodes reach (on this machine's own cluster: as with `bt-ray run`)",
    )
    submit.add_argument("--follow", action="store_true", help="print the run's log until it ends, and end with its exit code")
    submit.set_defaults(verb=_submit)
    stop = verbs.add_parser(
        "stop", help="stop a run's driver, by its run directory", description=STOP, formatter_class=as_written
    )
    stop.add_argument("run_dir")
    stop.add_argument(
        "--wait-s", type=float, default=120.0, metavar="SECONDS", help="how long to wait for its end (default: 120)"
    )
    stop.set_defaults(verb=_stop)


def _submit(args: argparse.Namespace) -> int:
    from bt_ray.submit import Request, submit

    request = Request(args.config, tuple(args.set), args.address, args.run_dir)
    return submit(request, args.follow, _say)


def _stop(args: argparse.Namespace) -> int:
    from bt_ray.runs.bucket import is_url
    from bt_ray.stop import stop

    run = run_of(args, "outcomes")
    if is_url(args.run_dir):
        from bt_ray.runs.reader import relaying

        args.exits.enter_context(relaying(args.run_dir, run.root))
    return stop(run, max(0.0, args.wait_s), _say)


def run_of(args: argparse.Namespace, part: Part = "rows") -> Any:
    """The run that the command line names; of one in a bucket a copy, until the verb ends. RunDirError, StorageError.

    `part`: how much of it the verb reads, as `bt_ray.runs.reader.reading` takes it.
    """
    from bt_ray.runs.bucket import is_url
    from bt_ray.runs.run_dir import RunDir

    if not is_url(args.run_dir):
        run = RunDir(args.run_dir)
    else:
        from bt_ray.runs.reader import reading

        run = RunDir(args.exits.enter_context(reading(args.run_dir, part)))
    run.header()
    return run


def _say(text: str) -> None:
    print(text, flush=True)
