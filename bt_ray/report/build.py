"""From the facts of a run to its report: plain data in, plain data out, no I/O.

`facts` holds what the records say: per stage its scores by example, cost, candidate and predictions;
see `build_report`. The report holds what may be claimed from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bt_ray.report import selection, statistics
from bt_ray.report.costs import device_seconds, own_steps, shared_steps, total_devices
from bt_ray.report.planned import plan_errors
from bt_ray.report.statistics import paired, present

Facts = Mapping[str, Any]
Stage = Mapping[str, Any]
EQUAL_COST = "equal_cost"  # the kind of the control that searches prompts at the pick's cost
ENDED = ("done", "skipped")
_COST = ("lm_calls", "prompt_tokens", "completion_tokens", "seconds")


def build_report(facts: Facts) -> dict[str, Any]:
    """The report of a run, as JSON can hold it.

    Keys: run_dir, status, task, model, metric, stages, best, contrasts, test_looks, controls,
    resolution, optimism, flip_rate, totals, plan. Missing numbers are None.

    - Each stage has its mean and 95 % interval on select, search and test, its cost, and `gain`: the
      paired difference to its parent on test where both have it, else on select. `paid` is "yes" if
      that interval lies above 0, "no" if below, else "unclear"; None for vanilla and unfinished stages.
      Its cost (calls, tokens, seconds, `device_seconds`) is of the steps that it ran itself; `shared` are
      those that it used and another stage ran. See `costs.device_seconds` for what counts as devices.
    - `contrasts` are fixed beforehand (pick against vanilla, the best single step, the prompt-only
      strategy of nearest length, the prompt step, and the prompt step at equal cost where that control
      ran; the longest mix of prompt and weight steps against each single step), with p values adjusted
      by Holm over all of them. A rival that stands under two names is counted once, under the first.
    - `resolution` is the difference between pick and vanilla that n rows show with 80 % power.
    - `optimism` is the pick's mean on search (which its prompts were chosen on) minus that on select.
    - `flip_rate` is the share of select rows that the pick, run a second time, scored otherwise: greedy answers
      depend on what else is in the batch.
    - `plan` is what was expected of each stage and of all before the run, and what it took (see `planned.plan_errors`).
    """
    by_id = {stage["id"]: stage for stage in facts["stages"]}
    stages = [
        {**_stage(stage, by_id), "device_seconds": device_seconds(own_steps(stage), facts.get("devices"))}
        for stage in facts["stages"]
    ]
    pick = by_id.get(facts.get("pick") or "")
    return {
        "run_dir": facts["run_dir"],
        "status": facts["status"],
        "task": facts.get("task"),
        "model": facts.get("model"),
        "metric": facts.get("metric"),
        "stages": stages,
        "best": _best(facts, pick),
        "contrasts": _contrasts(pick, by_id, facts.get("controls") or []) if pick else [],
        "test_looks": int(facts.get("test_looks") or 0),
        "controls": [
            {"name": control["name"], "test": score_of(control.get("test_scores")), "note": control.get("note")}
            for control in facts.get("controls") or []
        ],
        "resolution": _resolution(pick, by_id) if pick else None,
        "optimism": _optimism(pick) if pick else None,
        "flip_rate": statistics.flip_rate(pick.get("select_scores") or {}, facts.get("again_scores") or {}) if pick else None,
        "totals": {
            **{key: sum(stage[key] for stage in stages) for key in _COST},
            "device_seconds": total_devices(stage["device_seconds"] for stage in stages if stage["status"] in ENDED),
        },
        "plan": plan_errors(facts),
    }


def score_of(scores: Mapping[str, float | None] | None) -> dict[str, Any] | None:
    """{score, low, high, n, method} of scores by example; None without a score."""
    found = statistics.interval(list((scores or {}).values()))
    return found.as_dict() if found else None


def compare(a: Stage, b: Stage) -> dict[str, Any] | None:
    """a minus b, paired: on test where both have test scores, else on select. None if they share no row."""
    for split in ("test", "select"):
        left, right = paired(a.get(f"{split}_scores"), b.get(f"{split}_scores"))
        found = statistics.contrast(left, right)
        if found:
            return {
                "difference": found.difference,
                "low": found.low,
                "high": found.high,
                "p": found.p,
                "n": found.n,
                "method": found.method,
                "on": split,
            }
    return None


def _stage(stage: Stage, by_id: Mapping[str, Stage]) -> dict[str, Any]:
    cost = stage.get("cost") or {}
    parent = by_id.get(stage.get("parent") or "")
    done = stage["status"] == "done"
    gain = compare(stage, parent) if done and parent else None
    return {
        "id": stage["id"],
        "kind": stage["kind"],
        "path": stage["path"],
        "parent": stage.get("parent"),
        "status": stage["status"],
        "select": score_of(stage.get("select_scores")),
        "search": score_of(stage.get("search_scores")),
        "test": score_of(stage.get("test_scores")),
        **{key: cost.get(key) or 0 for key in _COST},
        "shared": shared_steps(stage),
        "tokens_per_example": stage.get("tokens_per_example"),  # on select: what an answer costs to use, training apart
        "row_errors": stage.get("row_errors") or 0,
        "rollouts": stage.get("rollouts"),
        "rows": stage.get("rows"),
        "prompts_on_select": stage.get("prompts_on_select"),  # after a weight step: the mean of each prompt it tried
        "note": stage.get("note") or stage.get("error"),
        "paid": _paid(gain),
        "gain": {key: gain[key] for key in ("difference", "low", "high", "n", "on")} if gain else None,
    }


def _paid(gain: Mapping[str, Any] | None) -> str | None:
    if gain is None:
        return None
    if gain["low"] is not None and gain["low"] > 0:
        return "yes"
    if gain["high"] is not None and gain["high"] < 0:
        return "no"
    return "unclear"


def _best(facts: Facts, pick: Stage | None) -> dict[str, Any] | None:
    if pick is None:
        return None
    why = facts.get("pick_why")
    if not why:
        # The committed pick stands; the rule's reason is shown only where it gives the same stage.
        rule = selection.pick(selection.from_facts(facts))
        why = rule.why if rule and rule.id == pick["id"] else None
    return {
        "id": pick["id"],
        "path": pick["path"],
        "select": score_of(pick.get("select_scores")),
        "test": score_of(pick.get("test_scores")),
        "why": why,
    }


def _rivals(pick: Stage, by_id: Mapping[str, Stage]) -> list[tuple[str, Stage]]:
    """The stages that the pick is set against, named before anything is tested. Chosen by select, never by test."""
    done = [stage for stage in by_id.values() if stage["status"] == "done" and present(stage.get("select_scores"))]
    chains = {stage["id"]: selection.path_of(stage["id"], by_id) for stage in done}
    prompts = [stage for stage in done if all(item["kind"] == "p" for item in chains[stage["id"]][1:])]
    depth = {key: len(chain) - 1 for key, chain in chains.items()}
    target = max(2, len(selection.path_of(pick["id"], by_id)) - 1)

    def first(candidates: Sequence[Stage]) -> Stage | None:
        return max(candidates, key=_mean_on_select, default=None)

    longer = [stage for stage in prompts if depth[stage["id"]] >= 2]
    nearest = min((abs(depth[stage["id"]] - target) for stage in longer), default=0)
    named = [
        ("vanilla", first([stage for stage in done if depth[stage["id"]] == 0])),
        ("best single step", first([stage for stage in done if depth[stage["id"]] == 1])),
        (None, first([stage for stage in longer if abs(depth[stage["id"]] - target) == nearest])),
        (None, first([stage for stage in prompts if depth[stage["id"]] == 1])),
    ]
    rivals: dict[str, tuple[str, Stage]] = {}
    for name, stage in named:
        if stage is not None and stage["id"] != pick["id"]:
            rivals.setdefault(stage["id"], (name or stage["path"], stage))
    return list(rivals.values())


def _mean_on_select(stage: Stage) -> float:
    values = present(stage.get("select_scores")).values()
    return math.fsum(values) / len(values)


def _mixes(by_id: Mapping[str, Stage]) -> list[tuple[str, Stage, Stage]]:
    """The question of the method: the longest mix of both kinds (the first named) against each single step."""
    done = [stage for stage in by_id.values() if stage["status"] == "done" and present(stage.get("select_scores"))]
    chains = {stage["id"]: selection.path_of(stage["id"], by_id)[1:] for stage in done}
    mixed = [stage for stage in done if len({item["kind"] for item in chains[stage["id"]]}) > 1]
    longest = max(mixed, key=lambda stage: len(chains[stage["id"]]), default=None)
    if longest is None:
        return []
    singles = [stage for stage in done if len(chains[stage["id"]]) == 1]
    return [(f"{longest['path']} - {single['path']}", longest, single) for single in singles]


def _equal_cost(controls: Sequence[Mapping[str, Any]]) -> list[tuple[str, Stage]]:
    """The control that searched prompts at the pick's cost, as a rival; nothing where it did not run."""
    ran = [control for control in controls if control.get("kind") == EQUAL_COST and present(control.get("test_scores"))]
    return [
        (name, {"id": name, "path": name, "test_scores": control["test_scores"]})
        for control in ran
        for name in [f"equal-cost {control['step']}"]
    ]


