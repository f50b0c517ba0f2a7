"""The sentences that the terminal and the HTML page share. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bt_ray.report import formats
from bt_ray.report.formats import bounds_text, one_line, signed_text

Report = Mapping[str, Any]


def contrast_name(item: Mapping[str, Any]) -> str:
    """Its name, with the stage that the name stands for: `pick - best single step (p)`."""
    name = one_line(item["name"])
    return name if item["name"] == f"pick - {item['against']}" else f"{name} ({one_line(item['against'])})"


def pick_lines(report: Report) -> list[str]:
    """Why it was picked, that test had no part in it, how much better it looks on the rows that its prompts were chosen on, how steady its score is."""
    lines = [one_line(report["best"]["why"])] if report["best"].get("why") else []
    lines.append(committed_line(report))
    if report.get("optimism") is not None:
        gap = signed_text(report["optimism"])
        lines.append(f"Its search score minus its select score is {gap}: the optimism of choosing prompts on search.")
    if report.get("flip_rate") is not None:
        lines.append(f"Run on select a second time, {100 * report['flip_rate']:.0f} % of the rows scored otherwise.")
    return lines


def committed_line(report: Report) -> str:
    """When the pick was committed, seen from the openings of test: before the only one, or before the last of several."""
    looks = report["test_looks"]
    if not report["best"]["test"]:  # an earlier pick may have been tested, so nothing is said of before and after
        return f"It was committed by select alone; {'it has no score on test' if looks else 'test has not been opened'}."
    if looks == 1:
        return "It was committed before test was opened."
    return f"It was committed before test was opened for the last of {looks} times."


def contrast_line(item: Mapping[str, Any]) -> str:
    """`pick - vanilla: +0.325 [+0.192, +0.443], p 0.004 (Holm 0.012), 120 rows of test`."""
    p = f"p {formats.p_text(item['p'])} (Holm {formats.p_text(item['p_holm'])})"
    difference = f"{signed_text(item['difference'])} {bounds_text(item, signed=True)}".rstrip()
    return f"{contrast_name(item)}: {difference}, {p}, {formats.plural(item['n'], 'row')} of {item['on']}"


def resolution_line(report: Report) -> str | None:
    """What n rows can resolve, as a sentence; None where nothing was compared."""
    found = report.get("resolution")
    if not found:
        return None
    rows = formats.plural(found["n"], "row")
    if found["difference"] is None:
        return f"{rows} of {found['on']} are too few, or change too little, to say what difference they can show."
    return (
        f"{rows} of {found['on']} show a difference of {found['difference']:.3f} or more to {found['against']} "
        f"with 80 % power (two-sided 5 %; {100 * found['discordant']:.0f} % of rows changed)."
    )


STEP_WORDS = {"rollout": "rollouts", "search": "search", "finetune": "fine-tune", "evaluate": "evaluation"}


def shared_line(report: Report) -> str | None:
    """Whose time and calls hold the steps that a stage used and did not run: `A step counts where it ran: w used
    the rollouts of p (384 calls, 56 s).` None where no step was shared."""
    parts = []
    for stage in report["stages"]:
        for owner in dict.fromkeys(step["stage"] for step in stage.get("shared") or ()):
            steps = [step for step in stage["shared"] if step["stage"] == owner]
            kinds = " and ".join(dict.fromkeys(STEP_WORDS.get(step["kind"], step["kind"]) for step in steps))
            calls, seconds = sum(step["lm_calls"] for step in steps), sum(step["seconds"] for step in steps)
            cost = f"{formats.count_text(calls)} calls, {formats.seconds_text(seconds)}"
            path = next((item["path"] for item in report["stages"] if item["id"] == owner), owner)
            parts.append(f"{one_line(stage['path'])} used the {kinds} of {one_line(path)} ({cost})")
    return f"A step counts where it ran: {'; '.join(parts)}." if parts else None


def test_looks_line(report: Report) -> str:
    looks = report["test_looks"]
    if looks == 0:
        return "The test file was not opened."
    if looks == 1:
        return "The test file was opened once."
    return f"The test file was opened {looks} times: every look after the first makes its scores more optimistic."


def shown_split(report: Report) -> str:
    """`test` if any stage has test scores, else `select`."""
    return "test" if any(stage["test"] for stage in report["stages"]) else "select"
