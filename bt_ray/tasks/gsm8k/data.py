"""Cut GSM8K as the paper did: `python -m bt_ray.tasks.gsm8k.data SOURCE OUT`.

SOURCE holds train.jsonl and test.jsonl, and perhaps dev.jsonl, with the fields `question` and `answer`.
The official files work as they are: of a worked answer only the number after `####` is kept.
GSM8K: Cobbe et al. 2021, OpenAI, MIT licence.
"""

from __future__ import annotations

import random
from pathlib import Path

from bt_ray.tasks.files import Row, cut_command, read_jsonl

TRAIN_ROWS, VAL_ROWS = 1000, 500


def final_number(answer: str) -> str:
    """The number after the last `####` of a worked answer, without thousands commas; else the answer."""
    return answer.rpartition("####")[2].strip().replace(",", "")


def build(source: str | Path, seed: int = 0) -> dict[str, list[Row]]:
    """Rows {"question", "answer"}: 1000 train, 500 val, and the whole test file.

    val takes the source's dev rows first, then rows of train that train itself does not get.
    Fewer rows come back if the source has fewer. Raises FileNotFoundError or ValueError for a
    source that cannot be read.
    """
    source = Path(source)

    def rows_of(name: str) -> list[Row]:
        rows = read_jsonl(source / f"{name}.jsonl", ("question", "answer"))
        return [{"question": row["question"], "answer": final_number(str(row["answer"]))} for row in rows]

    rest = rows_of("train")
    random.Random(seed).shuffle(rest)
    train, rest = rest[:TRAIN_ROWS], rest[TRAIN_ROWS:]
    dev = rows_of("dev") if (source / "dev.jsonl").is_file() else []
    val = (dev + rest)[:VAL_ROWS]
    random.Random(seed).shuffle(val)
    return {"train": train, "val": val, "test": rows_of("test")}


def main(argv: list[str] | None = None) -> None:
    cut_command(Path(__file__).parent, build, "folder with train.jsonl and test.jsonl of GSM8K", argv)


if __name__ == "__main__":
    main()
