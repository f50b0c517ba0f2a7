"""Each task with chain of thought runs `p` and `w` end to end on 8 rows, with the default model."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from bt_ray.rollout.rows import read_rows
from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import bt_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
TASKS, REAL = ROOT / "bt_ray" / "tasks", ROOT.parent / "shared" / "data"
# Every rollout passes, so that the fine-tune has rows whatever the small model answers.
SMALL = [
    'strategy=["p", "w"]',
    "model=smollm2-135m",
    "adapter=compact",
    "engine={max_model_len: 1536, max_num_seqs: 16}",
    "rollout={samples: 1, temperature: 0.7, max_tokens: 64, metric_threshold: 0.0, constrain: true}",
    "steps.p={optimizer: random_fewshot, num_candidates: 1, max_bootstrapped_demos: 1, max_labeled_demos: 0}",
    "steps.w={method: sft, lora_rank: 8, target_modules: [q_proj, k_proj], epochs: 1, global_batch_size: 4, max_train_tokens: 8000}",
    "data.test=null",
]
TOWNS = ["Aral", "Brin", "Cole", "Dove", "Esk", "Fenn", "Gale", "Holt"]


def arithmetic(first, count):
    return [
        {"question": f"Ann has {n} pens and buys 3 more. How many has she?", "answer": str(n + 3)}
        for n in range(first, first + count)
    ]


def towns(first, count):
    return [
        {"question": f"In year {1900 + n}, which river flows through {TOWNS[n % 8]}?", "answer": f"River {TOWNS[n % 8]}"}
        for n in range(first, first + count)
    ]


def flowers(first, count):
    lines = (TASKS / "iris" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[first : first + count]]


def eight(task, split, first):
    """Eight rows of the task: of its real data where that lies beside the repository, else invented ones of its shape."""
    real = REAL / task / f"{split}.jsonl"
    if task == "iris" or not real.is_file():  # those of iris are committed
        return {"gsm8k": arithmetic, "hotpotqa": towns, "iris": flowers}[task](first, 8)
    with real.open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, 8)]


def passages(rows):
    """A corpus that answers these rows: those passages of the real one that they name and its first thousand, or invented ones."""
    if "gold_ids" not in rows[0]:
        return [{"id": str(n), "title": town, "text": f"{town} is a town on the River {town}."} for n, town in enumerate(TOWNS)]
    named = {name for row in rows for name in row["gold_ids"]}
    with gzip.open(REAL / "hotpotqa" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        found = enumerate(map(json.loads, file))
        return [passage for number, passage in found if number < 1000 or passage["id"] in named]


def prepare(task, folder):
    """Config and 8 rows a split of a task in `folder`; returns extra overrides."""
    splits = {"train": eight(task, "train", 0), "val": eight(task, "dev", 16)}
    fields = {"gsm8k": ("question", "answer"), "hotpotqa": ("question", "answer")}
    for name, rows in splits.items():
        kept = [{field: row[field] for field in fields.get(task, tuple(row))} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (folder / "config.yaml").write_text((TASKS / task / "config.yaml").read_text())
    if task != "hotpotqa":
        return []
    path = str(folder / "corpus.jsonl")
    corpus = passages([*splits["train"], *splits["val"]])
    Path(path).write_text("".join(json.dumps(passage) + "\n" for passage in corpus))
    (folder / "program.py").write_text(
        f"from bt_ray.tasks.hotpotqa import HotpotQA\n\n\ndef make():\n    return HotpotQA(corpus={path!r}, k=2)\n"
    )
    return ["program=program.py:make"]


@pytest.mark.parametrize("task", ["iris", "gsm8k", "hotpotqa"])
def test_p_and_w_on_eight_rows(task, tmp_path):
    overrides = [f"--set={item}" for item in [*SMALL, *prepare(task, tmp_path)]]
    bt_ray("run", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", *overrides)
    run = RunDir(tmp_path / "run")
    assert {name: run.stage_record(name)["status"] for name in ("vanilla", "p", "w")} == {
        "vanilla": "done",
        "p": "done",
        "w": "done",
    }
    assert run.stage_record("w")["rows"] > 0
    if task == "hotpotqa":
        (rollouts,) = run.root.glob("steps/rollout-*/rows")
        for folder in (rollouts, run.root / "steps" / run.stage_record("vanilla")["evaluate"] / "rows"):
            whole = [row for row in read_rows(str(folder)).values() if row["error"] is None]
            assert whole, f"no question was answered in {folder}"
            for row in whole:
                assert len(row["calls"]) == 3
                assert len(row["prediction"]["hops"]) == 2
