"""Demonstrations from traces and from labels: the stuff of few-shot candidates. Pure.

A demo of a predictor is {input fields..., output fields...}, in the order of its signature.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from bt_ray.search.base import Candidate, SearchContext

Demo = dict[str, Any]
Row = dict[str, Any]


def passed(context: SearchContext) -> dict[str, list[Row]]:
    """Accepted rollouts by example id, in the order of the examples; the best score first, then
    the earlier sample. Examples without one are left out."""
    by_example: dict[str, list[Row]] = {example["id"]: [] for example in context.examples}
    for row in context.rollouts:
        if row["accept"] and not row.get("error") and row["example_id"] in by_example:
            by_example[row["example_id"]].append(row)
    for rows in by_example.values():
        rows.sort(key=lambda row: (-(row["score"] or 0.0), row["sample"]))
    return {example_id: rows for example_id, rows in by_example.items() if rows}


def trace_demos(context: SearchContext, rows: list[Row], rng: random.Random) -> dict[str, list[Demo]]:
    """Demos of every predictor from whole traces: row i gives demo i of each predictor that it called.

    A predictor that a trace called several times gets one of those calls at random; one that it
    did not call, or whose answer did not parse, gets none from that trace.
    """
    demos: dict[str, list[Demo]] = {predictor: [] for predictor in context.signatures}
    for row in rows:
        for predictor, signature in context.signatures.items():
            calls = [call for call in row["calls"] if call["predictor"] == predictor]
            found = [_demo(signature, call["inputs"], call["outputs"] or {}) for call in calls]
            whole = [demo for demo in found if demo is not None]
            if whole:
                demos[predictor].append(rng.choice(whole))
    return demos


def labelled_demos(context: SearchContext, examples: list[Row]) -> dict[str, list[Demo]]:
    """Demos from labels, for the predictors of `labelled_predictors`; the others get none."""
    demos: dict[str, list[Demo]] = {predictor: [] for predictor in context.signatures}
    for predictor in labelled_predictors(context):
        for example in examples:
            demo = _demo(context.signatures[predictor], example["inputs"], example["labels"])
            if demo is not None:
                demos[predictor].append(demo)
    return demos


def draw_labelled(
    context: SearchContext, examples: list[Row], rng: random.Random, size: int, predictors: Sequence[str] | None = None
) -> list[Row]:
    """Up to `size` examples at random, of those that give a labelled demo of any of `predictors` (None: of all that are
    labelled): others may lack the label."""
    own = [context.signatures[name] for name in (labelled_predictors(context) if predictors is None else predictors)]
    usable = [each for each in examples if any(_demo(signature, each["inputs"], each["labels"]) for signature in own)]
    return rng.sample(usable, min(size, len(usable)))


def labelled_predictors(context: SearchContext) -> list[str]:
    """Predictors whose outputs are all labelled and that take at least one input of the examples.

    In a pipeline that is the last module at most; the others learn from traces only. An input that
    comes from another module is left out of such a demo, as in DSPy.
    """
    if not context.examples:
        return []
    given = set.intersection(*(set(example["inputs"]) for example in context.examples))
    return [
        predictor
        for predictor, signature in context.signatures.items()
        if set(signature["outputs"]) <= set(context.labelled.get(predictor, ())) and given & set(signature["inputs"])
    ]


def with_demos(student: Candidate, demos: dict[str, list[Demo]]) -> Candidate:
    """The student's instructions with these demos in place of its own."""
    return {
        "predictors": {
            name: {"instructions": predictor["instructions"], "demos": [dict(demo) for demo in demos.get(name, [])]}
            for name, predictor in student["predictors"].items()
        }
    }


def _demo(signature: dict[str, list[str]], inputs: Row, outputs: Row) -> Demo | None:
    """The demo, or None where an output or every input is missing: half an answer teaches half an answer."""
    shown = {name: inputs[name] for name in signature["inputs"] if name in inputs}
    if not shown or any(outputs.get(name) is None for name in signature["outputs"]):
        return None
    return shown | {name: outputs[name] for name in signature["outputs"]}
