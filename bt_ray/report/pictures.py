"""Pictures of the report as inline SVG: the strategy tree, intervals, bars. Pure; all text is escaped.

Sizes are in CSS pixels. Class names come from this file only, never from the run's own words.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.report import formats

Stage = Mapping[str, Any]
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, EDGE = 190, 84, 74, 16, 2
PAID = {"yes": "yes", "no": "no", "unclear": "unclear"}


def escape(text: object, limit: int | None = None) -> str:
    """Foreign text for HTML: no markup, no control characters, at most `limit` characters."""
    return html.escape(formats.plain(text, limit), quote=True)


@dataclass(frozen=True)
class Scale:
    """The range of scores that the pictures of one report share."""

    low: float
    high: float

    def place(self, value: float, width: float) -> float:
        """Pixels from the left of a track of `width` pixels."""
        span = (self.high - self.low) or 1.0
        return min(max((value - self.low) / span, 0.0), 1.0) * width


def scale_of(parts: Sequence[Mapping[str, Any] | None]) -> Scale:
    """0 to 1 where all scores and bounds lie there, else just wide enough for them."""
    values = [part[key] for part in parts if part for key in ("score", "low", "high") if part.get(key) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return Scale(0.0, 1.0) if low >= 0 and high <= 1 else Scale(low, high)


def whisker(part: Mapping[str, Any] | None, scale: Scale, width: int = 150) -> str:
    """A score as a dot on its interval, on the shared scale."""
    if not part:
        return ""
    inner = f'<rect class="track" x="0" y="8" width="{width}" height="4" rx="2"/>'
    if part.get("low") is not None:
        left, right = scale.place(part["low"], width), scale.place(part["high"], width)
        inner += f'<rect class="range" x="{left:.1f}" y="6" width="{max(right - left, 1):.1f}" height="8" rx="4"/>'
    at = min(max(scale.place(part["score"], width), 4), width - 4)
    inner += f'<circle class="dot" cx="{at:.1f}" cy="10" r="4"/>'
    return f'<svg width="{width}" height="20" viewBox="0 0 {width} 20" role="img">{inner}</svg>'


def difference(item: Mapping[str, Any], reach: float, width: int = 240) -> str:
    """A difference as a dot on its interval, with a line at 0; the track goes from -reach to reach."""
    part = {"score": item["difference"], "low": item.get("low"), "high": item.get("high")}
    drawn = whisker(part, Scale(-reach, reach), width)
    return drawn.replace("</svg>", f'<line class="zero" x1="{width / 2}" y1="0" x2="{width / 2}" y2="20"/></svg>')


def bar(values: Sequence[float], top: float, width: int = 170) -> str:
    """Stacked horizontal bar; `top` is the value that fills the whole width."""
    inner, at = "", 0.0
    for index, value in enumerate(values):
        length = width * value / top if top > 0 else 0.0
        inner += f'<rect class="{"bar" if index == 0 else "bar2"}" x="{at:.1f}" y="4" width="{length:.1f}" height="12"/>'
        at += length
    return f'<svg width="{width}" height="20" viewBox="0 0 {width} 20" role="img">{inner}</svg>'


def tree(stages: Sequence[Stage], pick: str | None, split: str, scale: Scale) -> str:
    """The strategy tree from left to right: a box per stage with its score on `split`, the way to the pick marked."""
    by_id = {stage["id"]: stage for stage in stages}
    places = _places(stages, by_id)
    on_way: set[str] = set()
    current = pick
    while current is not None and current in by_id and current not in on_way:
        on_way.add(current)
        current = by_id[current]["parent"]
    width = int(max(x for x, _ in places.values()) + BOX_WIDTH + 2 * EDGE)
    height = int(max(y for _, y in places.values()) + BOX_HEIGHT + 2 * EDGE)
    parts = [_edge(stage, places, stage["id"] in on_way) for stage in stages if stage["parent"] in places]
    parts += [_box(stage, places[stage["id"]], stage["id"] == pick, (split, scale)) for stage in stages]
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _places(stages: Sequence[Stage], by_id: Mapping[str, Stage]) -> dict[str, tuple[float, float]]:
    """Upper left corner of each box: a column per depth, a row per leaf, parents in the middle of their children."""
    children: dict[str | None, list[str]] = {}
    for stage in stages:
        parent = stage["parent"] if stage["parent"] in by_id else None
        children.setdefault(parent, []).append(stage["id"])
    places: dict[str, tuple[float, float]] = {}
    next_row = 0

    def put(stage_id: str, depth: int) -> float:
        nonlocal next_row
        rows = [put(child, depth + 1) for child in children.get(stage_id, [])]
        if rows:
            y = (rows[0] + rows[-1]) / 2
        else:
            y, next_row = EDGE + next_row * (BOX_HEIGHT + GAP_Y), next_row + 1
        places[stage_id] = (EDGE + depth * (BOX_WIDTH + GAP_X), y)
        return y

    for root in children.get(None, []):
        put(root, 0)
    return places


def _edge(stage: Stage, places: Mapping[str, tuple[float, float]], on_way: bool) -> str:
    (x_1, y_1), (x_2, y_2) = places[stage["parent"]], places[stage["id"]]
    start, end = x_1 + BOX_WIDTH, x_2
    middle, top, bottom = (start + end) / 2, y_1 + BOX_HEIGHT / 2, y_2 + BOX_HEIGHT / 2
    name = "edge is-pick" if on_way else "edge"
    path = f"M{start:.1f} {top:.1f} C{middle:.1f} {top:.1f} {middle:.1f} {bottom:.1f} {end:.1f} {bottom:.1f}"
    drawn = f'<path class="{name}" d="{path}"/>'
    if stage.get("gain"):
        paid = PAID.get(stage["paid"] or "", "unclear")
        text = formats.signed_text(stage["gain"]["difference"])
        # Beside the arrow's outer side, where the curve does not run through it.
        y = bottom + 16 if bottom > top + 1 else bottom - 7
        drawn += f'<text class="g {paid}" x="{end - 5:.1f}" y="{y:.1f}" text-anchor="end">{text}</text>'
    return drawn


def _box(stage: Stage, place: tuple[float, float], is_pick: bool, shown: tuple[str, Scale]) -> str:
    split, scale = shown
    x, y = place
    off = stage["status"] in ("skipped", "failed", "pending")
    name = "node" + (" is-pick" if is_pick else "") + (" is-off" if off else "")
    parts = [
        f'<rect class="{name}" x="{x}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="10"/>',
        f'<text class="t" x="{x + 12}" y="{y + 21:.1f}">{escape(formats.shorten(stage["path"], 23))}</text>',
    ]
    if is_pick:
        parts.append(f'<text class="g at-pick" x="{x + BOX_WIDTH - 12}" y="{y + 21:.1f}" text-anchor="end">pick</text>')
    part = stage[split]
    if not part:
        words = stage["status"] + (f": {stage['note']}" if stage.get("note") else "")
        if stage["status"] == "done":
            words = f"no score on {split}"
        parts.append(f'<text class="s" x="{x + 12}" y="{y + 46:.1f}">{escape(formats.shorten(words, 29))}</text>')
        return "".join(parts)
    track = BOX_WIDTH - 24
    at = scale.place(part["score"], track)
    parts.append(f'<text class="v" x="{x + 12}" y="{y + 47:.1f}">{formats.score_text(part["score"])}</text>')
    parts.append(
        f'<text class="s" x="{x + BOX_WIDTH - 12}" y="{y + 46:.1f}" text-anchor="end">{formats.bounds_text(part)}</text>'
    )
    parts.append(f'<rect class="track" x="{x + 12}" y="{y + 64:.1f}" width="{track}" height="4" rx="2"/>')
    if part.get("low") is not None:
        left, right = scale.place(part["low"], track), scale.place(part["high"], track)
        parts.append(
            f'<rect class="range" x="{x + 12 + left:.1f}" y="{y + 63:.1f}" width="{max(right - left, 1):.1f}" height="6" rx="3"/>'
        )
    parts.append(f'<circle class="dot" cx="{x + 12 + at:.1f}" cy="{y + 66:.1f}" r="3.5"/>')
    return "".join(parts)
