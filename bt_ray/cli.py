"""The verbs: run, plan, submit, status, stop, report, doctor, fork, ask, model. Heavy modules load only where a verb needs them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bt_ray import cli_cluster
from bt_ray.environment import own_command
from bt_ray.errors import BtRayError, ConfigError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of `bt-ray`. Returns the exit code: 0, 1 failed, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(_spread(sys.argv[1:] if argv is None else argv))
    if not hasattr(args, "verb"):
        _parser().print_help()
        return 0
    _quiet()
    try:
        with ExitStack() as args.exits:
            return int(args.verb(args) or 0)
    except BtRayError as error:
        print(f"bt-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nbt-ray: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bt-ray", description="Alternate prompt search and fine-tuning of an LM program, on Ray."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    run = verbs.add_parser("run", help="run a config, or go on with its run")
    run.add_argument("config", help="YAML file; bt_ray/tasks/*/config.yaml are examples")
    run.add_argument(
        "--run-dir", help="where the run lives: a folder, or s3://BUCKET/FOLDER (default: runs/<name of the config's folder>)"
    )
    _add_set(run)
    run.add_argument("--address", help="address of a Ray cluster (default: RAY_ADDRESS, else a local cluster)")
    run.add_argument("--plain", action="store_true", help="plain lines in place of the live view")
    run.set_defaults(verb=_run)
    plan = verbs.add_parser("plan", help="what a run will cost, before anything is spent")
    plan.add_argument("config")
    _add_set(plan)
    plan.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run a few training examples first: without them tokens and times are unknown",
    )
    plan.set_defaults(verb=_plan)
    cli_cluster.add_verbs(verbs)
    _add_set(verbs.choices["submit"])
    status = verbs.add_parser("status", help="what a run has done so far")
    status.add_argument("run_dir")
    status.set_defaults(verb=_status)
    report = verbs.add_parser("report", help="the results of a run")
    report.add_argument("run_dir")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    report.add_argument("--html", metavar="FILE", help="write one self-contained HTML file")
    report.set_defaults(verb=_report)
    doctor = verbs.add_parser("doctor", help="a minute that shows what a run would stumble on")
    doctor.add_argument("config")
    _add_set(doctor)
    doctor.set_defaults(verb=_doctor)
    fork = verbs.add_parser("fork", help="a new run with another config, and all work that the change does not touch")
    fork.add_argument("run_dir")
    fork.add_argument("new", help="folder of the new run")
    _add_set(fork, required=True)
    fork.set_defaults(verb=_fork)
    ask = verbs.add_parser("ask", help="let the picked program answer one input")
    ask.add_argument("run_dir")
    ask.add_argument(
        "inputs", nargs="+", metavar="TEXT|KEY=VALUE", help="the text, where the program takes one input; else key=value ..."
    )
    ask.add_argument("--stage", help="id of another stage than the pick, like vanilla")
    ask.set_defaults(verb=_ask)
    model = verbs.add_parser("model", help="models on this machine")
    model_verbs = model.add_subparsers(title="verbs", metavar="VERB", required=True)
    prepare = model_verbs.add_parser("prepare", help="fetch, convert and check a model")
    prepare.add_argument("name", help="known name, hub id, or local folder")
    prepare.set_defaults(verb=_model_prepare)
    return parser


def _add_set(verb: argparse.ArgumentParser, required: bool = False) -> None:
    text = "override keys of the config, like steps.w.epochs=4"
    verb.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", required=required, help=text)


def _spread(words: list[str]) -> list[str]:
    """The command line with `--set a=1 b=2` as `--set=a=1 --set=b=2`, so that --set does not take the config after it."""
    found, rest = [], list(words)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        if word == "--set" and rest and not rest[0].startswith("-"):
            word = f"--set={rest.pop(0)}"
        found.append(word)
        while word.startswith("--set=") and rest and re.match(r"[\w.]+=", rest[0]):
            found.append(f"--set={rest.pop(0)}")
    return found + rest


def _run(args: argparse.Namespace) -> int:
    run_dir = args.run_dir or str(Path("runs") / Path(args.config).resolve().parent.name)
    command = _go_on(args, run_dir)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with it ignored
    try:
        return _run_in(run_dir, args, command)
    except KeyboardInterrupt:  # before the first stage, or while the report is made; the view says it for the time between
        print(f"\nbt-ray: interrupted. What was committed is kept; go on with:\n  {command}", file=sys.stderr)
        return INTERRUPTED


def _run_in(run_dir: str, args: argparse.Namespace, command: str) -> int:
    from bt_ray import config_file
    from bt_ray.runs.bucket import is_url
    from bt_ray.runs.run_dir import check_writable

    overrides = list(args.set) + ([f"cluster.address={args.address}"] if args.address else [])
    config = config_file.load(args.config, tuple(overrides))
    if not is_url(run_dir):
        check_writable(Path(run_dir))
    from bt_ray.console import run_with_view
    from bt_ray.running import placed

    with placed(run_dir) as folder:
        return run_with_view(config, folder, plain=args.plain, command=command)


def _go_on(args: argparse.Namespace, run_dir: str) -> str:
    """The command that goes on with this run."""
    words = [own_command(), "run", args.config, "--run-dir", run_dir]
    words += [f"--set={item}" for item in args.set] + ([f"--address={args.address}"] if args.address else [])
    return shlex.join(words)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _plan(args: argparse.Namespace) -> int:
    from bt_ray.console import print_plan

    return print_plan(_prepared(args), with_probe=args.probe)


def _status(args: argparse.Namespace) -> int:
    from bt_ray.console import print_status

    return print_status(cli_cluster.run_of(args))


def _report(args: argparse.Namespace) -> int:
    from bt_ray.console import print_report
    from bt_ray.report.build import build_report
    from bt_ray.report.facts import collect

    facts = collect(cli_cluster.run_of(args))
    report = build_report(facts)
    if args.html:
        from bt_ray.report.html import render_html

        try:
            Path(args.html).write_text(render_html(report, facts), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--html: {args.html} cannot be written ({error.strerror}). Name a file in a folder that exists."
            ) from None
        print(f"wrote {args.html}", file=sys.stderr)  # with --json, stdout is for a program
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    elif not args.html:
        print_report(report, facts)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from bt_ray.doctor import examine

    findings = examine(_prepared(args))
    for finding in findings:
        print(f"{finding.verdict:5} {finding.what}: {finding.text}")
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


def _fork(args: argparse.Namespace) -> int:
    from bt_ray.fork import fork

    made = fork(cli_cluster.run_of(args, "artifacts"), Path(args.new), tuple(args.set))
    print(f"changed: {', '.join(made.changed) or 'nothing'}")
    print(f"kept: {', '.join(made.kept) or 'nothing'}")
    print(f"to run: {', '.join(made.anew) or 'nothing'}")
    print(f"Next: {shlex.join([own_command(), 'run', str(made.config_path), '--run-dir', args.new])}")
    return 0


def _ask(args: argparse.Namespace) -> int:
    from bt_ray.bundle import answer

    fields = answer(cli_cluster.run_of(args, "artifacts"), args.inputs, args.stage)
    for name, value in fields.items():
        print(f"{name}: {value}")
    return 0


def _model_prepare(args: argparse.Namespace) -> int:
    from bt_ray.lm.models import resolve

    weights = resolve(args.name)
    print(f"{args.name}: ready in {weights.model_dir} (id {weights.id})")
    return 0


def _prepared(args: argparse.Namespace) -> Any:
    """The config of the command line, checked, with its data and program."""
    from bt_ray import config_file
    from bt_ray.preflight import prepare

    return prepare(config_file.load(args.config, tuple(args.set)))


def _quiet() -> None:
    """Libraries' chatter off; our own words and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
