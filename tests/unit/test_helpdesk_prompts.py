"""The helpdesk's prompts are short: a small model on a CPU pays for every token."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from bt_ray.lm import models, registry
from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.tokenize import ChatTokenizer
from bt_ray.rollout.program import predictor_signatures
from bt_ray.tasks import helpdesk

FOLDER = Path(helpdesk.__file__).parent
MOST_TOKENS = 100


@pytest.fixture(scope="module")
def tokenizer():
    """Counts as the engine does; never prepares the model."""
    known = registry.find("smollm2-135m")
    folder = models.home() / "models" / known.key
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the model smollm2-135m is not prepared here")
    return ChatTokenizer(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_compact_prompts_without_demos_are_short(tokenizer, split):
    adapter = make_adapter("compact", constrain=False)
    signatures = predictor_signatures(helpdesk.Helpdesk())
    department_of = {intent: name for name, intents in helpdesk.DEPARTMENTS.items() for intent in intents}
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    for name, signature in signatures.items():
        given = [{**row, "department": department_of[row["intent"]]} for row in rows]
        inputs = [{field: row[field] for field in signature.input_fields} for row in given]
        counts = [tokenizer.count(adapter.format(signature, [], values)) for values in inputs]
        assert mean(counts) < MOST_TOKENS, name
        assert max(counts) < MOST_TOKENS, (name, rows[counts.index(max(counts))])
