"""What a run is doing now: a table that redraws itself in a terminal, one line per change elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bt_ray.report.formats import NOTHING, count_text, one_line, score_text, seconds_text

STYLES = {"running": "bold cyan", "done": "green", "failed": "bold red", "skipped": "yellow", "pending": "dim"}
MARKS = {"running": "▶", "done": "✓", "failed": "✗", "skipped": "–", "pending": "·"}


@dataclass(frozen=True)
class StageState:
    """A stage as the driver sees it now. `step` is what it does (rollout, search, ...); `score` its mean on select."""

    id: str
    path: str
    status: str
    step: str | None = None
    score: float | None = None
    lm_calls: int = 0
    tokens_per_s: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    note: str | None = None


class LiveView:
    """Context manager; feed it with `update(states)` as often as wished.

    In a terminal the table is redrawn in place and its last state stays. Without one a line is printed
    whenever a stage's status, step, score or note changes; counters alone print nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._printed: dict[str, tuple[object, ...]] = {}

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            # Redrawn on update alone: no thread of its own that could outlive an error.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, states: Sequence[StageState]) -> None:
        """Show these states, parents before children, all stages of the run each time."""
        if self._live is not None:
            self._live.update(view(states), refresh=True)
            return
        for state in states:
            shown = (state.status, state.step, state.score, state.note)
            if self._printed.get(state.id) == shown or (state.id not in self._printed and state.status == "pending"):
                continue
            self._printed[state.id] = shown
            self._console.print(Text(line(state)), soft_wrap=True)


def line(state: StageState) -> str:
    """`p -> w: running, finetune, 412 calls, 38 tokens/s, 2 min 05 s, about 3 min 10 s left`."""
    parts = [state.status]
    if state.step and state.status == "running":
        parts.append(one_line(state.step, 60))
    if state.score is not None:
        parts.append(f"select {score_text(state.score)}")
    if state.lm_calls:
        parts.append(f"{count_text(state.lm_calls)} calls")
    if state.tokens_per_s and state.status == "running":
        parts.append(f"{count_text(state.tokens_per_s)} tokens/s")
    if state.seconds:
        parts.append(seconds_text(state.seconds))
    if state.seconds_left is not None and state.status == "running":
        parts.append(f"about {seconds_text(state.seconds_left)} left")
    if state.note:
        parts.append(one_line(state.note, 200))
    return f"{one_line(state.path)}: {', '.join(parts)}"


def view(states: Sequence[StageState]) -> Table:
    """The stage tree as a table: a row per stage, indented by its depth."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("select", "calls", "tokens/s", "time", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for state in tree_order(states):
        running = state.status == "running"
        style = STYLES.get(state.status, "")
        depth = len(state.path.split(" -> ")) if state.id != "vanilla" else 0
        words = one_line(state.step, 30) if running and state.step else state.status
        table.add_row(
            Text("  " * depth + one_line(state.path), style="bold" if running else ""),
            Text(f"{MARKS.get(state.status, ' ')} {words}", style=style),
            score_text(state.score),
            count_text(state.lm_calls) if state.lm_calls else NOTHING,
            count_text(state.tokens_per_s) if running and state.tokens_per_s else "",
            seconds_text(state.seconds) if state.seconds else "",
            seconds_text(state.seconds_left) if running and state.seconds_left is not None else "",
            Text(one_line(state.note or "", 120), style="dim"),
        )
    return table


def tree_order(states: Sequence[StageState]) -> list[StageState]:
    """Each stage right before the stages that go on from it, siblings in the given order."""
    place = {state.path: index for index, state in enumerate(states)}

    def key(state: StageState) -> list[int]:
        steps = state.path.split(" -> ")
        prefixes = [" -> ".join(steps[: count + 1]) for count in range(len(steps))]
        return [place.get(prefix, len(states)) for prefix in prefixes]

    root = [state for state in states if state.id == "vanilla"]
    return root + sorted((state for state in states if state.id != "vanilla"), key=key)
