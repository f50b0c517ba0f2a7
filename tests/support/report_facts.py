"""Facts of an invented run, shared by the tests of the report."""

from __future__ import annotations

import random
from typing import Any

QUEUES = ("billing", "delivery", "account", "returns")
SHARES = {"vanilla": 0.42, "p": 0.6, "w": 0.58, "p.p": 0.63, "p.w": 0.78, "w.p": 0.66, "p.w.p": 0.79}
TEXTS = ("My parcel has not come", "I was charged twice", "I cannot log in", "I want to send the shoes back")


def example_ids(split: str, count: int) -> list[str]:
    return [f"{split}-{index:03d}" for index in range(count)]


def _scores(draw: random.Random, split: str, count: int, share: float) -> dict[str, float | None]:
    """0/1 scores with this share; most of an example's luck is its own, so that stages agree as real ones do."""
    luck = random.Random(split)
    scores: dict[str, float | None] = {}
    for key in example_ids(split, count):
        own, fresh = luck.random(), draw.random()
        scores[key] = float((own if draw.random() < 0.8 else fresh) < share)
    return scores


def _candidate(path: str) -> dict[str, Any]:
    demos = [
        {"message": "The invoice lists an item that I never bought.", "summary": "wrong item on invoice"},
        {"message": "Where is my order? It was due on Monday.", "summary": "late order"},
    ]
    return {
        "predictors": {
            "summarise": {"instructions": "Say in a few words what the customer wants.", "demos": demos if "p" in path else []},
            "route": {
                "instructions": "Choose the queue that can help.\nAnswer with its name only.",
                "demos": [{"summary": "late order", "queue": "delivery"}] if "p" in path else [],
            },
        }
    }


def _predictions(draw: random.Random, scores: dict[str, float | None]) -> dict[str, Any]:
    found = {}
    for key, score in scores.items():
        gold = QUEUES[int(key[-3:]) % 4]
        wrong = draw.choice([queue for queue in QUEUES if queue != gold])
        found[key] = {"prediction": {"queue": gold if score else wrong}, "score": score, "error": None}
    return found


def _stage(draw: random.Random, stage_id: str, rows: tuple[int, int]) -> dict[str, Any]:
    steps = [] if stage_id == "vanilla" else stage_id.split(".")
    kind = steps[-1] if steps else "vanilla"
    share = SHARES[stage_id]
    test = _scores(draw, "test", rows[1], share)
    return {
        "id": stage_id,
        "kind": kind,
        "path": " -> ".join(steps) or "vanilla",
        "parent": None if not steps else (".".join(steps[:-1]) or "vanilla"),
        "status": "done",
        "note": None,
        "error": None,
        "select_scores": _scores(draw, "select", rows[0], share),
        "search_scores": _scores(draw, "search", rows[0], min(1.0, share + 0.05)) if kind == "p" else None,
        "test_scores": test,
        "cost": {
            "lm_calls": 100 + 620 * (kind == "p") + 180 * (kind == "w"),
            "prompt_tokens": 21_000 * (len(steps) + 1),
            "completion_tokens": 3_100 * (len(steps) + 1),
            "seconds": 35.0 + 160 * (kind == "p") + 240 * (kind == "w"),
        },
        "tokens_per_example": 190.0 + 350 * (kind == "p"),
        "row_errors": 1 if stage_id == "w" else 0,
        "candidate": _candidate(stage_id),
        "rollouts": {"examples": 64, "rollouts": 64, "passed": 29, "examples_passed": 29} if steps else None,
        "rows": 58 if kind == "w" else None,
        "predictions": _predictions(draw, test),
    }


def demo_facts(select_rows: int = 60, test_rows: int = 120) -> dict[str, Any]:
    """Seven finished stages and one that was skipped; the pick is `p -> w`."""
    draw = random.Random(7)
    stages = [_stage(draw, stage_id, (select_rows, test_rows)) for stage_id in SHARES]
    skipped = dict.fromkeys(stages[0]) | {"id": "w.w", "kind": "w", "path": "w -> w", "parent": "w", "status": "skipped"}
    stages.append({**skipped, "note": "nothing passes", "cost": {}, "row_errors": 0})
    ids = example_ids("select", select_rows) + example_ids("test", test_rows) + ["train-000"]
    return {
        "run_dir": "runs/helpdesk",
        "status": "done",
        "task": "helpdesk",
        "model": "smollm2-135m",
        "metric": "bt_ray.tasks.helpdesk:exact_match",
        "stages": stages,
        "controls": [
            {"name": "TF-IDF and logistic regression", "test_scores": _scores(draw, "test", test_rows, 0.7), "note": None},
            {"name": "fine-tuned on gold labels", "test_scores": None, "note": "no step named"},
        ],
        "pick": "p.w",
        "test_looks": 1,
        "examples": {
            key: {"inputs": {"message": TEXTS[int(key[-3:]) % 4]}, "labels": {"queue": QUEUES[int(key[-3:]) % 4]}} for key in ids
        },
        "estimates": {stage["id"]: {"lm_calls": 700, "seconds": 200.0} for stage in stages},
        "follow": "train-000",
        "follow_answers": {
            "vanilla": {"prediction": {"queue": "delivery"}, "score": 0.0},
            "p.w": {"prediction": {"queue": "billing"}, "score": 1.0},
        },
    }
