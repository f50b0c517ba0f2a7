"""The plan of a run in words, and how far it was off in the end. Pure; loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bt_ray.report.formats import NOTHING, count_text, seconds_text

Entry = Mapping[str, Any]  # an `estimate.Estimate` as JSON
TOTAL = "in all"  # beside the stages of a plan: all of them together; no stage can have this name
TOLERANCE = {"lm_calls": 0.10, "tokens": 0.25, "seconds": 0.50}  # what is likely to be further off is no estimate
WORDS = {"lm_calls": "calls", "tokens": "tokens", "seconds": "time"}


def expected(entry: Entry, name: str) -> float | None:
    """What the plan expects of a quantity; None where nobody knows, or where it is likely off by more than TOLERANCE."""
    value = planned_tokens(entry) if name == "tokens" else entry.get(name)
    if value is None:
        return None
    spread = (entry.get("spread") or {}).get(name) or 0.0
    return value if spread <= TOLERANCE[name] * value else None


def most_calls(entry: Entry) -> int | None:
    return entry.get("lm_calls_at_most")


def cost_text(entry: Entry) -> str:
    """`about 1 122 LM calls (at most 1 218), 301 k + 6 k tokens, roughly 2 min 40 s, 2.9 GiB` of one stage's estimate.

    Tokens are those of prompts + completions. What cannot be told is unknown; memory is then left out.
    """
    parts = [_calls_text(entry)]
    if expected(entry, "tokens") is not None:
        parts.append(f"{_thousands(entry['prompt_tokens'])} + {_thousands(entry['completion_tokens'])} tokens")
    elif "prompt_tokens" in entry:
        parts.append("tokens unknown")
    parts.append(_seconds_text(entry))
    if entry.get("memory_gib") is not None:
        parts.append(f"{entry['memory_gib']:.1f} GiB")
    return ", ".join(parts)


def totals_text(estimates: Mapping[str, Entry]) -> str:
    """One sentence on all stages together, and what it leaves out."""
    entries = [entry for name, entry in estimates.items() if name != TOTAL]
    whole = estimates.get(TOTAL) or {}
    counted = [entry for entry in entries if entry["lm_calls"] is not None]
    if whole.get("lm_calls") is None:  # of some stages nobody knows
        whole = {**whole, **_sums(counted)}
    parts = [_calls_text(whole)]
    tokens = expected(whole, "tokens")
    if tokens is not None:
        parts.append(f"{_thousands(tokens)} tokens")
    elif "prompt_tokens" in whole:
        parts.append("tokens unknown")
    work = "" if expected(whole, "seconds") is None else " of work"
    text = f"Together {', '.join(parts)} and {_seconds_text(whole)}{work}."
    if len(counted) < len(entries):
        text += " What is unknown is not counted."
    memory = [entry["memory_gib"] for entry in entries if entry.get("memory_gib") is not None]
    if memory:
        text += f" Memory at the peak {max(memory):.1f} GiB, without libraries and activations."
    return text


def probe_text(probe: Any) -> str:
    """Where the numbers come from: an `estimate.Probe`, or None."""
    if probe is None:
        return (
            "Counted from sizes: each predictor is taken to be called once a run. Times and tokens are unknown until a "
            "probe has measured them here (`bt-ray plan CONFIG`); what stands beside a time is from a 135M model on two cores."
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
    """Per stage of the stored plan, and of all: {"id", "lm_calls", "tokens", "seconds"}, each {"planned", "actual", "error"}.

    `planned` is None where the plan had no estimate. `actual` is what the stage's own steps cost (seconds without the
    start of their jobs), None while it is not finished. `error` is (planned - actual) / actual, None where either is
    unknown or nothing was spent. The row of all (TOTAL) is of the stages that ended, once one has.
    """
    plan = {name: entry for name, entry in (facts.get("plan") or {}).items() if name != TOTAL}
    costs = {stage["id"]: stage["cost"] for stage in facts["stages"] if stage["status"] in ("done", "skipped")}
    if facts.get("final_cost"):
        costs["final"] = facts["final_cost"]
    ended = {name: _spent(costs[name]) for name in plan if name in costs}
    rows = [_row(name, entry, ended.get(name)) for name, entry in plan.items()]
    if not ended:
        return rows
    whole = (facts.get("plan") or {}).get(TOTAL) if len(ended) == len(plan) else None
    spent = {name: sum(cost[name] for cost in ended.values()) for name in TOLERANCE}
    return [*rows, _row(TOTAL, whole or _sums([plan[name] for name in ended]), spent)]


def error_lines(report: Mapping[str, Any]) -> list[str]:
    """`Estimate: calls +4 %, tokens -12 %, time +30 % (...)` of all stages that ended, then of each. Empty without a plan."""
    rows = {row["id"]: row for row in report.get("plan") or [] if row["lm_calls"]["actual"] is not None}
    if TOTAL not in rows:
        return []
    paths = {stage["id"]: stage["path"] for stage in report["stages"]} | {"final": "test"}
    stages = [f"  {path}: {_errors(rows[name])}" for name, path in paths.items() if name in rows]
    return [f"Estimate: {_errors(rows[TOTAL])} (planned before the run, against what it took)", *stages]


def _errors(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{word} {_error_text(row[name])}" for name, word in WORDS.items())


def _error_text(found: Mapping[str, float | None]) -> str:
    if found["planned"] is None:
        return "unknown"
    return NOTHING if found["error"] is None else f"{100 * found['error']:+.0f} %"


def _row(stage_id: str, entry: Entry, spent: Mapping[str, float] | None) -> dict[str, Any]:
    return {"id": stage_id, **{name: _compared(expected(entry, name), (spent or {}).get(name)) for name in TOLERANCE}}


def _spent(cost: Mapping[str, Any]) -> dict[str, float]:
    found = {name: cost.get(name) or 0 for name in ("lm_calls", "prompt_tokens", "completion_tokens", "seconds")}
    return {
        "lm_calls": found["lm_calls"],
        "tokens": found["prompt_tokens"] + found["completion_tokens"],
        "seconds": found["seconds"],
    }


def _sums(entries: Iterable[Entry]) -> dict[str, Any]:
    """The entries as one; what one of them does not know nobody knows. Spreads add up: they may have one cause."""
    entries = list(entries)
    names = ("lm_calls", "lm_calls_at_most", "prompt_tokens", "completion_tokens", "seconds")
    sums = {name: _sum(entry.get(name) for entry in entries) for name in names if all(name in entry for entry in entries)}
    spread = {name: sum((entry.get("spread") or {}).get(name) or 0.0 for entry in entries) for name in TOLERANCE}
    rough = any(entry.get("rough") for entry in entries)
    return {"lm_calls": None, "seconds": None, **sums, "rough": rough, "spread": spread}


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(value or 0 for value in found)


def _compared(planned: float | None, actual: float | None) -> dict[str, float | None]:
    error = round((planned - actual) / actual, 4) if planned is not None and actual else None
    return {"planned": planned, "actual": actual, "error": error}


def _calls_text(entry: Entry) -> str:
    calls, most = expected(entry, "lm_calls"), most_calls(entry)
    bound = f" (at most {count_text(most)})" if most is not None and most != calls else ""
    return f"about {count_text(calls)} LM calls{bound}" if calls is not None else f"LM calls unknown{bound}"


def _seconds_text(entry: Entry) -> str:
    seconds = expected(entry, "seconds")
    if seconds is None:
        return f"time unknown{_likely(entry)}"
    return f"{'roughly ' if entry.get('rough') else ''}{seconds_text(seconds)}"


def _likely(entry: Entry) -> str:
    """Between what and what the seconds are likely to lie, where they are no estimate."""
    seconds, spread = entry.get("seconds"), (entry.get("spread") or {}).get("seconds")
    if seconds is None or spread is None:
        return ""
    return f" (likely {seconds_text(max(0.0, seconds - spread))} to {seconds_text(seconds + spread)})"


def _thousands(count: float) -> str:
    """`301 k` from 10 000 on."""
    return count_text(count) if count < 10_000 else f"{count_text(count / 1000)} k"
