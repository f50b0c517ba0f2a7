"""The live view: in place in a terminal, a line per change without one."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from bt_ray.report.live import LiveView, StageState, line, tree_order

VANILLA = StageState("vanilla", "vanilla", "done", score=0.45, lm_calls=100, seconds=35.0)
SEARCHING = StageState("p", "p", "running", "search", None, 412, 38.2, 125.0, 190.0)
WAITING = StageState("p.w", "p -> w", "pending")


def console_of(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=100, color_system=None), file


def test_without_a_terminal_a_line_per_change() -> None:
    console, file = console_of(terminal=False)
    with LiveView(console) as view:
        view.update([VANILLA, SEARCHING, WAITING])
        view.update([VANILLA, replace(SEARCHING, lm_calls=500, seconds=140.0), WAITING])
        view.update([VANILLA, replace(SEARCHING, status="done", score=0.6), WAITING])
        view.update([VANILLA, replace(SEARCHING, status="done", score=0.6), replace(WAITING, status="running", step="rollout")])
    lines = file.getvalue().splitlines()
    assert lines == [
        "vanilla: done, select 0.450, 100 calls, 35 s",
        "p: running, search, 412 calls, 38 tokens/s, 2 min 05 s, about 3 min 10 s left",
        "p: done, select 0.600, 412 calls, 2 min 05 s",
        "p -> w: running, rollout",
    ]


def test_in_a_terminal_the_table_is_redrawn_in_place() -> None:
    console, file = console_of(terminal=True)
    with LiveView(console) as view:
        view.update([VANILLA, SEARCHING, WAITING])
        first = len(file.getvalue())
        view.update([VANILLA, replace(SEARCHING, lm_calls=555), WAITING])
    written = file.getvalue()
    assert "412" in written[:first] and "▶ search" in written[:first]
    # The cursor goes up over the old table before the new one is drawn.
    assert "\x1b[1A" in written[first:] and "555" in written[first:]


def test_the_terminal_is_given_back_after_an_error() -> None:
    console, file = console_of(terminal=True)
    try:
        with LiveView(console) as view:
            view.update([VANILLA])
            raise RuntimeError("the run failed")
    except RuntimeError:
        pass
    assert file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is visible again"


def test_stages_stand_under_the_stage_that_they_go_on_from() -> None:
    paths = ["vanilla", "p", "w", "p -> p", "w -> p", "p -> w", "p -> w -> p"]
    states = [StageState(path.replace(" -> ", "."), path, "pending") for path in paths]
    assert [state.path for state in tree_order(states)] == ["vanilla", "p", "p -> p", "p -> w", "p -> w -> p", "w", "w -> p"]


def test_foreign_text_stays_text() -> None:
    failed = StageState("w", "w", "failed", note="[/red] \x1b[31m bad\nrow")
    assert line(failed) == "w: failed, [/red] \\x1b[31m bad row"
    for terminal in (True, False):
        console, file = console_of(terminal)
        with LiveView(console) as view:
            view.update([failed])
        assert "[/red]" in file.getvalue() and "\x1b[31m" not in file.getvalue()
