"""What a person sees in the terminal: the plan, the live view, the report."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bt_ray import strategy
from bt_ray.config import RunConfig
from bt_ray.driver import Driver, is_complete, open_run
from bt_ray.errors import BtRayError
from bt_ray.preflight import Prepared, prepare
from bt_ray.probe import measure
from bt_ray.report import estimate
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect, estimates
from bt_ray.report.live import LiveView
from bt_ray.report.memory import memory_here
from bt_ray.report.planned import probe_text
from bt_ray.report.states import Watcher
from bt_ray.report.text import render_plan, render_report
from bt_ray.runs.commit import spent_cost
from bt_ray.runs.run_dir import RunDir


def run_with_view(config: RunConfig, run_dir: Path, plain: bool, command: str) -> int:
    """`bt-ray run`: check, plan, run with a live view, print the report. Returns the exit code."""
    console = make_console(plain)
    run = open_run(run_dir, prepare(config))
    complete = is_complete(run)
    if not complete:
        keep_plan(run)
    facts = collect(run)
    if not complete:
        console.print(f"Task {config.program}, metric {config.metric}, model {config.model}", highlight=False, markup=False)
        render_plan(facts, console)
        try:
            with LiveView(console) as view:
                watcher = Watcher(run)
                Driver(run, lambda seen: view.update(watcher.states(seen["states"]))).execute()
        except KeyboardInterrupt:
            console.print(f"\nStopped. What was committed is kept; go on with:\n  {command}", highlight=False, soft_wrap=True)
            return 130
    facts = collect(run)
    render_report(build_report(facts), facts, console)
    failed = [stage for stage in facts["stages"] if stage["status"] == "failed"]
    if failed:
        raise BtRayError(
            f"{len(failed)} of {len(facts['stages'])} stages failed: {failed[0]['error']} Mend the cause and run the same command again."
        )
    next_command = f'bt-ray ask {run_dir} "..."' if facts["pick"] else f"bt-ray status {run_dir}"
    console.print(f"\nNext: {next_command}    or: bt-ray report {run_dir} --html report.html", highlight=False, soft_wrap=True)
    return 0


def keep_plan(run: RunDir) -> None:
    """Write down what the run is expected to cost, from its sizes, before it begins. A stage that a longer
    strategy adds later is added; the others keep the estimate that they began with."""
    config, identity = run.config(), run.header()["identity"]
    planned = estimates(run, config, identity, memory_here(config, identity["weights"]["model_dir"]))
    known = run.plan() or {}
    if planned.keys() - known.keys():
        run.write_plan({**known, **planned})


def print_plan(prepared: Prepared, with_probe: bool) -> int:
    """`bt-ray plan`: the tree with what each stage will cost. Returns the exit code.

    `with_probe`: an engine runs a few training examples first. Raises what that engine raises.
    """
    console, config, identity = make_console(), prepared.config, prepared.identity
    if with_probe:
        console.print("Running a few training examples on one engine (--no-probe: count only)", highlight=False, markup=False)
    probe = measure(prepared) if with_probe else None
    nodes = strategy.tree(config.strategy_steps())
    memory = memory_here(config, identity["weights"]["model_dir"])
    found = estimate.estimates(nodes, config, estimate.sizes_from(prepared.splits, identity["signatures"]), probe, memory)
    stages = [
        {"id": node.id, "path": node.path, "parent": node.parent.id if node.parent else None, "status": "pending"}
        for node in nodes
    ]
    render_plan({"stages": stages, "estimates": {name: asdict(value) for name, value in found.items()}}, console)
    console.print(probe_text(probe), highlight=False, markup=False)
    return 0


def make_console(plain: bool = False) -> Console:
    """A console of the terminal's width; wide enough for the table where there is no terminal."""
    if plain or not sys.stdout.isatty():
        return Console(width=120, no_color=True, force_terminal=False)
    return Console()


def print_report(report: dict[str, Any], facts: dict[str, Any]) -> None:
    render_report(report, facts, make_console())


def print_status(run: RunDir) -> int:
    """`bt-ray status`: one line per stage, from the run directory alone."""
    console = make_console()
    for state in Watcher(run).states({}):
        score = "" if state.score is None else f"  {state.score:.3f} on select"
        step = f"  {state.step}" if state.step else ""
        note = f"  {state.note}" if state.note else ""
        console.print(f"{state.status:8} {state.path}{score}{step}{note}", highlight=False, markup=False, soft_wrap=True)
    cost = spent_cost(run.root)
    console.print(f"{cost.lm_calls} LM calls, {cost.seconds:.0f} s in committed steps", highlight=False)
    return 0
