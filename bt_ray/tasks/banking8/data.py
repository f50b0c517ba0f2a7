"""Cut Banking77 to eight intents: `python -m bt_ray.tasks.banking8.data SOURCE OUT`.

SOURCE holds train.jsonl, dev.jsonl and test.jsonl with the fields `text` and `answer` (the label).
Banking77: Casanueva et al. 2020, PolyAI, CC BY 4.0. Its known wrong labels are left as they are.
"""

from __future__ import annotations

import random
from pathlib import Path

from bt_ray.tasks.banking8.program import DEPARTMENTS
from bt_ray.tasks.files import Row, cut_command, read_jsonl

SOURCE_SPLITS = {"train": "train", "val": "dev", "test": "test"}


def build(source: str | Path, seed: int = 8) -> dict[str, list[Row]]:
    """Rows {"message", "intent"} of train, val and test, in a shuffled order that `seed` fixes.

    The source's own splits are kept, so a text that nearly repeats another stays on its side.
    Raises FileNotFoundError or ValueError for a source that cannot be read, and ValueError when
    a split lacks one of the intents.
    """
    wanted = {intent for pair in DEPARTMENTS.values() for intent in pair}
    splits: dict[str, list[Row]] = {}
    for name, source_name in SOURCE_SPLITS.items():
        rows = read_jsonl(Path(source) / f"{source_name}.jsonl", ("text", "answer"))
        kept = [{"message": row["text"], "intent": row["answer"]} for row in rows if row["answer"] in wanted]
        absent = wanted - {row["intent"] for row in kept}
        if absent:
            raise ValueError(f"{source}: {source_name}.jsonl has no row of {', '.join(sorted(absent))}")
        random.Random(seed).shuffle(kept)
        splits[name] = kept
    return splits


def main(argv: list[str] | None = None) -> None:
    cut_command(Path(__file__).parent, build, "folder with train.jsonl, dev.jsonl and test.jsonl of Banking77", argv)


if __name__ == "__main__":
    main()
