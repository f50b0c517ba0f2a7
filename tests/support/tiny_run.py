"""A whole run in a temporary folder: a tiny random model, a two-module program, a fixed schedule."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from tests.support.tiny_model import make_tiny_model

PROGRAM = '''
"""Two modules with constrained outputs, so that even a random model passes on some rows."""

from typing import Literal

import dspy


class Colour(dspy.Signature):
    """Name the colour."""

    text: str = dspy.InputField()
    colour: Literal["red", "blue"] = dspy.OutputField()


class Side(dspy.Signature):
    """Name the side."""

    text: str = dspy.InputField()
    colour: str = dspy.InputField()
    side: Literal["left", "right"] = dspy.OutputField()


class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.colour = dspy.Predict(Colour)
        self.side = dspy.Predict(Side)

    async def aforward(self, text):
        colour = (await self.colour.acall(text=text)).colour
        return await self.side.acall(text=text, colour=colour)

    def forward(self, text):
        colour = self.colour(text=text).colour
        return self.side(text=text, colour=colour)


def exact(example, prediction, trace=None):
    if "raise" in example.text:
        raise RuntimeError("this row is cursed")
    return example.side == prediction.side


def never(example, prediction, trace=None):
    return False
'''

CURSE = " raise"  # the metric raises on rows with this word: two of the ten of val

# One call at a time and no prefix cache: then the same work gives the same bytes.
CONFIG = """
program: program.py:Program
metric: program.py:exact
data: {{train: train.jsonl, val: val.jsonl, test: test.jsonl, inputs: [text]}}
model: {model}
adapter: compact
strategy: {strategy}
rollout: {{samples: 2, temperature: 1.0, max_tokens: 8, constrain: true, concurrency: 1, timeout_s: 300}}
steps:
  p: {{optimizer: random_fewshot, num_candidates: 2, max_bootstrapped_demos: 2, max_labeled_demos: 2, max_parallel: 1}}
  w: {{method: sft, lora_rank: 8, lora_alpha: 16, epochs: 1, learning_rate: 1.0e-3, global_batch_size: 4}}
engine: {{max_model_len: 1024, prefix_caching: false, max_num_seqs: 8, kv_cache_gib: 0.25}}
controls: {{gold: w, tfidf: side}}
seed: 0
"""


def rows(first: int, count: int) -> list[dict[str, str]]:
    words = ["apple", "boat", "cloud", "door", "engine", "field", "glass", "house"]
    return [
        {"text": f"{words[number % 8]} number {number} on the shelf", "side": ("left", "right")[(number // 2) % 2]}
        for number in range(first, first + count)
    ]


def write_run(folder: Path, strategy: str = '["p -> w -> p", "w"]', train: int = 8) -> Path:
    """Write program, data and config into `folder`; returns the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_tiny_model(folder / "model")
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    for name, first, count in (("train", 0, train), ("val", 100, 10), ("test", 200, 6)):
        found = rows(first, count)
        for row in found[8:] if name == "val" else ():
            row["text"] += CURSE
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(model=model, strategy=strategy))
    return path


def hashes(run_dir: Path) -> dict[str, str]:
    """Hash of every stage record of a run."""
    return {path.parent.name: json.loads(path.read_text())["hash"] for path in (run_dir / "stages").glob("*/record.json")}


def written_rows(run_dir: Path) -> dict[str, bytes]:
    """Every segment of rollout rows, as it is on disk."""
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in (run_dir / "steps").rglob("rows/**/*.jsonl")}
