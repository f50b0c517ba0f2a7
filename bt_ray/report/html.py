"""The report as one HTML file: nothing is loaded, no script runs, foreign text stays text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from bt_ray.report import formats, pictures, text_lines
from bt_ray.report.changes import stage_changes
from bt_ray.report.formats import NOTHING, count_text, interval_text, score_text, seconds_text, signed_text
from bt_ray.report.pictures import escape

Facts = Mapping[str, Any]
Report = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MAX_CHANGES = 40  # rows shown per stage and direction
MAX_TEXT = 4000  # characters shown of one instruction or demo field
PAID_WORDS = {"yes": "yes", "no": "no, it lost", "unclear": "unclear"}


def render_html(report: Report, facts: Facts) -> str:
    """The whole page as text. `report` is `build_report(facts)`."""
    style = files("bt_ray.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"bt-ray: {report.get('task') or report['run_dir']}"
    body = "".join(
        (
            _head(report),
            _tree(report),
            _scores(report),
            _contrasts(report),
            _costs(report),
            _follow(facts),
            _prompts(report, facts),
            _changes(facts),
            f"<footer>{escape(text_lines.test_looks_line(report))} Intervals are 95 %: Wilson for scores of 0 and 1, "
            "score intervals with skewness for real scores; Tango for paired differences.</footer>",
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title, 200)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def _card(title: str, inner: str, note: str = "") -> str:
    under = f'<p class="soft small">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{inner}{under}</section>' if inner else ""


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    """`heads` are (words, class); `rows` are finished <tr>."""
    cells = "".join(f'<th class="{name}">{escape(words)}</th>' for words, name in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _tile(name: str, value: str, under: str = "") -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="under">{escape(under)}</div></div>'
    )


def _head(report: Report) -> str:
    best, split = report.get("best"), text_lines.shown_split(report)
    facts = (("model", "model"), ("metric", "metric"), ("status", "status"), ("run", "run_dir"))
    items = "".join(f"<li>{name} <b>{escape(report.get(key) or NOTHING, 300)}</b></li>" for name, key in facts)
    head = f'<h1>{escape(report.get("task") or "Run", 200)}</h1><ul class="facts">{items}</ul>'
    if not best:
        return f"{head}{_card('Pick', '<p>None: no stage finished with scores on select.</p>')}"
    tiles = _tile("pick", best["path"], f"select {interval_text(best['select'])}")
    if best[split]:
        tiles += _tile(f"its score on {split}", score_text(best[split]["score"]), formats.bounds_text(best[split]))
    first = next((item for item in report["contrasts"] if item["against"] == "vanilla"), None)
    if first:
        p = f"p {formats.p_text(first['p_holm'])} after Holm"
        tiles += _tile("gain over vanilla", signed_text(first["difference"]), f"{formats.bounds_text(first, True)} {p}")
    totals = report["totals"]
    tokens = f"{seconds_text(totals['seconds'])}, {count_text(totals['prompt_tokens'] + totals['completion_tokens'])} tokens"
    tiles += _tile("LM calls of all stages", count_text(totals["lm_calls"]), tokens)
    notes = "".join(f"<p>{escape(line)}</p>" for line in text_lines.pick_lines(report))
    return f'{head}<section class="card"><div class="tiles">{tiles}</div>{notes}</section>'


def _tree(report: Report) -> str:
    split = text_lines.shown_split(report)
    picture = pictures.tree(report["stages"], (report.get("best") or {}).get("id"), split, _scale(report, split))
    note = f"Score on {split} with its 95 % interval. On the arrows: the paired gain over the stage before."
    return _card("Strategy tree", f'<div class="scroll">{picture}</div>', note)


def _scale(report: Report, split: str) -> pictures.Scale:
    controls = [control["test"] for control in report["controls"]] if split == "test" else []
    return pictures.scale_of([stage[split] for stage in report["stages"]] + controls)


def _scores(report: Report) -> str:
    split, best = text_lines.shown_split(report), (report.get("best") or {}).get("id")
    scale, rows = _scale(report, split), []
    for stage in report["stages"]:
        paid = PAID_WORDS.get(stage["paid"] or "")
        tag = f'<span class="tag {stage["paid"]}">{paid}</span>' if paid else ""
        gain = signed_text(stage["gain"]["difference"]) if stage["gain"] else ""
        words = "" if stage["status"] == "done" else f"{stage['status']}. "
        words += stage["note"] or ""
        if stage["row_errors"]:
            words += f" {formats.plural(stage['row_errors'], 'row')} with an error."
        rows.append(
            f'<tr class="{"pick" if stage["id"] == best else ""}"><td class="name">{escape(stage["path"], 80)}</td>'
            f'<td>{pictures.whisker(stage[split], scale)}</td><td class="num">{interval_text(stage[split])}</td>'
            f'<td class="num">{score_text((stage["select"] or {}).get("score"))}</td><td class="num">{gain}</td>'
            f'<td>{tag}</td><td class="wrap small soft">{escape(words.strip(), 400)}</td></tr>'
        )
    for control in report["controls"]:
        shown = control["test"] if split == "test" else None
        rows.append(
            f'<tr><td class="name soft">{escape(control["name"], 80)}</td><td>{pictures.whisker(shown, scale)}</td>'
            f'<td class="num">{interval_text(shown)}</td><td></td><td></td><td></td>'
            f'<td class="wrap small soft">control. {escape(control["note"] or "", 400)}</td></tr>'
        )
    heads = (
        ("stage", ""),
        (split, ""),
        ("95 % interval", "num"),
        ("select", "num"),
        ("gain", "num"),
        ("did it pay", ""),
        ("", ""),
    )
    return _card("Scores", _table(heads, rows), "A stage paid if its gain over the stage before is clear of 0 (paired, 95 %).")


def _contrasts(report: Report) -> str:
    items = report["contrasts"]
    ends = [abs(item[key]) for item in items for key in ("difference", "low", "high") if item[key] is not None]
    reach, rows = max(ends, default=0.0) * 1.05 or 1.0, []
    for item in items:
        bounds = formats.bounds_text(item, signed=True)
        rows.append(
            f'<tr><td class="name">{escape(text_lines.contrast_name(item), 120)}</td><td>{pictures.difference(item, reach)}</td>'
            f'<td class="num">{signed_text(item["difference"])} {bounds}</td><td class="num">{formats.p_text(item["p"])}</td>'
            f'<td class="num">{formats.p_text(item["p_holm"])}</td><td class="num">{item["n"]} of {item["on"]}</td></tr>'
        )
    heads = (("contrast", ""), ("", ""), ("difference", "num"), ("p", "num"), ("p (Holm)", "num"), ("rows", "num"))
    inner = _table(heads, rows) if rows else ""
    return _card("Contrasts, fixed beforehand", inner, text_lines.resolution_line(report) or "")


def _costs(report: Report) -> str:
    stages = [stage for stage in report["stages"] if stage["lm_calls"] or stage["seconds"]]
    tops = [max((sum(values(stage)) for stage in stages), default=0) for values, _ in _COSTS]
    rows = []
    for stage in stages:
        cells = ""
        for (values, form), top in zip(_COSTS, tops, strict=True):
            cells += f'<td>{pictures.bar(values(stage), top)}<span class="small soft">{form(stage)}</span></td>'
        rows.append(f'<tr><td class="name">{escape(stage["path"], 80)}</td>{cells}</tr>')
    heads = [
        (words, "") for words in ("stage", "time", "device-seconds: engines, training", "LM calls", "tokens: prompt, completion")
    ]
    note = f"{DEVICE_NOTE} {text_lines.shared_line(report) or ''}".strip()
    return _card("Cost of each stage", _table(heads, rows) if rows else "", note)


def _devices(stage: Mapping[str, Any]) -> list[float]:
    found = stage.get("device_seconds")
    return [found["engine"], found["training"]] if found else [0.0, 0.0]


def _devices_text(stage: Mapping[str, Any]) -> str:
    """`178 + 156` of engines and training; a `≥` where more engines may have been up."""
    if not stage.get("device_seconds"):
        return NOTHING
    words = " + ".join(count_text(value) for value in _devices(stage))
    return words if stage["device_seconds"]["exact"] else f"≥ {words}"


DEVICE_NOTE = (
    "Device-seconds: engines x devices of each x seconds of rollouts, searches and evaluations; workers x seconds of fine-tuning."
)
_COSTS: tuple[tuple[Callable[[Mapping[str, Any]], list[float]], Callable[[Mapping[str, Any]], str]], ...] = (
    (lambda stage: [stage["seconds"]], lambda stage: seconds_text(stage["seconds"])),
    (_devices, _devices_text),
    (lambda stage: [stage["lm_calls"]], lambda stage: count_text(stage["lm_calls"])),
    (
        lambda stage: [stage["prompt_tokens"], stage["completion_tokens"]],
        lambda stage: count_text(stage["prompt_tokens"] + stage["completion_tokens"]),
    ),
)


def _follow(facts: Facts) -> str:
    example = (facts.get("examples") or {}).get(facts.get("follow") or "")
    answers = facts.get("follow_answers") or {}
    if not example or not answers:
        return ""
    rows = [
        f'<tr><td class="name">{escape(stage["path"], 80)}</td>'
        f'<td class="wrap">{escape(formats.answer_text(answers[stage["id"]]), 600)}</td>'
        f'<td class="wrap">{escape(formats.verdict_text(answers[stage["id"]]), 220)}</td></tr>'
        for stage in facts["stages"]
        if answers.get(stage["id"])
    ]
    asked = f"<p><b>Asked</b> {escape(formats.fields_text(example.get('inputs'), 1500))}</p>"
    if example.get("labels"):
        asked += f"<p><b>Expected</b> {escape(formats.fields_text(example['labels'], 600))}</p>"
    return _card("One example through the stages", asked + _table((("stage", ""), ("answer", ""), ("", "")), rows))


def _prompts(report: Report, facts: Facts) -> str:
    best = (report.get("best") or {}).get("id")
    by_id = {stage["id"]: stage for stage in facts["stages"]}
    inner = ""
    for stage in sorted(facts["stages"], key=lambda item: item["id"] != best):
        if not stage.get("candidate"):
            continue
        parent = by_id.get(stage.get("parent") or "")
        if stage["id"] != best and parent is not None and parent.get("candidate") == stage["candidate"]:
            continue
        state = " open" if stage["id"] == best else ""
        label = f"{stage['path']} (the pick)" if stage["id"] == best else stage["path"]
        inner += f"<details{state}><summary>{escape(label, 120)}</summary>{_candidate(stage['candidate'])}</details>"
    return _card("Prompts", inner, "A stage that left the prompts as they were is not listed.")


def _candidate(candidate: Mapping[str, Any]) -> str:
    parts = []
    for name, predictor in candidate["predictors"].items():
        demos = predictor.get("demos") or []
        parts.append(
            f'<h3 class="mono">{escape(name, 120)}</h3><pre>{escape(predictor.get("instructions") or "", MAX_TEXT)}</pre>'
        )
        parts.append(f'<p class="small soft">{formats.plural(len(demos), "demo") if demos else "no demos"}</p>')
        for demo in demos:
            lines = [
                f"<div><span>{escape(field, 120)}</span> {escape(formats.value_text(value), MAX_TEXT)}</div>"
                for field, value in demo.items()
            ]
            parts.append(f'<div class="demo">{"".join(lines)}</div>')
    return "".join(parts)


def _changes(facts: Facts) -> str:
    by_id = {stage["id"]: stage for stage in facts["stages"]}
    inner = ""
    for stage in facts["stages"]:
        parent = by_id.get(stage.get("parent") or "")
        changes = stage_changes(stage, parent) if parent is not None else None
        if parent is None or changes is None:
            continue
        words = f"{stage['path']} against {parent['path']}: {len(changes.fixed)} fixed, {len(changes.broken)} broken"
        words += f", of {formats.plural(changes.compared, 'row')}"
        tables = ""
        for name, ids in (("Fixed", changes.fixed), ("Broken", changes.broken)):
            rows = [_change_row(facts, key, parent, stage) for key in ids[:MAX_CHANGES]]
            more = f'<p class="small soft">and {len(ids) - MAX_CHANGES} more</p>' if len(ids) > MAX_CHANGES else ""
            heads = (("asked", ""), ("expected", ""), ("before", ""), ("after", ""))
            tables += f"<h3>{name}</h3>{_table(heads, rows)}{more}" if rows else ""
        inner += f"<details><summary>{escape(words, 300)}</summary>{tables}</details>"
    return _card("What each stage fixed and broke", inner)


def _change_row(facts: Facts, key: str, parent: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    example = (facts.get("examples") or {}).get(key) or {}
    cells = [formats.fields_text(example.get("inputs")), formats.fields_text(example.get("labels"))]
    for side in (parent, stage):
        row = side["predictions"][key]
        error = row.get("error")
        words = f"error: {formats.one_line(error, 200)}" if error else formats.fields_text(row.get("prediction"))
        cells.append(f"{words} ({score_text(row.get('score'), 2)})")
    inner = "".join(f'<td class="wrap small">{escape(cell)}</td>' for cell in cells)
    return f"<tr>{inner}</tr>"
