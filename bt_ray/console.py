"""What a person sees in the terminal: the plan, the live view, the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bt_ray import strategy
from bt_ray.config import RunConfig
from bt_ray.environment import own_command
from bt_ray.preflight import Prepared
from bt_ray.probe import measure
from bt_ray.report import estimate
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect
from bt_ray.report.memory import memory_here
from bt_ray.report.planned import probe_text
from bt_ray.report.states import Watcher
from bt_ray.report.text import render_plan, render_report
from bt_ray.running import carry_out, make_console, prepare_in, raise_if_failed
from bt_ray.runs.commit import spent_cost
from bt_ray.runs.opening import open_run
from bt_ray.runs.run_dir import RunDir


def run_with_view(config: RunConfig, run_dir: Path, plain: bool, command: str) -> int:
    """`bt-ray run`: check, plan, run with a live view, print the report. Returns the exit code."""
    console = make_console(plain)
    run = open_run(run_dir, prepare_in(config, RunDir(run_dir)))
    named = run.shown if run.shown != str(run.root) else str(run_dir)
    try:
        carry_out(run, console)
    except KeyboardInterrupt as stop:
        why = f": {stop}" if str(stop) else ""  # words come with a stop that was asked for in the run directory
        console.print(f"\nStopped{why}. What was committed is kept; go on with:\n  {command}", highlight=False, soft_wrap=True)
        return 130
    facts = collect(run)
    render_report(build_report(facts), facts, console)
    raise_if_failed(facts)
    console.print(f"\n{next_line(run, named, own_command())}", highlight=False, markup=False, soft_wrap=True)
    return 0


def next_line(run: RunDir, folder: str | Path, tool: str) -> str:
    """What to try after a run: ask the picked program, in the form that its inputs need."""
    inputs = run.config().data.inputs
    asked = '"..."' if len(inputs) == 1 else " ".join(f'{name}="..."' for name in inputs)
    first = f"{tool} ask {folder} {asked}" if run.pick() else f"{tool} status {folder}"
    return f"Next: {first}    or: {tool} report {folder} --html report.html"


def print_plan(prepared: Prepared, with_probe: bool) -> int:
    """`bt-ray plan`: the tree with what each stage will cost. Returns the exit code.

    `with_probe`: an engine runs a few training examples first. Raises what that engine raises.
    """
    console, config, identity = make_console(), prepared.config, prepared.identity
    if with_probe:
        console.print("Running a few training examples on one engine (--no-probe: count only)", highlight=False, markup=False)
    probe = measure(prepared) if with_probe else None
    nodes = strategy.tree(config.strategy_steps())
    memory = memory_here(config, identity["weights"])
    found = estimate.estimates(nodes, config, estimate.sizes_from(prepared.splits, identity["signatures"]), probe, memory)
    stages = [
        {"id": node.id, "path": node.path, "parent": node.parent.id if node.parent else None, "status": "pending"}
        for node in nodes
    ]
    render_plan({"stages": stages, "estimates": {name: asdict(value) for name, value in found.items()}}, console)
    console.print(probe_text(probe), highlight=False, markup=False)
    return 0


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
