"""Numbers, durations and foreign text as people read them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Characters that turn the reading direction: text with them can show other words than it holds.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
NOTHING = "–"


def plain(text: object, limit: int | None = None) -> str:
    """`text` without terminal control, reading direction marks and lone surrogates; cut at `limit` characters.

    Line ends and tabs stay. Any other control character becomes its visible escape, such as `\\x1b`.
    """
    kept = []
    for char in str(text):
        code = ord(char)
        control = (code < 32 and char not in "\n\t") or 127 <= code < 160
        if control or char in _BIDI or 0xD800 <= code < 0xE000:
            kept.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
        else:
            kept.append(char)
    result = "".join(kept)
    if limit is not None and len(result) > limit:
        return f"{result[:limit].rstrip()} … (+{len(result) - limit} characters)"
    return result


def one_line(text: object, limit: int | None = None) -> str:
    """As `plain`, with every run of white space as one space."""
    return plain(" ".join(str(text).split()), limit)


def value_text(value: object) -> str:
    """A field's value: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def fields_text(fields: Mapping[str, Any] | None, limit: int = 300) -> str:
    """`name: value` of every field, on one line."""
    if not fields:
        return NOTHING
    return one_line("; ".join(f"{name}: {value_text(value)}" for name, value in fields.items()), limit)


def score_text(score: float | None, digits: int = 3) -> str:
    return NOTHING if score is None else f"{score:.{digits}f}"


def signed_text(difference: float | None) -> str:
    return NOTHING if difference is None else f"{difference:+.3f}"


def bounds_text(part: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`[low, high]`, or nothing where the data cannot say."""
    if not part or part.get("low") is None or part.get("high") is None:
        return ""
    form = signed_text if signed else score_text
    return f"[{form(part['low'])}, {form(part['high'])}]"


def interval_text(part: Mapping[str, Any] | None) -> str:
    """`0.612 [0.484, 0.724]` of a part with score, low and high."""
    if not part:
        return NOTHING
    return f"{score_text(part['score'])} {bounds_text(part)}".rstrip()


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count_text(count: float | None) -> str:
    """`12 345` with thin groups of thousands."""
    return NOTHING if count is None else f"{round(count):,}".replace(",", " ")


def seconds_text(seconds: float | None) -> str:
    """`8 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return NOTHING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count_text(count)} {noun}" if count == 1 else f"{count_text(count)} {noun}s"


def pass_text(stage: Mapping[str, Any]) -> str | None:
    """What the rollouts of a stage of `facts` gave it: `29 of 64 pass: 58 rows to learn from`. None without rollouts."""
    if stage["status"] in ("skipped", "failed"):
        # A stage that ended has a note of its own; what the driver says of one without a record is its error.
        return f"{stage['status']}: {one_line(stage.get('note') or stage.get('error') or 'no reason given', 300)}"
    rollouts = stage.get("rollouts")
    if not rollouts:
        return None
    text = f"{rollouts['passed']} of {rollouts['rollouts']} pass"
    if stage.get("rows") is not None:
        tried = stage.get("prompts_on_select") or {}
        means = ", ".join(f"{score_text(mean)} with the {name} prompts" for name, mean in tried.items()) if len(tried) > 1 else ""
        return f"{text}: {plural(stage['rows'], 'row')} to learn from{f'; select {means}' if means else ''}"
    return f"{text}: demos from {plural(rollouts['examples_passed'], 'example')}"


def answer_text(answer: Mapping[str, Any]) -> str:
    """What a stage answered to the followed example; without an answer, why there is none."""
    if answer.get("prediction") is None and answer.get("error"):
        return f"failed: {one_line(answer['error'], 300)}"
    return fields_text(answer.get("prediction"))


def verdict_text(answer: Mapping[str, Any]) -> str:
    """`right`, `wrong`, or the score between them; why there is none where the metric failed. "" without an answer."""
    score = answer.get("score")
    if score is not None:
        return {1.0: "right", 0.0: "wrong"}.get(float(score), f"score {score_text(score, 2)}")
    if answer.get("prediction") is None:
        return ""
    return f"not scored: {one_line(answer.get('error') or 'no reason given', 200)}"


def shorten(text: object, width: int) -> str:
    """One line of at most `width` characters; the end of what is cut is `…`."""
    line = one_line(text)
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
