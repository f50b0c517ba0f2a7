"""The plan of a run in words, and how far it was off in the end. Pure; loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bt_ray.report.formats import NOTHING, count_text, seconds_text

Entry = Mapping[str, Any]
QUANTITIES = ("lm_calls", "tokens", "seconds")


def cost_text(entry: Entry) -> str:
    """`at most 1 218 LM calls, 301 k + 6 k tokens, roughly 2 min 40 s, 2.9 GiB` of one stage's estimate.

    Tokens are those of prompts + completions, and are left out where they are unknown, as memory is.
    """
    parts = [f"{_bound(entry)} {count_text(entry['lm_calls'])} LM calls" if entry["lm_calls"] is not None else "LM calls unknown"]
    if entry.get("prompt_tokens") is not None and entry.get("completion_tokens") is not None:
        parts.append(f"{_thousands(entry['prompt_tokens'])} + {_thousands(entry['completion_tokens'])} tokens")
    if entry["seconds"] is None:
        parts.append("time unknown")
    else:
        parts.append(f"{'roughly ' if entry.get('rough') else ''}{seconds_text(entry['seconds'])}")
    if entry.get("memory_gib") is not None:
        parts.append(f"{entry['memory_gib']:.1f} GiB")
    return ", ".join(parts)


def totals_text(entries: Iterable[Entry]) -> str:
    """One sentence on all stages together, and what it leaves out."""
    entries = list(entries)
    known = [entry for entry in entries if entry["lm_calls"] is not None]
    calls = sum(entry["lm_calls"] for entry in known)
    seconds = sum(entry["seconds"] for entry in known)
    rough = "roughly " if any(entry.get("rough") for entry in known) else ""
    bound = "at most" if any(entry.get("at_most") for entry in known) else "about"
    text = f"Together {bound} {count_text(calls)} LM calls and {rough}{seconds_text(seconds)} of work."
    if len(known) < len(entries):
        text += " What is unknown is not counted."
    tokens = [planned_tokens(entry) for entry in entries]
    if entries and None not in tokens:
        text += f" {_thousands(sum(token or 0 for token in tokens))} tokens."
    memory = [entry["memory_gib"] for entry in entries if entry.get("memory_gib") is not None]
    if memory:
        text += f" Memory at the peak {max(memory):.1f} GiB, without libraries and activations."
    return text


def probe_text(probe: Any) -> str:
    """Where the numbers come from: an `estimate.Probe`, or None."""
    if probe is None:
        return (
            "Counted from sizes: each predictor is taken to be called once a run. Times are those of a 135M model on two cores; "
            "tokens are unknown."
        )
    return (
        f"Measured on {probe.num_runs} runs of the program as written: {probe.calls_per_run:.1f} calls a run, "
        f"{probe.prompt_tokens:.0f} + {probe.completion_tokens:.0f} tokens a call, {probe.calls_per_s:.1f} calls/s, "
        f"{probe.pass_share:.0%} pass. The speed of training was not measured."
    )


def planned_tokens(entry: Entry) -> int | None:
    parts = entry.get("prompt_tokens"), entry.get("completion_tokens")
    return None if None in parts else sum(part or 0 for part in parts)


def plan_errors(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per stage of the stored plan: {"id", "lm_calls", "tokens", "seconds"}, each {"planned", "actual", "error"}.

    `actual` is what the stage's own steps cost, None while it is not finished. `error` is
    (planned - actual) / actual, None where either is unknown or nothing was spent.
    """
    ended = {stage["id"]: stage["cost"] for stage in facts["stages"] if stage["status"] in ("done", "skipped")}
    if facts.get("final_cost"):
        ended["final"] = facts["final_cost"]
    rows = []
    for stage_id, entry in (facts.get("plan") or {}).items():
        cost = ended.get(stage_id)
        spent = {**cost, "tokens": cost["prompt_tokens"] + cost["completion_tokens"]} if cost else {}
        planned = {**entry, "tokens": planned_tokens(entry)}
        rows.append({"id": stage_id, **{name: _compared(planned[name], spent.get(name)) for name in QUANTITIES}})
    return rows


def error_line(report: Mapping[str, Any]) -> str | None:
    """`Planned 4 376 LM calls, made 3 990 (+10 %); planned 17 min 10 s, took 16 min 34 s (+4 %).`

    Over the stages that ended. Seconds are those of their steps, without the start of their jobs. None without a plan.
    """
    parts = []
    for name, noun, verb, text in (("lm_calls", " LM calls", "made", count_text), ("seconds", "", "took", seconds_text)):
        both = [row[name] for row in report.get("plan") or [] if None not in (row[name]["planned"], row[name]["actual"])]
        if both:
            total = _compared(sum(item["planned"] for item in both), sum(item["actual"] for item in both))
            error = NOTHING if total["error"] is None else f"{100 * total['error']:+.0f} %"
            parts.append(f"planned {text(total['planned'])}{noun}, {verb} {text(total['actual'])} ({error})")
    return f"P{'; '.join(parts)[1:]}." if parts else None


def _compared(planned: float | None, actual: float | None) -> dict[str, float | None]:
    error = round((planned - actual) / actual, 4) if planned is not None and actual else None
    return {"planned": planned, "actual": actual, "error": error}


def _bound(entry: Entry) -> str:
    return "at most" if entry.get("at_most") else "about"


def _thousands(count: float) -> str:
    """`301 k` from 10 000 on."""
    return count_text(count) if count < 10_000 else f"{count_text(count / 1000)} k"