def _contrasts(pick: Stage, by_id: Mapping[str, Stage], controls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    rivals = [*_rivals(pick, by_id), *_equal_cost(controls)]
    pairs = [(f"pick - {name}", pick, rival) for name, rival in rivals]
    known = {(left["id"], right["id"]) for _, left, right in pairs}
    pairs += [item for item in _mixes(by_id) if (item[1]["id"], item[2]["id"]) not in known]
    for name, left, right in pairs:
        result = compare(left, right)
        if result:
            found.append({"name": name, "against": right["path"], **result})
    adjusted = statistics.holm([item["p"] for item in found])
    return [{**item, "p_holm": p_holm} for item, p_holm in zip(found, adjusted, strict=True)]


def _resolution(pick: Stage, by_id: Mapping[str, Stage]) -> dict[str, Any] | None:
    """What the rows can show between the pick and the root (or, if the root is picked, its best rival)."""
    rivals = _rivals(pick, by_id)
    if not rivals:
        return None
    rival = rivals[0][1]
    for split in ("test", "select"):
        a, b = paired(pick.get(f"{split}_scores"), rival.get(f"{split}_scores"))
        n = len(a)
        if n < 2:
            continue
        differences = [x - y for x, y in zip(a, b, strict=True)]
        changed = sum(value != 0 for value in differences) / n
        if statistics.is_binary(a) and statistics.is_binary(b):
            difference = statistics.detectable_difference(n, changed)
        else:
            mean = math.fsum(differences) / n
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (n - 1))
            difference = statistics.detectable_mean(n, deviation) if deviation > 0 else None
        return {"n": n, "difference": difference, "discordant": changed, "against": rival["path"], "on": split}
    return None


def _optimism(pick: Stage) -> float | None:
    search, select = present(pick.get("search_scores")), present(pick.get("select_scores"))
    if not search or not select:
        return None
    return math.fsum(search.values()) / len(search) - math.fsum(select.values()) / len(select)
