"""The report in the terminal, one function per part. Plain text where the output is no terminal.

Text of the run (prompts, answers, errors) is foreign: it is printed as text, without markup and
without terminal control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from bt_ray.report import formats
from bt_ray.report.formats import count_text, interval_text, one_line, score_text, seconds_text
from bt_ray.report.planned import cost_text, error_lines, totals_text
from bt_ray.report.text_lines import contrast_line, pick_lines, resolution_line, shared_line, shown_split, test_looks_line

Facts = Mapping[str, Any]
Report = Mapping[str, Any]
PAID_STYLE = {"yes": "green", "no": "red", "unclear": "yellow"}


def render_report(report: Report, facts: Facts, console: Console) -> None:
    """Print every part that the run has."""
    parts: tuple[Callable[[], None], ...] = (
        lambda: render_follow(facts, console),
        lambda: render_stages(facts, console),
        lambda: render_pick(report, console),
        lambda: render_table(report, console),
        lambda: render_controls(report, console),
        lambda: render_contrasts(report, console),
        lambda: render_resolution(report, console),
        lambda: render_test_looks(report, console),
        lambda: render_plan_error(report, console),
    )
    for part in parts:
        part()


def render_plan(facts: Facts, console: Console) -> None:
    """The strategy tree, with what each stage is expected to cost where there are estimates."""
    estimates = facts.get("estimates") or {}
    nodes: dict[str, Tree] = {}
    for stage in facts["stages"]:
        label = Text(one_line(stage["path"]), style="bold")
        estimate = estimates.get(stage["id"])
        if estimate:
            label.append(f"  {cost_text(estimate)}", style="not bold dim")
        if stage["status"] not in ("pending", "running"):
            label.append(f"  {stage['status']}", style="not bold")
        parent = nodes.get(stage.get("parent") or "")
        nodes[stage["id"]] = parent.add(label) if parent is not None else Tree(label)
    _heading(console, "Plan")
    for stage in facts["stages"]:
        if stage.get("parent") not in nodes:
            console.print(nodes[stage["id"]])
    if "final" in estimates:
        label = Text("test", style="bold")
        console.print(label.append(f"  {cost_text(estimates['final'])}", style="not bold dim"))
    if estimates:
        console.print(Text(totals_text(estimates)))


def render_follow(facts: Facts, console: Console) -> None:
    """One example, what each stage answers to it, and whether that is right."""
    example = (facts.get("examples") or {}).get(facts.get("follow") or "")
    answers = facts.get("follow_answers") or {}
    if not example or not answers:
        return
    _heading(console, f"One example, {one_line(facts['follow'], 60)}")
    console.print(Text(f"  asked     {formats.fields_text(example.get('inputs'))}"))
    if example.get("labels"):
        console.print(Text(f"  expected  {formats.fields_text(example['labels'])}"))
    width = max(len(stage["path"]) for stage in facts["stages"])
    for stage in facts["stages"]:
        answer = answers.get(stage["id"])
        if answer is None:
            continue
        line = Text(f"  {one_line(stage['path']):<{width}}  {formats.answer_text(answer)}")
        if verdict := formats.verdict_text(answer):
            line.append(f"  ({verdict})", style="dim")
        console.print(line)


def render_stages(facts: Facts, console: Console) -> None:
    """Per stage: how many rollouts passed and what they gave it, or why it did not run."""
    lines = [(stage, formats.pass_text(stage)) for stage in facts["stages"]]
    if not any(text for _, text in lines):
        return
    _heading(console, "Stages")
    width = max(len(stage["path"]) for stage, _ in lines)
    for stage, text in lines:
        if text:
            style = {"failed": "red", "skipped": "yellow"}.get(stage["status"], "")
            console.print(Text(f"  {one_line(stage['path']):<{width}}  {text}", style=style))


def render_pick(report: Report, console: Console) -> None:
    """The stage that goes home, and why."""
    best = report.get("best")
    _heading(console, "Pick")
    if not best:
        console.print(Text("  none: no stage finished with scores on select."))
        return
    line = Text(f"  {best['path']}", style="bold")
    line.append(f"  select {interval_text(best['select'])}, test {interval_text(best['test'])}", style="not bold")
    console.print(line)
    for sentence in pick_lines(report):
        console.print(Text(f"  {sentence}"))


def render_table(report: Report, console: Console) -> None:
    """Stage, score with 95 % interval, LM calls and seconds of the steps that it ran, did it pay (against its parent)."""
    split = shown_split(report)
    _heading(console, "Scores")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column(f"{split} (95 % interval)", no_wrap=True)
    table.add_column("select", justify="right")
    table.add_column("calls", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("did it pay", no_wrap=True)
    best = (report.get("best") or {}).get("id")
    for stage in report["stages"]:
        done = stage["status"] == "done"
        score = interval_text(stage[split]) if done else stage["status"]
        select = score_text(stage["select"]["score"]) if stage["select"] else formats.NOTHING
        name = Text(one_line(stage["path"]) + (" *" if stage["id"] == best else ""), style="bold" if stage["id"] == best else "")
        paid = Text(stage["paid"] or formats.NOTHING, style=PAID_STYLE.get(stage["paid"] or "", ""))
        calls, time = (count_text(stage["lm_calls"]), seconds_text(stage["seconds"])) if stage["lm_calls"] or done else ("", "")
        table.add_row(name, Text(score), select, calls, time, paid)
    console.print(table)
    console.print(Text("* the pick. It paid if its gain over the stage before is clear of 0 (paired, 95 %).", style="dim"))
    if shared := shared_line(report):
        console.print(Text(shared, style="dim"))
    errors = [f"{stage['path']} {stage['row_errors']}" for stage in report["stages"] if stage["row_errors"]]
    if errors:
        console.print(Text(f"Rows with an error: {one_line(', '.join(errors))}"))


def render_controls(report: Report, console: Console) -> None:
    """Baselines that need no strategy."""
    if not report["controls"]:
        return
    _heading(console, "Controls")
    for control in report["controls"]:
        line = Text(f"  {one_line(control['name'])}  {interval_text(control['test'])}")
        if control.get("note"):
            line.append(f"  ({one_line(control['note'], 200)})", style="dim")
        console.print(line)


def render_contrasts(report: Report, console: Console) -> None:
    """The comparisons that were fixed before anything was tested."""
    if not report["contrasts"]:
        return
    _heading(console, "Contrasts, fixed beforehand (paired)")
    for item in report["contrasts"]:
        console.print(Text(f"  {contrast_line(item)}"))


def render_resolution(report: Report, console: Console) -> None:
    """What so many rows can show at all."""
    line = resolution_line(report)
    if line:
        console.print(Text(line))


def render_test_looks(report: Report, console: Console) -> None:
    """How often the test file was opened, which is what its numbers are worth."""
    console.print(Text(test_looks_line(report)))


def render_plan_error(report: Report, console: Console) -> None:
    """How far the plan was off, in all and for each stage, where the run began with one."""
    for line in error_lines(report):
        console.print(Text(one_line(line) if not line.startswith(" ") else f"  {one_line(line)}"))


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold underline" if console.is_terminal else ""))
